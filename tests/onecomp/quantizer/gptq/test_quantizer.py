import copy
import dataclasses
import json
import math
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

from onecomp.errors import ConfigError, LayerError
from onecomp.jobs import quantize_group
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.gptq import GPTQ, GPTQResult
from onecomp.quantizer.result import STATISTICS
from onecomp.quantizer.rtn import RTN
from onecomp.statistics import GroupStatistics


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_rows: int, size: int, seed: int = 0) -> Tensor:
    return draw(num_rows, size, seed=seed) @ draw(size, size, seed=seed + 1)


def linear(in_features: int, out_features: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    return layer.requires_grad_(requires_grad=False)


def same_result(one: GPTQResult, other: GPTQResult) -> bool:
    tensors, others = one.tensors(), other.tensors()
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[k], others[k]) for k in tensors
    )


@pytest.mark.parametrize(
    "quantizer", [GPTQ(), GPTQ(wbits=3, groupsize=64, module_wbits={"a": 2}), GPTQ(name="mine")]
)
def test_replacing_nothing_gives_an_equal_quantizer(quantizer):
    assert dataclasses.replace(quantizer) == quantizer


def test_the_name_says_bits_and_group_size_unless_it_is_given():
    assert GPTQ(wbits=3, groupsize=64).name == "GPTQ_3bit_gs64"
    assert GPTQ(name="mine", q_grid=0).name == "mine"  # no search, so its steps do not matter


def test_a_default_name_follows_the_settings_and_a_given_one_stays():
    quantizer = GPTQ(wbits=4, groupsize=128)
    assert dataclasses.replace(quantizer, wbits=3).name == "GPTQ_3bit_gs128"
    again = dataclasses.replace(dataclasses.replace(quantizer, wbits=3), groupsize=-1)
    assert again == GPTQ(wbits=3)
    sent = pickle.loads(pickle.dumps(copy.deepcopy(quantizer)))
    assert dataclasses.replace(sent, groupsize=64).name == "GPTQ_4bit_gs64"
    assert dataclasses.replace(GPTQ(name="mine"), wbits=3).name == "mine"
    assert dataclasses.replace(quantizer, wbits=3, name="mine").name == "mine"
    assert json.loads(json.dumps(quantizer.name)) == quantizer.name == "GPTQ_4bit_gs128"


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        GPTQ(
            wbits=9,
            groupsize=0,
            mlp_wbits=True,
            mlp_groupsize=-2,
            module_wbits={"layer": 0},
            blocksize=0,
            percdamp=1e-5,
            mse=True,
            q_grid=0,
            q_norm=0.0,
        )
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).splitlines() == [
        "GPTQ: 9 problems",
        "  - wbits=9: must be a whole number from 1 to 8.",
        "  - mlp_wbits=True: must be a whole number from 1 to 8.",
        "  - module_wbits['layer']=0: must be a whole number from 1 to 8.",
        "  - groupsize=0: must be -1 (one group a row) or at least 1.",
        "  - mlp_groupsize=-2: must be -1 (one group a row) or at least 1.",
        "  - blocksize=0: must be a whole number, at least 1.",
        "  - percdamp=1e-05: must be at least 0.000395.",
        "  - q_grid=0: must be a whole number, at least 1.",
        "  - q_norm=0.0: must be above 0.",
    ]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"wbits": "4"}, "wbits='4': must be a whole number from 1 to 8."),
        ({"wbits": True}, "wbits=True: must be a whole number from 1 to 8."),
        ({"groupsize": 1.5}, "groupsize=1.5: must be -1 (one group a row) or at least 1."),
        ({"groupsize": -1.0}, "groupsize=-1.0: must be -1 (one group a row) or at least 1."),
        ({"mlp_groupsize": "8"}, "mlp_groupsize='8': must be -1 (one group a row) or at least 1."),
        ({"percdamp": "x"}, "percdamp='x': must be at least 0.000395."),
        ({"percdamp": None}, "percdamp=None: must be at least 0.000395."),
        ({"percdamp": math.inf}, "percdamp=inf: must be at least 0.000395."),
        ({"blocksize": 12.0}, "blocksize=12.0: must be a whole number, at least 1."),
        ({"mse": True, "q_norm": "2"}, "q_norm='2': must be above 0."),
        ({"mse": True, "q_grid": "600"}, "q_grid='600': must be a whole number, at least 1."),
        ({"module_wbits": ["a"]}, "module_wbits=['a']: must be a dict of bits by layer name."),
        (
            {"module_wbits": {"a": "4"}},
            "module_wbits['a']='4': must be a whole number from 1 to 8.",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_a_problem_like_one_out_of_range(settings, problem):
    quantizer = GPTQ()
    vars(quantizer).update(settings)  # by a constructor the tests' type checks would be first
    with pytest.raises(ConfigError, match=f"^GPTQ: {re.escape(problem)}$"):
        quantizer.validate_params()


def test_bits_come_from_the_layer_then_the_mlp_then_the_default():
    bits = {"mlp_bits": 3, "module_bits": {"layers.0.mlp.up_proj": 8}}
    assert GPTQ.resolve_bits("layers.0.mlp.up_proj", 4, **bits) == 8
    assert GPTQ.resolve_bits("layers.1.mlp.up_proj", 4, **bits) == 3
    assert GPTQ.resolve_bits("layers.1.self_attn.q_proj", 4, **bits) == 4
    assert GPTQ.resolve_bits(None, 4, **bits) == 4
    assert GPTQ.resolve_bits("layers.1.mlp.up_proj", 4) == 4


def test_group_size_comes_from_the_mlp_then_the_default():
    assert GPTQ.resolve_groupsize("layers.1.mlp.up_proj", 64, 32) == 32
    assert GPTQ.resolve_groupsize("layers.1.self_attn.q_proj", 64, 32) == 64
    assert GPTQ.resolve_groupsize("layers.1.mlp.up_proj", 64) == 64
    assert GPTQ.resolve_groupsize(None, 64, 32) == 64


@pytest.mark.parametrize(
    ("in_features", "remedy"),
    [(11008, "128 or 64 or 32"), (320, "64 or 32"), (100, "-1")],
)
def test_a_group_size_that_does_not_divide_names_the_layer_and_sizes_that_do(in_features, remedy):
    quantizer = GPTQ(groupsize=96)
    message = (
        f"layers.0.mlp.down_proj: groupsize=96 must divide in_features, but layers.0.mlp.down_proj "
        f"has in_features={in_features} ({in_features} % 96 = {in_features % 96}). "
        f"Use groupsize={remedy}, or exclude the layer with exclude_layer_names."
    )
    module = linear(in_features, 2)
    quantizer.module_to_name = {module: "layers.0.mlp.down_proj"}
    with pytest.raises(LayerError, match=f"^{re.escape(message)}$"):
        quantizer.quantize_layer(module, hessian=torch.eye(in_features))


def test_neither_input_nor_hessian_is_refused():
    with pytest.raises(LayerError, match=r"^the layer: GPTQ needs its input or its Hessian\.$"):
        GPTQ().quantize_layer(linear(8, 2))


def test_layers_of_a_group_get_their_own_bits_and_keep_their_order():
    weights = {name: draw(6, 32, seed=i) for i, name in enumerate(["a.q", "a.mlp.up", "a.k"])}
    quantizer = GPTQ(groupsize=16, mlp_wbits=2, mlp_groupsize=8, module_wbits={"a.k": 8})
    statistics = GroupStatistics.of(correlated(200, 32), None)
    results, _ = quantize_group(quantizer, weights, statistics, None)
    assert list(results) == list(weights)
    assert {n: (r.wbits, r.groupsize) for n, r in results.items()} == {
        "a.q": (4, 16),
        "a.mlp.up": (2, 8),
        "a.k": (8, 16),
    }
    assert all(int(r.qweight.max()) < 2**r.wbits for r in results.values())


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_layers_quantized_together_equal_layers_quantized_alone(actorder, mse):
    weights = {name: draw(rows, 48, seed=rows) for name, rows in [("q", 16), ("k", 5), ("v", 1)]}
    quantizer = GPTQ(groupsize=16, actorder=actorder, mse=mse, q_grid=50)
    statistics = GroupStatistics.of(correlated(200, 48), None)
    together, _ = quantize_group(quantizer, weights, statistics, None)
    for name, weight in weights.items():
        alone, _ = quantize_group(quantizer, {name: weight}, statistics, None)
        assert same_result(alone[name], together[name])


@pytest.mark.parametrize("groupsize", [-1, 16])
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_what_is_stored_is_what_was_solved_with(groupsize, actorder, static_groups, sym):
    """The error that the solver saw is the error of the stored codes and float16 scales."""
    weight, hessian = draw(12, 48), GroupStatistics.of(correlated(200, 48), None).hessian()
    quantizer = GPTQ(groupsize=groupsize, actorder=actorder, static_groups=static_groups, sym=sym)
    factors = HessianFactors(hessian)
    result = quantizer.quantize_weights({"layer": weight}, factors)["layer"]
    off = (weight - result.dequantize()).double()
    relative = ((off @ hessian.double()) * off).sum() / (
        (weight.double() @ hessian.double()) * weight.double()
    ).sum()
    assert result.relative_output_squared_error == pytest.approx(relative.item(), rel=1e-4)
    assert (result.qweight.dtype, result.scales.dtype, result.qzeros.dtype) == (
        torch.int32,
        torch.float16,
        torch.float16,
    )
    assert result.scales.shape == ((12, 1) if groupsize == -1 else (3, 12))
    assert (result.perm is not None) == (actorder and not static_groups)


def test_with_one_group_a_row_the_order_of_solving_is_kept_and_nothing_depends_on_it():
    layer, rows = linear(64, 32), correlated(200, 64)
    quantizer = GPTQ(actorder=True)
    result = quantizer.quantize_layer(layer, rows)
    energies = rows.square().sum(dim=0)[result.perm]
    assert (energies[:-1] >= energies[1:] * (1 - 1e-5)).all()
    assert not torch.equal(result.perm, torch.arange(64))
    without = dataclasses.replace(result, perm=None)
    assert torch.equal(result.dequantize(), without.dequantize())
    stored, expected = (
        quantizer.create_inference_layer(r, layer).packed_state() for r in (result, without)
    )
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert not stored["g_idx"].any()


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("groupsize", [-1, 16])
@pytest.mark.parametrize("mlp_groupsize", [None, -1, 8])
def test_the_config_says_whether_a_layer_needs_its_group_index(
    actorder, static_groups, groupsize, mlp_groupsize
):
    quantizer = GPTQ(
        groupsize=groupsize,
        mlp_groupsize=mlp_groupsize,
        actorder=actorder,
        static_groups=static_groups,
    )
    factors = HessianFactors(GroupStatistics.of(correlated(200, 32), None).hessian())
    weights = {name: draw(32, 32) for name in ("self_attn.q_proj", "mlp.up_proj")}
    results = quantizer.quantize_weights(weights, factors).values()
    layers = [quantizer.create_inference_layer(r, linear(32, 32)) for r in results]
    config = quantizer.get_quant_config()
    assert config["desc_act"] == config["actorder"] == any(layer.actorder for layer in layers)


def test_a_hessian_that_is_not_positive_definite_gets_more_damping_and_says_so():
    """An eigenvalue of -0.05: the damping asked for is too little, ten times as much enough."""
    hessian = torch.diag(torch.tensor([-0.05, *[1.0] * 15]))
    factors = HessianFactors(hessian)
    GPTQ().quantize_weights({"layer": draw(3, 16)}, factors)
    assert factors.fallbacks[0] == "percdamp 0.01 -> 0.1 in torch.float32"


@pytest.mark.parametrize("groupsize", [-1, 4])
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
def test_an_indefinite_hessian_is_rounded_to_nearest_and_says_so(
    groupsize, actorder, static_groups
):
    weight, hessian = draw(3, 16), torch.diag(torch.tensor([-100.0, *range(1, 16)]))
    quantizer = GPTQ(groupsize=groupsize, actorder=actorder, static_groups=static_groups)
    factors = HessianFactors(hessian)
    result = quantizer.quantize_weights({"layer": weight}, factors)["layer"]
    assert factors.fallbacks[0].startswith("round to nearest: The Hessian is not positive definite")
    rounded = RTN(groupsize=groupsize, sym=True).quantize_weights({"layer": weight}, None)["layer"]
    assert torch.equal(result.dequantize(), rounded.dequantize())


def test_rows_that_rounding_serves_better_are_rounded_and_counted():
    """Damping a hundred times the Hessian's own size makes GPTQ solve another problem."""
    weight = draw(200, 32)
    statistics = GroupStatistics.of(correlated(200, 32), None)
    hessian = statistics.hessian()
    results, [fallback] = quantize_group(
        GPTQ(wbits=2, percdamp=100.0), {"layer": weight}, statistics, None
    )
    result = results["layer"]
    steps = (weight / result.scales.float()).round() + result.qzeros.float()
    nearest = steps.clamp(0, 3).int()
    [replaced] = re.findall(r"^round to nearest: (\d+) of 200 rows$", fallback)
    assert 0 < int(replaced) <= (result.qweight == nearest).all(dim=1).sum() < 200

    def row_errors(codes: Tensor) -> Tensor:
        off = (weight - (codes - result.qzeros.float()) * result.scales.float()).double()
        return ((off @ hessian.double()) * off).sum(dim=1)

    assert (row_errors(result.qweight) <= row_errors(nearest) * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(60,), (3, 20)])
def test_the_hook_quantizes_a_live_layer_and_fills_every_error_field(shape):
    model = nn.Sequential(linear(32, 8))
    before = model[0].weight.clone()
    quantizer = GPTQ(groupsize=16, calc_quant_error=True)
    quantizer.setup(model)
    inputs = correlated(60, 32).reshape(*shape, 32)
    handle = model[0].register_forward_hook(quantizer.quantize)
    model(inputs)
    handle.remove()
    result = quantizer.results["0"]
    assert torch.equal(model[0].weight, before)
    assert list(result.get_statistics()) == list(STATISTICS)
    assert None not in result.get_statistics().values()
    rows = inputs.reshape(-1, 32).double()
    off, exact = before.double() - result.dequantize().double(), before.double()
    error = (rows @ off.T).square().sum().item()
    assert result.output_squared_error == pytest.approx(error, rel=1e-4)
    assert result.mean_output_squared_error == pytest.approx(error / (60 * 8), rel=1e-4)
    energy = (rows @ exact.T).square().sum().item()
    assert result.relative_output_squared_error == pytest.approx(error / energy, rel=1e-4)
    assert result.weight_squared_error == pytest.approx(off.square().sum().item(), rel=1e-5)
    assert result.mean_weight_squared_error == pytest.approx(off.square().mean().item(), rel=1e-5)
    relative = off.square().sum().item() / exact.square().sum().item()
    assert result.relative_weight_squared_error == pytest.approx(relative, rel=1e-5)
    quantizer.execute_post_processing()
    assert quantizer.module_to_name == {}
    assert set(quantizer.results) == {"0"}


@pytest.mark.parametrize("perccorr", [0.5, 1.0])
def test_error_propagation_is_the_exact_formula(perccorr):
    """W' = W + perccorr * W C (H + λI)⁻¹ with H = 2/T X̂ᵀX̂ and C = 2/T (X - X̂)ᵀX̂."""
    layer = linear(32, 8)
    weight = layer.weight.double()
    original = correlated(400, 32)
    quantized = original + 2 * draw(400, 32, seed=5)
    hessian = 2 / 400 * quantized.double().T @ quantized.double()
    delta = 2 / 400 * (original.double() - quantized.double()).T @ quantized.double()
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(32)
    expected = weight + perccorr * weight @ delta @ torch.linalg.inv(damped)
    quantizer = GPTQ(wbits=8)
    quantizer.setup(nn.Sequential(layer))
    quantizer.quantize_with_qep(layer, quantized, original, percdamp=0.02, perccorr=perccorr)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert (layer.weight.double() - weight).abs().max() > 0.02  # the correction is there to be seen
    plain = GPTQ(wbits=8).quantize_layer(layer, quantized)
    assert same_result(quantizer.results["0"], plain)


@pytest.mark.parametrize("original", [None, draw(100, 32, seed=3)])
def test_without_correction_the_weight_stays(original):
    layer = linear(32, 8)
    before = layer.weight.clone()
    quantizer = GPTQ()
    perccorr = 0.5 if original is None else 0.0
    quantizer.quantize_with_qep(layer, correlated(100, 32), original, perccorr=perccorr)
    assert torch.equal(layer.weight, before)


def test_sums_given_by_the_caller_replace_those_of_the_inputs():
    original, quantized = correlated(100, 32), correlated(100, 32, seed=7)
    statistics = GroupStatistics.of(quantized, original)
    layers = linear(32, 8), linear(32, 8)
    GPTQ().quantize_with_qep(layers[0], quantized, original)
    given = {"hessian": statistics.hessian(), "delta_hatX": statistics.delta()}
    GPTQ().quantize_with_qep(layers[1], torch.zeros(1, 32), None, **given)
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("calc_quant_error", [False, True])
def test_sums_are_enough_for_error_propagation(calc_quant_error):
    original, quantized = correlated(100, 32), correlated(100, 32, seed=7)
    statistics = GroupStatistics.of(quantized, original)
    given = {"hessian": statistics.hessian(), "delta_hatX": statistics.delta()}
    layers = linear(32, 8), linear(32, 8)
    quantizers = GPTQ(), GPTQ(calc_quant_error=calc_quant_error)
    quantizers[0].quantize_with_qep(layers[0], quantized, original)
    quantizers[1].quantize_with_qep(layers[1], None, **given)
    assert torch.equal(layers[0].weight, layers[1].weight)
    [expected], [result] = (quantizer.results.values() for quantizer in quantizers)
    assert same_result(result, expected)
    assert (result.weight_squared_error is not None) == calc_quant_error
    assert result.output_squared_error is None


@pytest.mark.parametrize(
    "given", [{}, {"hessian": torch.eye(32), "original_input_activation": draw(4, 32)}]
)
def test_what_cannot_be_computed_without_the_input_is_refused(given):
    message = (
        "the layer: quant_input_activation=None: give it, or hessian and delta_hatX in its place."
    )
    with pytest.raises(LayerError, match=f"^{re.escape(message)}$"):
        GPTQ().quantize_with_qep(linear(32, 8), None, **given)


def test_a_hessian_alone_is_quantized_without_correction():
    layer, hessian = linear(32, 8), GroupStatistics.of(correlated(100, 32), None).hessian()
    before, quantizer = layer.weight.clone(), GPTQ()
    quantizer.quantize_with_qep(layer, None, hessian=hessian)
    assert torch.equal(layer.weight, before)
    [result] = quantizer.results.values()
    assert same_result(result, GPTQ().quantize_layer(layer, None, hessian))


def test_weighted_range_search_lowers_the_output_error_when_columns_differ_in_activation():
    rows = correlated(400, 64) * torch.logspace(-2, 1, 64)
    factors = HessianFactors(2 / len(rows) * rows.T @ rows)
    weights = {"layer": draw(32, 64, seed=3)}
    settings = {"wbits": 3, "groupsize": 32, "mse": True, "static_groups": True}
    errors = [
        GPTQ(**settings, weighted_mse=weighted)
        .quantize_weights(weights, factors)["layer"]
        .relative_output_squared_error
        for weighted in (False, True)
    ]
    assert errors[1] < errors[0]
