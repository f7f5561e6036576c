import subprocess
import sys

import peft
import pytest
import torch
from every_method import METHODS
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType, get_peft_model
from torch import nn

from onecomp.errors import OneCompError
from onecomp.post_process.lora.adapter import adapters_on_trial
from onecomp.post_process.lora.layers import (
    LoraQuantLinear,
    adapter_layers,
    register_with_peft,
    set_dropout,
)
from onecomp.quantizer.inference import inference_layer


class Pair(nn.Module):
    """A quantized layer and a usual one."""

    def __init__(self, quantized: nn.Module):
        super().__init__()
        self.first, self.second = quantized, nn.Linear(32, 8)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture(params=["gptq", "dbf", "onebit"])
def pair(request) -> Pair:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 32)
    linear.weight.data = torch.randn(32, 32, generator=generator)
    x = torch.randn(64, 32, generator=generator)
    result = METHODS[request.param]().quantize_layer(linear, (x,), x.T @ x)
    return Pair(inference_layer(result, linear))


def config(*targets: str, **more) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **more)


def test_an_adapter_adds_a_scaled_product(pair):
    x, base = torch.randn(3, 32), pair.first
    register_with_peft()
    model = get_peft_model(pair, config("first"))
    layer = model.base_model.model.first
    assert isinstance(layer, LoraQuantLinear)
    assert torch.equal(layer(x), base(x))  # fresh adapters add nothing
    nn.init.normal_(layer.lora_B["default"].weight)
    delta = layer.get_delta_weight("default")
    assert torch.allclose(layer(x), base(x) + x @ delta.T, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(layer(x), base(x))
    layer.set_adapter([])
    assert torch.equal(layer(x), base(x))


def test_gradients_reach_the_adapter_alone(pair):
    register_with_peft()
    model = get_peft_model(pair, config("first"))
    model(torch.randn(3, 32)).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"base_model.model.first.lora_{part}.default.weight" for part in "AB"}


def test_other_layers_are_left_to_peft(pair):
    register_with_peft()
    model = get_peft_model(pair, config("first", "second")).base_model.model
    assert type(model.second) is peft.tuners.lora.Linear
    assert list(adapter_layers(model)) == ["first"]


def test_dropout_is_active_where_it_is_asked_for(pair):
    x = torch.randn(3, 32)
    with adapters_on_trial(pair, {"first": pair.first}, config("first", lora_dropout=0.5), 0):
        nn.init.normal_(pair.first.lora_B["default"].weight)
        pair.eval()
        quiet = pair(x)
        set_dropout(pair, active=True)
        assert not torch.equal(pair(x), quiet)
        assert not pair.training
        set_dropout(pair, active=False)
        assert torch.equal(pair(x), quiet)


def test_merging_is_refused(pair):
    register_with_peft()
    model = get_peft_model(pair, config("first"))
    with pytest.raises(OneCompError, match="cannot be merged into quantized weights"):
        model.merge_and_unload()


def test_variants_are_refused_by_peft(pair):
    register_with_peft()
    with pytest.raises(ValueError, match="variant"):
        get_peft_model(pair, config("first", use_dora=True))


def test_a_peft_without_the_hook_is_named(pair, monkeypatch):
    register_with_peft()
    monkeypatch.delattr(LoraModel, "_create_new_module")
    with pytest.raises(OneCompError, match=r"Install peft 0\.21"):
        get_peft_model(pair, config("first"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks
def test_loading_a_quantized_model_is_enough(quantized, monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORA, LoraModel)
    model = get_peft_model(quantized(), config("q_proj", task_type="CAUSAL_LM"))
    assert len(adapter_layers(model)) == 2


def test_peft_is_not_imported_for_those_who_do_not_use_it():
    code = "import sys, onecomp.export.load; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
