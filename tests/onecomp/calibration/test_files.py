import gc
import gzip
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from onecomp.calibration.config import CalibrationConfig
from onecomp.calibration.files import TEXT_COLUMNS, read_local
from onecomp.errors import InputError

DOCUMENTS = [f"Document number {i} says something that is longer than fifty." for i in range(6)]
CONFIG = CalibrationConfig()


def table(column: str = "text", documents: list[str] = DOCUMENTS) -> pa.Table:
    return pa.table({"n": list(range(len(documents))), column: documents})


def write(path: Path, rows: pa.Table) -> Path:
    """One file of any kind that is read."""
    lines = "\n".join(json.dumps(row) for row in rows.to_pylist())
    match path.suffix:
        case ".txt":
            path.write_text("\n \n".join(rows.column(1).to_pylist()))
        case ".json":
            path.write_text(json.dumps(rows.to_pylist()))
        case ".jsonl" | ".ndjson":
            path.write_text(lines)
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".csv":
            pa.csv.write_csv(rows, path)
        case ".tsv":
            pa.csv.write_csv(rows, path, pa.csv.WriteOptions(delimiter="\t"))
        case ".parquet":
            pa.parquet.write_table(rows, path, row_group_size=2)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
                writer.write_table(rows)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.json", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json.gz", "a.csv", "a.tsv",
     "a.parquet", "a.arrow", "A.arrow"],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name, table())
    assert [text.strip() for text in read_local(path, CONFIG)] == DOCUMENTS


def test_a_saved_dataset_gives_its_documents(tmp_path):
    datasets.Dataset(table()).save_to_disk(tmp_path / "saved")
    assert list(read_local(tmp_path / "saved", CONFIG)) == DOCUMENTS


def test_a_saved_dataset_with_splits_gives_the_split_asked_for(tmp_path):
    splits = datasets.DatasetDict(
        train=datasets.Dataset(table(documents=DOCUMENTS[:2])),
        test=datasets.Dataset(table(documents=DOCUMENTS[2:])),
    )
    splits.save_to_disk(tmp_path / "saved")
    test_split = CalibrationConfig(dataset_split="test")
    assert list(read_local(tmp_path / "saved", CONFIG)) == DOCUMENTS[:2]
    assert list(read_local(tmp_path / "saved", test_split)) == DOCUMENTS[2:]
    with pytest.raises(InputError, match=r"no split 'dev': found train, test\. Set dataset_split"):
        list(read_local(tmp_path / "saved", CalibrationConfig(dataset_split="dev")))


def test_a_directory_gives_its_files_in_order_and_ignores_other_kinds(tmp_path):
    (tmp_path / "part").mkdir()
    write(tmp_path / "part" / "1.parquet", table(documents=DOCUMENTS[3:]))
    write(tmp_path / "0.parquet", table("content", DOCUMENTS[:3]))
    (tmp_path / "README.txt").write_text("What these data are.")
    (tmp_path / ".hidden.parquet").write_bytes(b"junk")
    assert list(read_local(tmp_path, CONFIG)) == DOCUMENTS


def test_a_blank_line_may_hold_spaces_and_a_paragraph_line_breaks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n \n one\ntwo\n\t\n\n\nthree\n")
    assert list(read_local(path, CONFIG)) == [" one\ntwo\n", "three\n"]


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\n" * 5000 + b"\xff\xfe")
    assert next(read_local(path, CONFIG)) == "good\n"


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow"])
def test_stopping_early_leaves_no_file_open(tmp_path, name):
    path = write(tmp_path / name, table(documents=DOCUMENTS * 2000))
    texts = read_local(path, CONFIG)
    assert next(texts).strip() == DOCUMENTS[0]
    del texts
    gc.collect()  # an open file would warn here, and warnings are errors


def test_tables_keep_quoted_line_breaks_and_numbers_as_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('n,text\n1,"two, and\nthree"\n2,4\n3,NA\n')
    assert list(read_local(path, CONFIG)) == ["two, and\nthree", "4", "NA"]


@pytest.mark.parametrize("column", TEXT_COLUMNS)
def test_other_columns_stand_in_for_a_missing_text_key(tmp_path, column, caplog):
    path = write(tmp_path / "a.jsonl", table(column))
    with caplog.at_level(logging.WARNING, "onecomp"):
        assert list(read_local(path, CONFIG)) == DOCUMENTS
    assert (f"no column 'text', reading '{column}'" in caplog.text) == (column != "text")


def test_text_key_comes_before_the_usual_columns(tmp_path):
    rows = table().append_column("body", [["wrong"] * 6]).append_column("story", [DOCUMENTS[::-1]])
    path = write(tmp_path / "a.jsonl", rows)
    assert list(read_local(path, CalibrationConfig(text_key="story"))) == DOCUMENTS[::-1]


def test_blank_rows_are_dropped(tmp_path):
    rows = pa.table({"text": ["one", None, "", "  \n", "two"]})
    assert list(read_local(write(tmp_path / "a.jsonl", rows), CONFIG)) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_short_documents_of_columnar_files_are_dropped(tmp_path, name):
    path = write(tmp_path / name, table(documents=["x" * 49, "x" * 50]))
    assert list(read_local(path, CONFIG)) == ["x" * 50]


def test_short_documents_of_a_saved_dataset_are_dropped(tmp_path):
    datasets.Dataset(table(documents=["x" * 49, "x" * 50])).save_to_disk(tmp_path)
    assert list(read_local(tmp_path, CONFIG)) == ["x" * 50]


def test_large_parquet_files_are_sampled_by_row_group_in_file_order(tmp_path):
    path = write(tmp_path / "a.parquet", table(documents=[f"{i:060}" for i in range(40)]))
    drawn = {
        seed: [int(t) for t in read_local(path, CalibrationConfig(seed=seed, max_documents=5))]
        for seed in range(4)
    }
    for documents in drawn.values():
        assert len(documents) == 6  # three row groups of two hold at least five
        assert documents == sorted(documents)
        assert all(b == a + 1 for a, b in zip(documents[::2], documents[1::2], strict=True))
    assert len({tuple(documents) for documents in drawn.values()}) > 1


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.txt.gz", "a.parquet.gz"])
def test_an_unsupported_suffix_is_refused_with_the_list(tmp_path, name):
    path = tmp_path / name
    path.write_text("text")
    with pytest.raises(InputError, match=r"is not supported\. Use one of \.parquet, \.arrow,.*txt"):
        read_local(path, CONFIG)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.touch()
    with pytest.raises(InputError, match=rf"{name}: the file is empty\. Give a file that holds"):
        read_local(path, CONFIG)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_a_missing_text_column_is_refused_with_the_columns_found(tmp_path, name):
    path = write(tmp_path / name, table("story"))
    message = (
        r"no column holds text: found n, story, looked for text_key='prose' and text, content, "
        r"sentence, document, body, input\. Set text_key to the column to read\."
    )
    with pytest.raises(InputError, match=message):
        list(read_local(path, CalibrationConfig(text_key="prose")))


def test_a_column_of_something_else_than_text_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ["a", "b"]}\n')
    with pytest.raises(InputError, match="column 'text' holds list, not text"):
        list(read_local(path, CONFIG))


def test_a_directory_without_data_files_is_refused(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match="the directory has no data files"):
        read_local(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{oops'),
        ("a.jsonl.gz", b"not compressed"),
        ("a.parquet", b"junk"),
        ("a.arrow", b"junk"),
        ("a.txt", b"caf\xe9\n"),
        ("a.csv", b"text\ncaf\xe9\n"),
    ],
)
def test_broken_content_is_an_error_that_names_the_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: cannot be read: .*Check that the content fits"):
        list(read_local(path, CONFIG))
