"""Log lines of an application: one format, to standard error and, where asked, to a file."""

import logging
import sys
from pathlib import Path

PACKAGE_LOGGERS = ("onecomp", "cluster", "actors")
LINE_FORMAT = "%(asctime)s %(levelname)s %(name)s  %(message)s"
TIME_FORMAT = "%H:%M:%S"


class StandardErrorHandler(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is at that moment, so that lines pass above a live bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        self.stream = sys.stderr
        super().emit(record)


class LogFileHandler(logging.FileHandler):
    """The log file that ``setup_logger`` opened; told apart from handlers of the application."""


def setup_logger(
    level: int | str = "INFO",
    basic: int | str = "WARNING",
    filemode: str = "w",
    logfile: str | Path | None = None,
) -> None:
    """Send log lines to standard error, as ``02:03:26 INFO onecomp.pipeline  block  12/32 ...``.

    For applications; the library itself never configures logging. A second call replaces the
    first. Where the application has handlers on the root logger already, lines go to those, and
    only the levels and the log file are set.

    Args:
        level: Level of this distribution's loggers (``onecomp``, ``cluster``, ``actors``).
        basic: Level of all other loggers.
        filemode: ``w`` to start the log file anew, ``a`` to append.
        logfile: File that gets the same lines.

    Raises:
        ValueError: An unknown level.
        OSError: The log file cannot be opened.
    """
    root = logging.getLogger()
    _remove_own_handlers(root)
    logging.basicConfig(
        level=basic, format=LINE_FORMAT, datefmt=TIME_FORMAT, handlers=[StandardErrorHandler()]
    )
    root.setLevel(basic)
    if logfile is not None:
        handler = LogFileHandler(logfile, mode=filemode, encoding="utf-8")
        handler.setFormatter(logging.Formatter(LINE_FORMAT, TIME_FORMAT))
        root.addHandler(handler)
    for name in PACKAGE_LOGGERS:
        logging.getLogger(name).setLevel(level)


def _remove_own_handlers(root: logging.Logger) -> None:
    for handler in list(root.handlers):
        if isinstance(handler, StandardErrorHandler | LogFileHandler):
            root.removeHandler(handler)
            handler.close()


def format_duration(seconds: int | float) -> str:
    """A duration in its two largest units.

    Example:
        >>> format_duration(45), format_duration(192.4), format_duration(3900)
        ('45s', '3m12s', '1h5m')
    """
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{rest_minutes}m"
    return f"{minutes}m{rest_s}s" if minutes else f"{rest_s}s"
