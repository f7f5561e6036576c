import gzip
import json

import datasets
import pytest
from tiny_models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from onecomp.errors import InputError
from onecomp.post_process.lora.text import TextSource, samples_of

TEXTS = ["the old house", "a small garden", "green river"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TALK = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]


def source(data_files=None, **more) -> TextSource:
    given = {
        "dataset_name": None,
        "dataset_config_name": None,
        "data_files": data_files,
        "split": "train",
        "text_column": "text",
        "max_samples": None,
        "max_length": 64,
        "seed": 0,
    }
    return TextSource(**{**given, **more})


def texts(given: TextSource, directory, tokenizer=None) -> list[str]:
    tokenizer = tokenizer or tiny_tokenizer()
    return [tokenizer.decode(ids) for ids in samples_of(given, tokenizer, directory / "cache")]


def write(directory, suffix: str) -> str:
    path = directory / f"data{suffix}"
    rows = [{"text": text, "other": 1} for text in TEXTS]
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif suffix == ".csv":
        datasets.Dataset.from_list(rows).to_pandas().to_csv(path, index=False)
    elif suffix == ".txt":
        path.write_text("\n\n".join(TEXTS))
    else:
        datasets.Dataset.from_list(rows).to_pandas().to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".csv", ".txt", ".parquet"])
def test_files_are_read_by_their_suffix(suffix, tmp_path):
    assert sorted(texts(source(write(tmp_path, suffix)), tmp_path)) == sorted(TEXTS)


def test_lists_patterns_and_splits(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\nmore of {name}")
    one, two = str(tmp_path / "one.txt"), str(tmp_path / "two.txt")
    assert len(texts(source([one, two]), tmp_path)) == 4
    assert len(texts(source(str(tmp_path / "*.txt")), tmp_path)) == 4
    split = source({"train": one, "more": two}, split="more")
    assert sorted(texts(split, tmp_path)) == ["more of two", "text of two"]
    assert len(texts(source([one, two], split="train[:75%]"), tmp_path)) == 3


def test_a_local_dataset_has_a_name_too(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, ".jsonl")
    assert len(texts(source(dataset_name=str(folder)), tmp_path)) == 3


def test_samples_are_shuffled_cut_and_counted(tmp_path):
    (tmp_path / "data.txt").write_text("\n".join(f"sample {i:02d}\n " for i in range(20)))
    path = str(tmp_path / "data.txt")
    everything = texts(source(path), tmp_path)
    assert sorted(everything) == [f"sample {i:02d}" for i in range(20)]  # blank rows are left out
    assert everything != sorted(everything)
    assert texts(source(path, max_samples=5), tmp_path) == everything[:5]
    assert texts(source(path, seed=1), tmp_path) != everything
    assert texts(source(path, max_length=6), tmp_path) == ["sample"] * 20


@pytest.mark.parametrize("column", ["text", "messages", "conversations"])
def test_conversations_are_rendered(column, tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps({column: TALK}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    given = source(str(tmp_path / "talks.jsonl"))
    assert texts(given, tmp_path, tokenizer) == ["<user>why<assistant>so"]


def test_the_template_writes_special_tokens_itself(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    (tmp_path / "talks.jsonl").write_text(json.dumps({"text": TALK}))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": "words"}))
    talk = texts(source(str(tmp_path / "talks.jsonl")), tmp_path, tokenizer)
    plain = texts(source(str(tmp_path / "plain.jsonl")), tmp_path, tokenizer)
    assert talk == ["<user>why<assistant>so"]
    assert plain == [f"{end}words"]


def refusal(given: TextSource, directory) -> str:
    with pytest.raises(InputError) as caught:
        texts(given, directory)
    return str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    def file(name: str, content: str) -> TextSource:
        (tmp_path / name).write_text(content)
        return source(str(tmp_path / name))

    def message(given: TextSource) -> str:
        return refusal(given, tmp_path)

    other = file("other.jsonl", '{"body": "words", "id": 1}')
    assert "there is no column 'text': found body, id. Set text_column" in message(other)
    assert "no such file. Check data_files" in message(source(str(tmp_path / "none.txt")))
    assert "is a directory" in message(source(str(tmp_path)))
    assert ".pdf is not supported. Use one of .json" in message(file("a.pdf", "x"))
    assert "cannot be read (" in message(file("broken.json", "{not json"))
    assert "cannot be read (" in message(file("fake.parquet", "no parquet"))
    assert "the file is empty" in message(file("empty.jsonl", ""))
    assert "cannot be read (" in message(file("blanks.jsonl", " "))
    assert "no data" in message(file("header.csv", "text"))
    assert "column 'text' has no text" in message(file("blank.txt", "\n \n"))
    assert "holds int, neither text nor" in message(file("number.jsonl", '{"text": 3}'))
    mixed = source([str(tmp_path / "blank.txt"), str(tmp_path / "other.jsonl")])
    assert "files of 2 kinds (json, text)" in message(mixed)
    assert "train_split" in message(source(str(tmp_path / "blank.txt"), split="test"))


def test_conversations_that_cannot_be_rendered_are_named(tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": TALK}))
    assert "has no chat template" in refusal(source(str(tmp_path / "talks.jsonl")), tmp_path)
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": [{"from": "me", "value": "x"}]}))
    assert "no messages with 'role'" in refusal(source(str(tmp_path / "odd.jsonl")), tmp_path)


def test_a_hub_dataset_that_cannot_be_had_is_named(tmp_path):
    message = refusal(source(dataset_name="no-one/nothing-here"), tmp_path)
    assert "no-one/nothing-here: the dataset cannot be had" in message
    assert "give local files as data_files" in message
