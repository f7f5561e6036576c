"""Opening a model for a plan: directories with and without weights, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from onecomp.errors import ConfigError, InputError
from onecomp.planning.model import PlannedModel
from onecomp.quantizer import GPTQ


def opened(directory: Path, dtype: str = "auto") -> PlannedModel:
    return PlannedModel.open(str(directory), dtype)


def without_weights(directory: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copy(directory / "config.json", target)
    return target


def test_a_directory_without_weights_has_the_same_shapes(tiny_model_dir, tmp_path):
    directory = tiny_model_dir("llama", tie=True)
    bare = opened(without_weights(directory, tmp_path / "bare")).shape(GPTQ(groupsize=32))
    whole = opened(directory).shape(GPTQ(groupsize=32))
    assert bare.kinds == whole.kinds
    assert bare.num_parameters == whole.num_parameters
    assert bare.stored is None
    assert "No weight files" in bare.notes[0]


def test_headers_say_how_weights_are_stored(tiny_model_dir):
    directory = tiny_model_dir("llama", dtype=torch.bfloat16, tie=True)
    shape = opened(directory, "float32").shape(GPTQ(groupsize=32))
    assert shape.dtype_bytes == 4
    assert shape.stored.dtypes == ("BF16",)
    assert shape.stored.num_values == shape.num_parameters
    assert shape.stored.num_bytes == 2 * shape.num_parameters
    assert shape.notes == ()


def test_the_skeleton_is_left_as_it_was(tiny_model_dir):
    model = opened(tiny_model_dir("llama"))
    model.shape(GPTQ(groupsize=32))
    assert {parameter.device.type for parameter in model.skeleton.model.parameters()} == {"meta"}


def test_weights_in_8_bits_are_planned_for_and_named(deepseek_v3):
    notes = opened(deepseek_v3).shape(GPTQ(groupsize=128)).notes
    assert any("stored quantized (fp8): `quantize` refuses them" in note for note in notes)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        opened(tmp_path)
    with pytest.raises(InputError, match="is not a directory, and the Hub has no such model"):
        opened(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        opened(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        opened(tmp_path / "config.json")


def test_a_truncated_weight_file_is_refused(tiny_model_dir, tmp_path):
    directory = without_weights(tiny_model_dir("llama"), tmp_path / "cut")
    content = (tiny_model_dir("llama") / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(InputError, match="truncated or corrupt"):
        opened(directory)


def test_an_unknown_dtype_is_refused(tiny_model_dir):
    with pytest.raises(ConfigError, match="dtype='int3'"):
        opened(tiny_model_dir("llama"), "int3")


def test_values_that_no_model_can_have_are_refused(tiny_model_dir, tmp_path):
    directory = without_weights(tiny_model_dir("llama"), tmp_path / "odd")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    with pytest.raises(InputError, match="config"):
        opened(directory)
