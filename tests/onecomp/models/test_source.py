import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecomp.errors import InputError
from onecomp.models import ModelSource, Skeleton


def copy_of(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target / "model"))


def change_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def open_and_build(directory: Path) -> Skeleton:
    source = ModelSource.open(directory)
    return Skeleton.build(source, source.config.dtype)


def test_a_missing_path_is_refused_with_a_remedy(tmp_path):
    message = f"{tmp_path}/none: is not a directory, and the Hub has no such model or cannot be"
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        ModelSource.open(tmp_path / "none")
    assert str(caught.value).endswith("Check the path, or download the model first.")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"is a file\. Give the model's directory or a Hub id\."):
        ModelSource.open(tmp_path / "model.bin")


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        ModelSource.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "5", "[]", '{"model_type": "unheard-of"}'])
def test_a_configuration_that_cannot_be_read_is_refused(tiny_model_dir, tmp_path, content):
    directory = copy_of(tiny_model_dir(), tmp_path)
    (directory / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read as a model configuration"):
        ModelSource.open(directory)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "big"},
        {"hidden_size": 65},
        {"num_attention_heads": 0},
        {"dtype": "none-such"},
        {"rope_parameters": 5},
        {"layer_types": ["none", "such"]},
        {"quantization_config": 5},
        {"pad_token_id": 1000},
        {"hidden_act": "none"},
        {"dtype": "int8"},
        {"attn_implementation": "flash_attention_9"},
        {"model_type": "t5", "d_model": 32},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::Warning")
def test_values_that_make_no_model_are_refused(tiny_model_dir, tmp_path, values):
    directory = copy_of(tiny_model_dir(), tmp_path)
    change_config(directory, **values)
    message = r"(cannot be read as|describes no causal).* \(\w+: .{5,300}\)\. Correct it, or"
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        open_and_build(directory)


def test_a_model_without_safetensors_is_refused(tiny_model_dir, tmp_path):
    directory = copy_of(tiny_model_dir(), tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds no \.safetensors files"):
        ModelSource.open(directory)


@pytest.mark.parametrize("cut", [10, 2000])
def test_a_truncated_file_is_named(tiny_model_dir, tmp_path, cut):
    directory = copy_of(tiny_model_dir(), tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(InputError, match="is truncated or corrupt") as caught:
        ModelSource.open(directory)
    assert caught.value.subject == str(file)


def test_a_missing_shard_is_named(tiny_model_dir, tmp_path):
    directory = copy_of(tiny_model_dir(max_shard_size="100KB"), tmp_path)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = f"{shard}: is listed in model.safetensors.index.json but missing."
    with pytest.raises(InputError, match=re.escape(message)):
        ModelSource.open(directory)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{broken",
        b"\xff\xfe",
        b"[]",
        b'"weight_map"',
        b"{}",
        b'{"weight_map": ["model.safetensors"]}',
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": ["b"]}}',
    ],
)
def test_a_damaged_index_is_named(tiny_model_dir, tmp_path, content):
    directory = copy_of(tiny_model_dir(max_shard_size="100KB"), tmp_path)
    index = directory / "model.safetensors.index.json"
    index.write_bytes(content)
    message = rf"{index}: is not an index of weight files \(.*\)\. It must be JSON"
    with pytest.raises(InputError, match=message):
        ModelSource.open(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_headers_say_shape_and_dtype(tiny_model_dir, dtype):
    directory = tiny_model_dir(dtype=getattr(torch, dtype), max_shard_size="100KB")
    source = ModelSource.open(directory)
    headers, tensors = source.headers(), source.read(source.tensor_files)
    assert {n: h.shape for n, h in headers.items()} == {n: t.shape for n, t in tensors.items()}
    assert {h.dtype for h in headers.values()} == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}


def test_a_missing_tensor_is_named(tiny_model_dir, tmp_path):
    directory = copy_of(tiny_model_dir(), tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    skeleton = Skeleton.build(ModelSource.open(directory), torch.float32)
    skeleton.load_block(0, torch.device("cpu"))
    message = (
        "has no tensor 'model.layers.1.mlp.up_proj.weight', which its architecture (llama) needs."
    )
    with pytest.raises(InputError, match=re.escape(message)):
        skeleton.load_block(1, torch.device("cpu"))


def test_a_quantized_model_is_refused(tiny_model_dir, tmp_path):
    directory = copy_of(tiny_model_dir(), tmp_path)
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"is already quantized .* Give the original model\."):
        ModelSource.open(directory)


def test_shards_with_an_index_hold_the_same_tensors_as_one_file(tiny_model_dir):
    one, many = (ModelSource.open(tiny_model_dir(max_shard_size=size)) for size in ("1GB", "100KB"))
    assert len(set(one.tensor_files.values())) == 1
    assert len(set(many.tensor_files.values())) > 2
    assert one.tensor_files.keys() == many.tensor_files.keys()
    names = sorted(one.tensor_files)
    expected, found = one.read(names), many.read(names)
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_tensors_are_cast_where_they_are_floating_point(tiny_model_dir, tmp_path):
    directory = copy_of(tiny_model_dir(), tmp_path)
    tensors = {"a": torch.tensor([1.001]), "b": torch.tensor([3])}
    save_file(tensors, directory / "model.safetensors")
    read = ModelSource.open(directory).read(["b", "a"], dtype=torch.bfloat16)
    assert torch.equal(read["a"], tensors["a"].bfloat16())
    assert read["b"].dtype == torch.int64


def test_a_checkpoint_of_the_bare_model_loads(tiny_model_dir, tmp_path):
    directory = copy_of(tiny_model_dir(), tmp_path)
    file = directory / "model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    blocks = [
        Skeleton.build(ModelSource.open(d), torch.float32).load_block(1, torch.device("cpu"))
        for d in (tiny_model_dir(), directory)
    ]
    expected, found = (block.state_dict() for block in blocks)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_the_content_hash_changes_with_a_weight(tiny_model_dir, tmp_path, name):
    directory = copy_of(tiny_model_dir(), tmp_path)
    before = ModelSource.open(directory).content_hash
    assert before == ModelSource.open(tiny_model_dir()).content_hash
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert ModelSource.open(directory).content_hash != before


def test_the_content_hash_changes_with_the_configuration(tiny_model_dir, tmp_path):
    directory = copy_of(tiny_model_dir(), tmp_path)
    before = ModelSource.open(directory).content_hash
    change_config(directory, rms_norm_eps=1e-3)
    assert ModelSource.open(directory).content_hash != before
