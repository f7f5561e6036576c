import logging

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from onecomp.calibration.config import CalibrationConfig
from onecomp.calibration.sources import load_texts
from onecomp.errors import InputError

PROSE = (
    "The river rises in the hills above the town. It runs through fields of barley and past two "
    "old mills! In a dry summer you can cross it on foot, and children often do so."
)


@pytest.fixture(autouse=True)
def _no_caches(monkeypatch, tmp_path):
    """Neither the developer's calibration cache nor the client's cache answers for the Hub."""
    monkeypatch.delenv("ONECOMP_CALIB_CACHE", raising=False)
    monkeypatch.delenv("CALIB_DATA_ROOT", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def test_a_local_file_gives_its_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert list(load_texts(CalibrationConfig(str(path)))) == ["one\n", "two\n"]


def test_a_tilde_means_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert list(load_texts(CalibrationConfig("~/a.txt"))) == ["one"]


def test_max_documents_ends_the_reading(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(str(i) for i in range(10)))
    assert len(list(load_texts(CalibrationConfig(str(path), max_documents=3)))) == 3


@pytest.mark.parametrize(
    "name", ["missing.txt", "./missing", "/no/such/place", "~/missing", "a/b/c"]
)
def test_a_missing_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"there is no such file or directory\. Check the path"):
        load_texts(CalibrationConfig(name))


@pytest.mark.parametrize("content", ["\n \n\t\n", "[]"])
def test_a_file_without_documents_is_refused(tmp_path, content):
    path = tmp_path / ("a.json" if content == "[]" else "a.txt")
    path.write_text(content)
    with pytest.raises(InputError, match="holds no usable document"):
        load_texts(CalibrationConfig(str(path)))


def test_self_is_not_read():
    with pytest.raises(InputError, match=r"self: .*sampled from the model, not read"):
        load_texts(CalibrationConfig("self"))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("c4", r"allenai/c4 \(en/c4-train\.00001-of-01024\.json\.gz\)"),
        ("wikitext2", r"Salesforce/wikitext \(wikitext-2-raw-v1\)"),
        ("some-org/some-data", r"some-org/some-data \(train\)"),
    ],
)
def test_without_the_hub_the_error_names_the_data_and_the_ways_out(name, what):
    with pytest.raises(InputError, match=rf"{name}: the dataset {what} could not be fetched") as e:
        load_texts(CalibrationConfig(name))
    message = str(e.value)
    assert "--calibration-dataset self" in message
    assert 'CalibrationConfig(calibration_dataset="self")' in message
    assert "--calibration-dataset FILE.txt" in message
    assert 'CalibrationConfig(calibration_dataset="FILE.txt")' in message
    assert "ONECOMP_CALIB_CACHE" in message


@pytest.mark.parametrize("variable", ["ONECOMP_CALIB_CACHE", "CALIB_DATA_ROOT"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("c4", "c4/c4-train.00001-of-01024.jsonl"),
        ("wikitext2", "wikitext2.jsonl"),
        ("some-org/some-data", "some-org/some-data.jsonl"),
    ],
)
def test_the_local_cache_is_tried_before_the_hub(monkeypatch, tmp_path, variable, name, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"text": "kept here"}\n{"text": ""}\n')
    monkeypatch.setenv(variable, str(tmp_path))
    assert list(load_texts(CalibrationConfig(name))) == ["kept here"]


def test_the_projects_cache_variable_wins(monkeypatch, tmp_path):
    for folder in ("ours", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c4.txt").write_text(folder)
    monkeypatch.setenv("CALIB_DATA_ROOT", str(tmp_path / "other"))
    monkeypatch.setenv("ONECOMP_CALIB_CACHE", str(tmp_path / "ours"))
    assert list(load_texts(CalibrationConfig())) == ["ours"]


def test_built_in_datasets_are_not_capped(monkeypatch, tmp_path):
    rows = pa.table({"text": [f"{i:060}" for i in range(10)]})
    pa.parquet.write_table(rows, tmp_path / "c4.parquet", row_group_size=2)
    monkeypatch.setenv("ONECOMP_CALIB_CACHE", str(tmp_path))
    assert len(list(load_texts(CalibrationConfig("c4", max_documents=3)))) == 10


def test_the_quality_filter_is_for_c4_on_demand(monkeypatch, tmp_path):
    (tmp_path / "c4.txt").write_text(f"click here\n\n{PROSE}\n\nlogin\n")
    monkeypatch.setenv("ONECOMP_CALIB_CACHE", str(tmp_path))
    assert len(list(load_texts(CalibrationConfig("c4")))) == 3
    assert list(load_texts(CalibrationConfig("c4", use_quality_filter=True))) == [f"{PROSE}\n"]


def test_the_quality_filter_elsewhere_is_announced_as_without_effect(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("click here")
    with caplog.at_level(logging.WARNING, "onecomp"):
        assert list(load_texts(CalibrationConfig(str(path), use_quality_filter=True)))
    assert "use_quality_filter is for c4 only" in caplog.text
