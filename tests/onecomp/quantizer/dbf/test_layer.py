"""The packed format, the layer, and that both compute what the result says."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onecomp.errors import InputError
from onecomp.export.bits import pack_bits
from onecomp.export.quant_config import dbf_format
from onecomp.quantizer.dbf import DBFResult, DoubleBinaryLinear
from onecomp.quantizer.inference import inference_layer

OUT, RANK, IN = 12, 5, 9
BITS = 0.98
"""Which gives a rank of 5."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_result(*, packed: bool) -> DBFResult:
    left, right = draw(OUT, RANK).sign(), draw(RANK, IN, seed=1).sign()
    return DBFResult(
        target_bits=BITS,
        is_dbf_quantized=True,
        dbf_Da=(draw(OUT, seed=2).abs() + 0.1).half(),
        dbf_A=pack_bits(left) if packed else left.half(),
        dbf_mid=(draw(RANK, seed=3).abs() + 0.1).half(),
        dbf_B=pack_bits(right) if packed else right.half(),
        dbf_Db=(draw(IN, seed=4).abs() + 0.1).half(),
        dbf_A_is_packed=packed,
        dbf_B_is_packed=packed,
        dbf_A_original_shape=[OUT, RANK] if packed else None,
        dbf_B_original_shape=[RANK, IN] if packed else None,
    )


@pytest.mark.parametrize("packed", [True, False])
def test_the_weight_is_the_product_of_the_five_factors(packed):
    result = random_result(packed=packed)
    left, right = draw(OUT, RANK).sign(), draw(RANK, IN, seed=1).sign()
    expected = torch.zeros(OUT, IN)
    for i in range(OUT):
        for j in range(IN):
            inner = sum(left[i, p] * result.dbf_mid[p].float() * right[p, j] for p in range(RANK))
            expected[i, j] = result.dbf_Da[i].float() * inner * result.dbf_Db[j].float()
    torch.testing.assert_close(result.dequantize(), expected)
    half = result.compute_dequantized_weight()
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, expected.half())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_the_formula(packed, bias):
    result, linear = random_result(packed=packed), nn.Linear(IN, OUT, bias=bias)
    layer = inference_layer(result, linear)
    assert isinstance(layer, DoubleBinaryLinear)
    assert torch.equal(layer.dequantize(), result.dequantize())
    x = draw(2, 3, IN, seed=5)
    assert torch.equal(layer(x), functional.linear(x, result.dequantize(), linear.bias))
    through = (x * layer.scaling0) @ layer.right_signs().T * layer.scaling2
    through = through @ layer.left_signs().T * layer.scaling4
    torch.testing.assert_close(layer(x), through if linear.bias is None else through + linear.bias)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_tensors_have_the_names_types_and_sizes_of_the_format():
    state = inference_layer(random_result(packed=True), nn.Linear(IN, OUT)).packed_state()
    kinds = {name: (tuple(t.shape), t.dtype) for name, t in state.items() if name != "bias"}
    assert kinds == {
        "scaling0": ((IN,), torch.float16),
        "bp1": ((6,), torch.uint8),
        "scaling2": ((RANK,), torch.float16),
        "bp3": ((8,), torch.uint8),
        "scaling4": ((OUT,), torch.float16),
    }
    assert state["bias"].shape == (OUT,)


def saved_state() -> dict[str, Tensor]:
    linear = nn.Linear(IN, OUT, bias=False)
    return inference_layer(random_result(packed=True), linear).packed_state()


def test_saved_tensors_make_the_same_layer():
    state = saved_state()
    layer = DoubleBinaryLinear.from_checkpoint(state, dbf_format(BITS, {}), "x")
    assert torch.equal(layer.dequantize(), random_result(packed=True).dequantize())
    assert layer.bp1.data_ptr() == state["bp1"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling2": None}, "tensor missing in the checkpoint: scaling2"),
        ({"qweight": torch.zeros(1)}, "tensor unexpected in the checkpoint: qweight"),
        ({"bp1": torch.zeros(5, dtype=torch.uint8)}, r"bp1 is torch.uint8 of shape \(5,\)"),
        ({"bp3": torch.zeros(8)}, r"bp3 is torch.float32 of shape \(8,\)"),
        ({"bias": torch.zeros(3)}, r"bias is torch.float32 of shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    state = {k: v for k, v in (saved_state() | change).items() if v is not None}
    with pytest.raises(InputError, match=rf"^the layer:? {message}"):
        DoubleBinaryLinear.from_saved_state(state, "the layer")


def test_a_rank_that_does_not_follow_from_the_bits_is_refused():
    with pytest.raises(InputError, match=r"scaling2 has 5 entries, but bits=1.5 gives .* of 7\."):
        DoubleBinaryLinear.from_checkpoint(saved_state(), dbf_format(1.5, {}), "x")


@pytest.mark.parametrize("name", ["dbf_Da", "dbf_A", "dbf_mid", "dbf_B", "dbf_Db"])
def test_a_result_without_a_factor_says_which(name):
    result = random_result(packed=False)
    setattr(result, name, None)
    with pytest.raises(ValueError, match=rf"^DBFResult has no {name}\. Quantize"):
        result.compute_dequantized_weight()
    with pytest.raises(ValueError, match=name):
        inference_layer(result, nn.Linear(IN, OUT))
