import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from onecomp.errors import InputError
from onecomp.export.packing import unpack_columns, unpack_rows
from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.gptq.result import GPTQResult

OUT, IN = 32, 64
ALL_WBITS = [1, 2, 3, 4, 5, 6, 7, 8]


def random_result(
    wbits: int, groupsize: int, *, actorder: bool = False, out: int = OUT, columns: int = IN
) -> GPTQResult:
    generator = torch.Generator().manual_seed(wbits)
    shape = (out, 1) if groupsize == -1 else (columns // groupsize, out)
    zeros = torch.randint(0, 2**wbits, shape, generator=generator)
    zeros.view(-1)[:2] = torch.tensor([0, 2**wbits - 1])
    return GPTQResult(
        wbits=wbits,
        groupsize=groupsize,
        actorder=actorder,
        sym=False,
        qweight=torch.randint(0, 2**wbits, (out, columns), generator=generator, dtype=torch.int32),
        scales=(torch.rand(shape, generator=generator) + 0.01).half(),
        qzeros=zeros.half(),
        perm=torch.randperm(columns, generator=generator) if actorder else None,
    )


def random_linear(*, bias: bool, out: int = OUT, columns: int = IN) -> nn.Linear:
    linear = nn.Linear(columns, out, bias=bias)
    if bias:
        nn.init.normal_(linear.bias, generator=torch.Generator().manual_seed(7))
    return linear


def random_input(dtype: torch.dtype = torch.float32, columns: int = IN) -> torch.Tensor:
    return torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("wbits", ALL_WBITS)
@pytest.mark.parametrize(
    ("groupsize", "actorder"), [(-1, False), (-1, True), (16, False), (16, True)]
)
@pytest.mark.parametrize("pack_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_linear_with_the_dequantized_weight(
    wbits, groupsize, actorder, pack_weights, bias
):
    result = random_result(wbits, groupsize, actorder=actorder)
    linear = random_linear(bias=bias)
    layer = GPTQLinear.from_quantization_result(result, linear, pack_weights)
    x = random_input()
    assert torch.equal(layer(x), functional.linear(x, result.dequantize(), linear.bias))
    assert torch.equal(layer.dequantize(), result.dequantize())


@pytest.mark.parametrize("groupsize", [-1, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_forward_rounds_the_weight_once(groupsize, dtype):
    result = random_result(8, groupsize)
    layer = GPTQLinear.from_quantization_result(result, random_linear(bias=False))
    x = random_input(dtype)
    assert torch.equal(layer(x), functional.linear(x, result.dequantize().to(dtype)))


@pytest.mark.parametrize("groupsize", [-1, 16])
@pytest.mark.parametrize("wbits", [2, 3, 4, 5, 6, 7, 8])
def test_packed_tensors_have_the_layout_of_the_format(wbits, groupsize):
    result = random_result(wbits, groupsize)
    layer = GPTQLinear.from_quantization_result(result, random_linear(bias=True))
    groups = 1 if groupsize == -1 else IN // groupsize
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.packed_state().items()}
    assert shapes == {
        "qweight": (IN * wbits // 32, OUT),
        "qzeros": (groups, OUT * wbits // 32),
        "scales": (groups, OUT),
        "g_idx": (IN,),
        "bias": (OUT,),
    }
    assert torch.equal(unpack_rows(layer.qweight, wbits, IN), result.qweight.T)
    zeros = result.qzeros.T if groupsize == -1 else result.qzeros
    stored = unpack_columns(layer.qzeros, wbits, OUT)
    assert torch.equal(stored, (zeros.int() - 1) % 2**wbits)
    assert (stored[zeros == 0] == 2**wbits - 1).all()
    assert layer.checkpoint_format == "gptq"


@pytest.mark.parametrize(("wbits", "out", "columns"), [(1, 32, 64), (4, 12, 64), (3, 32, 48)])
def test_what_cannot_be_packed_stays_unpacked_with_a_warning(wbits, out, columns, caplog):
    result = random_result(wbits, 16, out=out, columns=columns)
    linear = random_linear(bias=False, out=out, columns=columns)
    layer = GPTQLinear.from_quantization_result(result, linear)
    assert torch.equal(layer.packed_state()["qweight"], result.qweight)
    assert layer.qzeros.shape == (columns // 16, out)
    x = random_input(columns=columns)
    assert torch.equal(layer(x), functional.linear(x, result.dequantize()))
    assert f"{out} x {columns} keeps unpacked {wbits}-bit codes" in caplog.text


@pytest.mark.parametrize("wbits", ALL_WBITS)
@pytest.mark.parametrize("pack_weights", [True, False])
@pytest.mark.parametrize("columns", [32, 64])
def test_saved_state_is_recognised_packed_or_not(wbits, pack_weights, columns):
    result = random_result(wbits, 16, actorder=True, columns=columns)
    linear = random_linear(bias=True, columns=columns)
    layer = GPTQLinear.from_quantization_result(result, linear, pack_weights)
    loaded = GPTQLinear.from_saved_state(layer.packed_state(), wbits=wbits, groupsize=16)
    assert (loaded.in_features, loaded.out_features) == (columns, OUT)
    assert loaded.packed == (pack_weights and wbits > 1)
    assert torch.equal(loaded.dequantize(), result.dequantize())


def test_saved_state_without_group_index_has_groups_of_neighbours():
    result = random_result(4, 16)
    state = GPTQLinear.from_quantization_result(result, random_linear(bias=False)).packed_state()
    del state["g_idx"]
    layer = GPTQLinear.from_saved_state(state, wbits=4, groupsize=16)
    assert torch.equal(layer.dequantize(), result.dequantize())


@pytest.mark.parametrize(
    ("groupsize", "actorder", "needed"), [(16, True, True), (16, False, False), (-1, True, False)]
)
def test_actorder_says_whether_the_group_index_is_needed(groupsize, actorder, needed):
    result = random_result(4, groupsize, actorder=actorder)
    layer = GPTQLinear.from_quantization_result(result, random_linear(bias=False))
    assert layer.actorder == needed


def test_groups_need_not_divide_the_inputs():
    result = random_result(4, 15, columns=60)
    result.groupsize = 16
    linear = random_linear(bias=False, columns=60)
    layer = GPTQLinear.from_quantization_result(result, linear, pack_weights=False)
    assert torch.equal(layer.dequantize(), result.dequantize())


def test_empty_layer_takes_the_tensors_of_a_checkpoint():
    layer = GPTQLinear.from_quantization_result(random_result(4, 16), random_linear(bias=True))
    empty = GPTQLinear(IN, OUT, wbits=4, groupsize=16, bias=True, device="meta")
    assert empty.qweight.is_meta
    empty.load_state_dict(layer.packed_state(), assign=True)
    assert torch.equal(empty(random_input()), layer(random_input()))


def test_copies_do_not_share_scales():
    layer = GPTQLinear.from_quantization_result(random_result(4, 16), random_linear(bias=False))
    twin = copy.deepcopy(layer)
    twin.scales.data.mul_(2)
    assert torch.equal(twin.dequantize(), 2 * layer.dequantize())


@pytest.mark.parametrize("zero", [-1.0, 16.0, 3.5])
def test_zero_points_that_are_no_codes_are_refused(zero):
    result = random_result(4, 16)
    result.qzeros[0, 0] = zero
    with pytest.raises(InputError, match=r"whole numbers from 0 to 15 with wbits=4"):
        GPTQLinear.from_quantization_result(result, random_linear(bias=False))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("scales"), "q_proj: tensor missing in the checkpoint: scales"),
        (lambda state: state.update(weight=torch.ones(1)), "tensor unexpected .*: weight"),
        (
            lambda state: state.update(g_idx=torch.zeros(8, dtype=torch.int32)),
            r"g_idx is torch.int32 of shape \(8,\), but torch.int32 of shape \(64,\) belongs to "
            r"wbits=4 and groupsize=16",
        ),
        (lambda state: state.update(scales=torch.ones(3, OUT)), r"of shape \(3, 32\), but"),
        (
            lambda state: state.update(qweight=state["qweight"].float()),
            r"qweight is torch.float32 of shape",
        ),
    ],
)
def test_unfit_state_is_refused(change, text):
    layer = GPTQLinear.from_quantization_result(random_result(4, 16), random_linear(bias=False))
    state = layer.packed_state()
    change(state)
    with pytest.raises(InputError, match=text):
        GPTQLinear.from_saved_state(state, wbits=4, groupsize=16, name="q_proj")


def test_wrong_width_is_refused():
    layer = GPTQLinear.from_quantization_result(random_result(4, 16), random_linear(bias=False))
    with pytest.raises(InputError, match="belongs to wbits=3"):
        GPTQLinear.from_saved_state(layer.packed_state(), wbits=3, groupsize=16)


@pytest.mark.parametrize("field", ["qweight", "scales", "qzeros", "wbits"])
def test_incomplete_results_are_refused(field):
    result = random_result(4, 16)
    setattr(result, field, None)
    with pytest.raises(InputError, match="GPTQResult: has no"):
        GPTQLinear.from_quantization_result(result, random_linear(bias=False))
