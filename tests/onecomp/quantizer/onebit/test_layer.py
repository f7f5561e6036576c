import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onecomp.errors import InputError
from onecomp.export.bits import pack_bits
from onecomp.export.load import LAYERS
from onecomp.quantizer import Onebit, OnebitResult
from onecomp.quantizer.onebit import OnebitLinear


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(bias: bool) -> tuple[nn.Linear, OnebitResult, OnebitLinear]:
    linear = nn.Linear(20, 13, bias=bias)
    for seed, parameter in enumerate(linear.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed)
    inputs = draw(80, 20, seed=5)
    result = Onebit().quantize_layer(linear, None, inputs.T @ inputs / 40)
    return linear, result, Onebit().create_inference_layer(result, linear)


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_computes_with_the_result(bias):
    linear, result, layer = quantized(bias)
    x = draw(3, 20)
    assert torch.equal(layer.dequantize(), result.dequantize())
    torch.testing.assert_close(layer(x), nn.functional.linear(x, result.dequantize(), linear.bias))


@pytest.mark.parametrize("bias", [False, True])
def test_a_saved_layer_is_the_same_again(bias: bool, tmp_path: Path):
    _, result, layer = quantized(bias)
    save_file(layer.packed_state(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert state["a"].dtype == state["b"].dtype == torch.float16
    assert (state["a"].shape, state["b"].shape) == ((13,), (20,))
    assert torch.equal(state["sign_packed"], pack_bits(result.signs()))
    assert len(state["sign_packed"]) == 33
    again = LAYERS["onebit"].from_checkpoint(state, Onebit().layer_format("layer"), "layer")
    assert torch.equal(again(draw(3, 20)), layer(draw(3, 20)))


def test_tensors_that_do_not_fit_are_refused():
    _, _, layer = quantized(bias=False)
    state, stored = layer.packed_state(), Onebit().layer_format("layer")
    missing = {name: state[name] for name in ("a", "b")}
    with pytest.raises(InputError, match="tensor missing in the checkpoint: sign_packed"):
        OnebitLinear.from_checkpoint(missing, stored, "layer")
    with pytest.raises(InputError, match="tensor unexpected in the checkpoint: c"):
        OnebitLinear.from_checkpoint({**state, "c": state["a"]}, stored, "layer")
    short = {**state, "sign_packed": state["sign_packed"][:-1]}
    text = "of shape (32,), but torch.uint8 of shape (33,) belongs to 13 outputs and 20 inputs."
    with pytest.raises(InputError, match=re.escape(f"layer: sign_packed is torch.uint8 {text}")):
        OnebitLinear.from_checkpoint(short, stored, "layer")
    signs = {**state, "sign_packed": state["sign_packed"].float()}
    with pytest.raises(InputError, match=r"sign_packed is torch\.float32 of shape \(33,\)"):
        OnebitLinear.from_checkpoint(signs, stored, "layer")
