import pytest
import torch

from onecomp.errors import ConfigError
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


def test_model_and_tokenizer_load(tiny_model_dir):
    config = ModelConfig(path=str(tiny_model_dir()), dtype="float32", device="cpu")
    model, tokenizer = config.load_model(), config.load_tokenizer()
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.pad_token is not None
    assert config.load_config().model_type == "llama"
