import json

import pyarrow
import pyarrow.parquet
import pytest

from onecomp.errors import InputError
from onecomp.evaluation import texts
from onecomp.evaluation.texts import load_texts

ROWS = ["first row", "", "third, with a comma", "NA"]


def write_rows(path):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": row}) for row in ROWS))
    elif path.suffix == ".tsv":
        path.write_text("number\ttext\n" + "\n".join(f"{i}\t{row}" for i, row in enumerate(ROWS)))
    elif path.suffix == ".csv":
        path.write_text("number,text\n" + "\n".join(f'{i},"{row}"' for i, row in enumerate(ROWS)))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_tables_give_their_rows_in_order(tmp_path, suffix):
    name = write_rows(tmp_path / f"rows{suffix}")
    assert load_texts(name) == ROWS
    assert load_texts(name, max_samples=1) == ROWS[:1]


def test_a_text_file_is_one_row(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert load_texts(str(path), max_samples=1) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/nowhere/missing.parquet"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(InputError, match="there is no such file"):
        load_texts(name)


def test_an_empty_text_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n\n")
    with pytest.raises(InputError, match="holds no text"):
        load_texts(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"body": "x"}'),
        ("a.jsonl", b"{broken"),
        ("a.jsonl", b"[1]"),
        ("a.csv", b"body\nx\n"),
        ("a.parquet", b"PAR1"),
        ("a.txt", b"\xff\xfe\xfa"),
    ],
)
def test_an_unreadable_file_is_named_with_the_remedy(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: cannot be read as .* give a UTF-8 .txt file"):
        load_texts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n{"text": "y"}\n'),
        ("a.csv", "number,text\n1,x\n2\n3,y\n"),
        ("a.tsv", "number\ttext\n1\tx\n2\n3\ty\n"),
    ],
)
def test_a_cell_without_text_is_an_empty_row(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_texts(str(tmp_path / name)) == ["x", "", "y"]


def test_a_null_in_a_parquet_file_is_an_empty_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    assert load_texts(str(tmp_path / "a.parquet")) == ["x", ""]


def test_a_dataset_that_comes_as_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text("raise SystemExit\n")
    with pytest.raises(InputError, match=r"data: cannot be had .* give a local text file"):
        load_texts("data")


def test_shorthands_name_the_public_datasets():
    wikitext = texts._hub_text("wikitext2", None, "validation", None)
    assert (wikitext.dataset_name, wikitext.dataset_config) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
    )
    assert wikitext.split == "validation"
    c4 = texts._hub_text("c4", "wikitext-2-raw-v1", "test", None)
    assert c4.dataset_config == "en/c4-validation.00000-of-00008.json.gz"
    assert (c4.split, c4.max_samples) == ("train", 1100)
    assert texts._hub_text("c4", None, "test", 7).max_samples == 7


def test_a_hub_out_of_reach_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot be had from the Hub .* give a local text file"):
        load_texts("nobody-at-all/no-such-dataset-for-onecomp")


@pytest.mark.parametrize("max_samples", [None, 2])
def test_rows_of_a_dataset_keep_their_order(tmp_path, monkeypatch, max_samples):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "rows.jsonl")
    source = texts.HubText(
        dataset_name=str(tmp_path / "data"),
        dataset_config=None,
        split="train",
        max_samples=max_samples,
    )
    assert texts._read_hub(source) == ROWS[:max_samples]
