import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES

from onecomp.errors import ConfigError, InputError
from onecomp.models import ModelConfig


def test_documented_defaults():
    config = ModelConfig(path="somewhere")
    assert (config.model_id, config.dtype, config.device) == (None, "float16", "auto")
    assert config.has_additional_data() is False


def test_a_model_id_wins_over_a_path():
    assert ModelConfig("hub/model", "somewhere").get_model_id_or_path() == "hub/model"
    assert ModelConfig(path="somewhere").get_model_id_or_path() == "somewhere"


def test_no_model_and_an_unknown_dtype_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        ModelConfig(dtype="float8")
    assert str(caught.value).splitlines() == [
        "ModelConfig: 2 problems",
        "  - neither model_id nor path is given. Give one of them.",
        "  - dtype='float8': must be one of float16, bfloat16, float32 or auto.",
    ]


@pytest.mark.parametrize(
    ("family", "dtype", "expected"),
    [
        ("llama", "float16", torch.float16),
        ("llama", "bfloat16", torch.bfloat16),
        ("llama", "auto", torch.float32),
        ("gemma2", "float16", torch.float16),
        ("gemma3", "float16", torch.bfloat16),
        ("gemma3", "float32", torch.float32),
    ],
)
def test_gemma3_is_never_computed_in_float16(tiny_model_dir, family, dtype, expected):
    assert ModelConfig(path=str(tiny_model_dir(family)), dtype=dtype).torch_dtype == expected


def test_the_device_is_as_asked_for(tiny_model_dir):
    assert ModelConfig("any", device="cpu").get_device() == torch.device("cpu")
    assert ModelConfig("any").get_device().type in {"cpu", "cuda", "mps"}


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_a_device_that_is_none_is_refused(device):
    message = f"device={device!r}: must be auto or a torch device, e.g. cpu or cuda:0."
    with pytest.raises(ConfigError, match=message):
        ModelConfig("any", device=device)
    assert ModelConfig("any", device="cuda:1").get_device() == torch.device("cuda:1")


NO_TOKENIZER = r"has no tokenizer that can be read \(.{10,300}\)\. Put the tokenizer files of"


def without(*names: str) -> Callable[[Path], None]:
    return lambda directory: [(directory / name).unlink() for name in names] and None


def holding(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def other_model(directory: Path) -> None:
    settings = json.loads((directory / "tokenizer.json").read_text())
    settings["model"] = {"type": "unheard-of"}
    (directory / "tokenizer.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "damage",
    [
        without("tokenizer.json"),
        holding("tokenizer.json", b"{"),
        holding("tokenizer.json", b"{}"),
        holding("tokenizer.json", b"[]"),
        holding("tokenizer.json", b"\xff\xfe"),
        other_model,
        holding("tokenizer_config.json", b"{"),
        holding("tokenizer_config.json", b"[]"),
        holding("tokenizer_config.json", b'{"eos_token": 5}'),
        holding("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["a.B", null]}}'),
    ],
)
def test_a_damaged_tokenizer_is_refused(tiny_model_dir, tmp_path, damage):
    directory = Path(shutil.copytree(tiny_model_dir(), tmp_path / "model"))
    damage(directory)
    with pytest.raises(InputError, match=rf"{directory}: {NO_TOKENIZER}"):
        ModelConfig(path=str(directory)).load_tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tokenizer_is_refused_whatever_the_library_makes_up(
    tiny_model_dir, tmp_path, family
):
    directory = Path(shutil.copytree(tiny_model_dir(family), tmp_path / "model"))
    ModelConfig(path=str(directory)).load_tokenizer()
    without("tokenizer.json", "tokenizer_config.json")(directory)
    with pytest.raises(InputError, match=rf"{directory}: {NO_TOKENIZER}"):
        ModelConfig(path=str(directory)).load_tokenizer()


def test_model_and_tokenizer_load(tiny_model_dir):
    config = ModelConfig(path=str(tiny_model_dir()), dtype="float32", device="cpu")
    model, tokenizer = config.load_model(), config.load_tokenizer()
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.pad_token is not None
    assert config.load_config().model_type == "llama"
