import pytest
import torch
from torch import nn

from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.quant_linear import QuantLinear, dense_layers


def small_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    state = {
        "qweight": torch.randint(0, 16, (16, 8), generator=generator, dtype=torch.int32),
        "qzeros": torch.full((2, 16), 7, dtype=torch.int32),
        "scales": torch.rand(2, 16, generator=generator).half(),
        "bias": torch.randn(16, generator=generator),
    }
    layer = GPTQLinear.from_saved_state(state, wbits=4, groupsize=4)
    return nn.Sequential(nn.Sequential(layer), nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_layers_compute_the_same_bits(dtype):
    model = small_model()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = model(x)
    with dense_layers(model, dtype):
        assert type(model[0][0]) is nn.Linear
        assert torch.equal(model(x), expected)


def test_quantized_layers_come_back_also_after_an_error():
    model = small_model()
    layer = model[0][0]
    with pytest.raises(RuntimeError, match="stop"), dense_layers(model, torch.float32):
        raise RuntimeError("stop")
    assert model[0][0] is layer


def test_the_interface_has_no_instances():
    with pytest.raises(TypeError, match=r"adopt.* dequantize.* packed_state.* trainable"):
        QuantLinear()
