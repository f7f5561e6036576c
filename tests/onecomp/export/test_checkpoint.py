import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from onecomp.errors import InputError
from onecomp.export.checkpoint import finish_checkpoint, write_json, write_shard
from onecomp.storage import replacing

TENSORS = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor([1, -2], dtype=torch.int32)}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def break_off(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")


def tokenizer_with_bos():
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_shard_keeps_values_and_leaves_nothing_else(tmp_path):
    write_shard(tmp_path / "new", "model.safetensors", TENSORS)
    loaded = load_file(tmp_path / "new/model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert names(tmp_path / "new") == {"model.safetensors"}


def test_same_tensors_give_the_same_bytes_in_any_order(tmp_path):
    write_shard(tmp_path, "one", TENSORS)
    write_shard(tmp_path, "two", dict(reversed(TENSORS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_metadata_is_written_in_the_order_of_its_names(tmp_path):
    metadata = {str(i): f"é{i}" for i in reversed(range(20))}
    write_shard(tmp_path, "x", TENSORS, metadata)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), TENSORS["b"])
    text = (tmp_path / "x").read_bytes().decode(errors="replace")
    places = [text.index(f'"{name}"') for name in sorted(metadata)]
    assert places == sorted(places)


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"new": object()})
    with pytest.raises(OSError, match="disk"):
        break_off(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
    assert names(tmp_path) == {"x.json"}


def test_a_single_model_file_needs_no_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    write_shard(tmp_path, "model.safetensors", TENSORS)
    finish_checkpoint(tmp_path, ["model.safetensors"], {"z": 1, "a": 2})
    assert names(tmp_path) == {"model.safetensors", "config.json"}
    assert (tmp_path / "config.json").read_text() == '{\n  "a": 2,\n  "z": 1\n}\n'


def test_index_maps_every_tensor_and_counts_bytes(tmp_path):
    write_shard(tmp_path, "s2.safetensors", {"b": TENSORS["b"]})
    write_shard(tmp_path, "s1.safetensors", {"a": TENSORS["a"]})
    finish_checkpoint(tmp_path, ["s2.safetensors", "s1.safetensors"], {})
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 6 * 4 + 2 * 4},
        "weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"},
    }


def test_weights_that_would_hide_the_shards_are_refused(tmp_path):
    write_shard(tmp_path, "model.safetensors", TENSORS)
    write_shard(tmp_path, "s1.safetensors", TENSORS)
    with pytest.raises(InputError, match=r"model\.safetensors: is not part of this checkpoint"):
        finish_checkpoint(tmp_path, ["s1.safetensors"], {})
    assert not (tmp_path / "config.json").exists()


def test_auxiliary_files_of_the_source_come_along_once(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    copied = {"generation_config.json", "chat_template.jinja", "tokenizer.model", "merges.txt"}
    left = {
        "config.json",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "modeling.py",
        "README.md",
    }
    for name in copied | left:
        (source / name).write_text("source")
    write_shard(target, "model.safetensors", TENSORS)
    (target / "merges.txt").write_text("own")
    finish_checkpoint(target, ["model.safetensors"], {}, source)
    assert names(target) == copied | {"model.safetensors", "config.json"}
    assert (target / "merges.txt").read_text() == "own"
    finish_checkpoint(target, ["model.safetensors"], {"auto_map": {}}, source)
    assert (target / "modeling.py").read_text() == "source"


def test_bos_is_declared_only_where_the_tokenizer_puts_it(tmp_path):
    for tokenizer, declared in ((tokenizer_with_bos(), True), (tiny_tokenizer(), None)):
        expected = tokenizer("some text").input_ids
        directory = tmp_path / str(declared)
        write_shard(directory, "model.safetensors", TENSORS)
        finish_checkpoint(directory, ["model.safetensors"], {}, tokenizer=tokenizer)
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        assert settings.get("add_bos_token") is declared
        assert AutoTokenizer.from_pretrained(directory)("some text").input_ids == expected
