import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from onecomp.log import PACKAGE_LOGGERS, StandardErrorHandler, format_duration, setup_logger


@contextmanager
def bare_logging() -> Iterator[logging.Logger]:
    """The root logger without handlers, as a fresh process has it.

    Not a fixture: pytest adds handlers of its own when a test's call begins.
    """
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, PACKAGE_LOGGERS)]
    handlers, levels = list(root.handlers), [logger.level for logger in loggers]
    root.handlers = []
    try:
        yield root
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def test_lines_carry_time_level_and_name_and_go_to_standard_error(capsys):
    with bare_logging():
        setup_logger()
        logging.getLogger("onecomp.pipeline").info("block %d", 1)
        written = capsys.readouterr()
        assert written.out == ""
        assert re.fullmatch(r"\d\d:\d\d:\d\d INFO onecomp\.pipeline  block 1\n", written.err)


def test_other_packages_speak_from_the_basic_level_on(capsys):
    with bare_logging():
        setup_logger(level="DEBUG", basic="ERROR")
        logging.getLogger("onecomp.x").debug("ours")
        logging.getLogger("other").warning("theirs")
        logging.getLogger("other").error("their error")
        err = capsys.readouterr().err
        assert "ours" in err
        assert "their error" in err
        assert "WARNING" not in err


def test_a_second_call_replaces_the_first(capsys, tmp_path):
    with bare_logging() as root:
        setup_logger(logfile=tmp_path / "first.log")
        setup_logger(level="WARNING")
        logging.getLogger("onecomp").info("hidden")
        logging.getLogger("onecomp").warning("once")
        assert capsys.readouterr().err.count("\n") == 1
        assert (tmp_path / "first.log").read_text() == ""
        assert len(root.handlers) == 1


@pytest.mark.parametrize(("filemode", "kept"), [("w", 0), ("a", 1)])
def test_a_log_file_gets_the_same_lines(capsys, tmp_path, filemode, kept):
    with bare_logging():
        path = tmp_path / "run.log"
        path.write_text("before\n")
        setup_logger(logfile=str(path), filemode=filemode)
        logging.getLogger("onecomp").info("line")
        text = path.read_text()
        assert text.count("before\n") == kept
        assert text.endswith(capsys.readouterr().err)


def test_handlers_of_the_application_are_kept(capsys):
    with bare_logging() as root:
        own = logging.NullHandler()
        root.addHandler(own)
        setup_logger()
        setup_logger()
        assert root.handlers == [own]
        assert logging.getLogger("onecomp").isEnabledFor(logging.INFO)


def test_standard_error_is_looked_up_at_each_line(monkeypatch):
    handler = StandardErrorHandler()
    later = io.StringIO()
    monkeypatch.setattr("sys.stderr", later)
    handler.handle(logging.makeLogRecord({"msg": "line"}))
    assert later.getvalue() == "line\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (45, "45s"),
        (59.6, "1m0s"),
        (192.4, "3m12s"),
        (3599.7, "1h0m"),
        (3900, "1h5m"),
        (26 * 3600, "26h0m"),
    ],
)
def test_durations_show_their_two_largest_units(seconds, text):
    assert format_duration(seconds) == text
