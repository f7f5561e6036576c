import dataclasses

import pytest
import torch
from torch import Tensor, nn

from onecomp.errors import ConfigError, LayerError
from onecomp.jobs import quantize_group
from onecomp.linalg import quadratic_form
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, QUIP, QUIPResult
from onecomp.quantizer.baseline import nearest_weight
from onecomp.quantizer.factors import HessianFactors
from onecomp.statistics import GroupStatistics

NAME = "model.layers.0.mlp.down_proj"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_rows: int, size: int, seed: int = 0) -> Tensor:
    return draw(num_rows, size, seed=seed) @ draw(size, size, seed=seed + 1)


def hessian_of(inputs: Tensor) -> Tensor:
    return 2 / len(inputs) * inputs.T @ inputs


def weight_like_a_models(out_features: int, in_features: int) -> Tensor:
    """Rows and columns of different size, and a few weights that stand out."""
    weight = draw(out_features, in_features, seed=5) * draw(in_features, seed=6).exp()
    weight[::7, ::11] *= 6
    return weight


def solve(weight: Tensor, hessian: Tensor, **settings: object) -> tuple[QUIPResult, HessianFactors]:
    factors = HessianFactors(hessian, num_tokens=100)
    return QUIP(**settings).quantize_weights({NAME: weight}, factors)[NAME], factors


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    return quadratic_form((weight - other).T.double(), hessian.double()).sum().item()


def rounding_error(weight: Tensor, hessian: Tensor, wbits: int) -> float:
    return min(
        output_error(weight, nearest_weight(weight, wbits=wbits, sym=sym), hessian)
        for sym in (False, True)
    )


def same_result(one: QUIPResult, other: QUIPResult) -> bool:
    tensors, others = one.tensors(), other.tensors()
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[k], others[k]) for k in tensors
    )


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        QUIP(wbits=9, percdamp=0.0, incoh_mode="dct", seed=-1, greedy_passes=-1)
    assert list(caught.value.problems) == [
        "wbits=9: must be a whole number from 1 to 8.",
        "percdamp=0.0: must be above 0; 0.01 is usual.",
        "incoh_mode='dct': must be 'kron' or 'had'.",
        "seed=-1: must be a whole number from 0 to 2**62.",
        "greedy_passes=-1: must be a whole number, at least 0.",
    ]


def test_the_name_says_bits_and_mode_and_replacing_nothing_changes_nothing():
    assert QUIP(wbits=3, incoh_mode="had").name == "QUIP_3bit_had"
    assert dataclasses.replace(QUIP(seed=3)) == QUIP(seed=3)


@pytest.mark.parametrize(("in_features", "out_features"), [(576, 512), (512, 576)])
def test_hadamard_refuses_other_sizes_than_powers_of_two(in_features, out_features):
    [problem] = QUIP(incoh_mode="had").layer_problems(NAME, in_features, out_features)
    key = "in_features" if in_features == 576 else "out_features"
    assert problem == (
        f'incoh_mode="had" needs sizes that are powers of two, but {NAME} has {key}=576. '
        'Use "kron", or exclude the layer with exclude_layer_names.'
    )
    assert not QUIP(incoh_mode="kron").layer_problems(NAME, in_features, out_features)
    assert not QUIP(incoh_mode="had").layer_problems(NAME, 512, 4096)


def test_sizes_with_a_large_prime_are_refused():
    [problem] = QUIP().layer_problems(NAME, 64, 2 * 10007)
    assert "a matrix of 10007 columns is too large" in problem
    assert "out_features=20014" in problem
    assert not QUIP().layer_problems(NAME, 18944, 28672)


def test_a_single_layer_of_a_wrong_size_is_refused():
    layer = nn.Linear(24, 16, bias=False)
    with pytest.raises(LayerError, match="powers of two"):
        QUIP(incoh_mode="had").quantize_layer(layer, None, torch.eye(24))


@pytest.mark.parametrize("wbits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mode", ["kron", "had"])
@pytest.mark.parametrize("row_scale", [False, True])
def test_it_is_better_than_plain_rounding(wbits, mode, row_scale):
    weight, hessian = weight_like_a_models(64, 32), hessian_of(correlated(300, 32))
    result, factors = solve(weight, hessian, wbits=wbits, incoh_mode=mode, row_scale=row_scale)
    assert result.incoh_mode == mode
    assert not factors.fallbacks
    found = output_error(weight, result.dequantize(), hessian)
    assert found < 0.9 * rounding_error(weight, hessian, wbits)
    error, _ = factors.row_errors[NAME].double().sum(dim=1).tolist()
    assert error == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("wbits", [2, 4])
def test_it_is_better_than_gptq_on_weights_that_stand_out(wbits):
    weight, hessian = weight_like_a_models(96, 72), hessian_of(correlated(300, 72))
    result, _ = solve(weight, hessian, wbits=wbits)
    gptq = GPTQ(wbits=wbits, mse=True, actorder=True)
    other = gptq.quantize_weights({NAME: weight}, HessianFactors(hessian))[NAME]
    found = output_error(weight, result.dequantize(), hessian)
    assert found < 0.8 * output_error(weight, other.dequantize(), hessian)


def test_greedy_passes_lower_the_error_further():
    weight, hessian = weight_like_a_models(64, 48), hessian_of(correlated(300, 48))
    errors = []
    for passes in (0, 1, 3):
        result, _ = solve(weight, hessian, wbits=2, greedy_passes=passes)
        errors.append(output_error(weight, result.dequantize(), hessian))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("wbits", [2, 3, 4])
@pytest.mark.parametrize("mode", ["kron", "had"])
def test_the_weight_follows_from_what_a_file_keeps(tmp_path, wbits, mode):
    """Codes, grid and transforms are stored, no weight; the seed is not needed again."""
    weight, hessian = weight_like_a_models(64, 32), hessian_of(correlated(300, 32))
    result, _ = solve(weight, hessian, wbits=wbits, incoh_mode=mode, seed=7)
    quantizer = QUIP()
    quantizer.results = {NAME: result}
    quantizer.save_results(tmp_path / "results.pt")
    restored = QUIP(seed=1).load_results(tmp_path / "results.pt")[NAME]
    assert restored.dequantized_weight is None
    assert same_result(restored, result)
    assert torch.equal(restored.dequantize(), result.dequantize())
    assert restored.codes().min() >= 0
    assert restored.codes().max() < 2**wbits


@pytest.mark.parametrize("wbits", range(1, 9))
@pytest.mark.parametrize("shape", [(5, 7), (64, 32)])
def test_codes_are_packed_and_come_back(wbits, shape):
    codes = (draw(*shape) * 2**wbits).int() % 2**wbits
    scale, zero = draw(shape[0], 1), torch.ones(shape[0], 1)
    result = QUIPResult.from_codes(codes, scale, zero, wbits)
    assert torch.equal(result.codes(), codes)
    assert torch.equal(result.dequantize(), (codes - zero) * scale)


@pytest.mark.parametrize("wbits", [2, 3, 4])
def test_stored_bits_are_those_of_the_codes_and_little_more(wbits):
    """Beside the codes: 32 bits a row for its scale and 8 for its sign, 16 a column."""
    weight, hessian = weight_like_a_models(64, 96), hessian_of(correlated(300, 96))
    result, _ = solve(weight, hessian, wbits=wbits)
    assert result.bits_per_weight == pytest.approx(wbits + 40 / 96 + 16 / 64, abs=0.01)


@pytest.mark.parametrize("row_scale", [True, False])
def test_bits_that_are_planned_for_are_those_that_are_stored(row_scale):
    weight, hessian = weight_like_a_models(64, 96), hessian_of(correlated(300, 96))
    quantizer = QUIP(wbits=3, row_scale=row_scale)
    result, _ = solve(weight, hessian, wbits=3, row_scale=row_scale)
    assert result.incoh_mode == "kron"
    assert quantizer.bits_per_weight("layer", 96, 64) == pytest.approx(result.bits_per_weight)
    assert quantizer.bits_per_weight("layer", 96, 64, wbits=2.5) == pytest.approx(
        result.bits_per_weight - 0.5
    )


def test_bits_follow_from_the_seed_and_not_from_other_random_numbers():
    weight, hessian = weight_like_a_models(64, 32), hessian_of(correlated(300, 32))
    first, _ = solve(weight, hessian)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        again, _ = solve(weight, hessian)
        state = torch.get_rng_state()
        other, _ = solve(weight, hessian, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
    assert same_result(first, again)
    assert not torch.equal(first.packed_codes, other.packed_codes)


def test_layers_of_a_group_are_solved_as_if_alone():
    weights = {"a": weight_like_a_models(24, 32), "b": draw(48, 32)}
    hessian = hessian_of(correlated(300, 32))
    together = QUIP().quantize_weights(weights, HessianFactors(hessian))
    for name, weight in weights.items():
        assert same_result(together[name], solve(weight, hessian)[0])


def test_the_arguments_stay_as_they_are():
    weight, hessian = weight_like_a_models(24, 32), hessian_of(correlated(300, 32))
    hessian[3], hessian[:, 3] = 0, 0
    kept = weight.clone(), hessian.clone()
    solve(weight, hessian)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_columns_without_tokens_keep_ordinary_weights():
    """Their weights are as accurate as the others', though the calibration does not ask for it."""
    weight, inputs = draw(48, 32), correlated(300, 32)
    dead = torch.arange(32) % 5 == 0
    inputs[:, dead] = 0
    result, factors = solve(weight, hessian_of(inputs))
    assert result.incoh_mode == "kron"
    assert not factors.fallbacks
    errors = (weight - result.dequantize()).square().mean(dim=0)
    assert errors[dead].mean() < 2 * errors[~dead].mean()


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_fewer_tokens_than_columns_are_enough(num_tokens):
    weight, hessian = weight_like_a_models(48, 64), hessian_of(correlated(300, 64)[:num_tokens])
    result, _ = solve(weight, hessian)
    assert result.dequantize().isfinite().all()
    found = output_error(weight, result.dequantize(), hessian)
    assert found < rounding_error(weight, hessian, 4)


def test_a_hessian_of_zeros_is_that_of_equal_inputs():
    weight = weight_like_a_models(48, 64)
    result, _ = solve(weight, torch.zeros(64, 64))
    relative = (weight - result.dequantize()).square().sum() / weight.square().sum()
    assert relative < 0.02


def test_where_plain_rounding_is_better_the_layer_is_rounded_and_that_is_counted():
    """A weight on a plain grid loses nothing when rounded; rotated it would."""
    weight = torch.randint(-8, 8, (24, 32), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0], weight[:, 1] = -8, 7
    hessian = hessian_of(correlated(300, 32))
    result, factors = solve(weight, hessian)
    assert result.incoh_mode is None
    torch.testing.assert_close(result.dequantize(), weight, rtol=1e-3, atol=0)
    assert factors.rounded_rows == 24


def test_zeros_stay_zeros():
    """The grid has no zero; its step is so small that no float16 is left of it."""
    result, _ = solve(torch.zeros(24, 32), hessian_of(correlated(300, 32)))
    assert torch.equal(result.compute_dequantized_weight(), torch.zeros(24, 32).half())


def test_a_row_of_zeros_stays_one_though_rows_are_mixed():
    weight = weight_like_a_models(24, 32)
    weight[5] = 0
    result, _ = solve(weight, hessian_of(correlated(300, 32)), wbits=2)
    assert result.incoh_mode == "kron"
    assert not result.dequantize()[5].any()
    assert result.dequantize().any(dim=1).sum() == 23


def test_a_hessian_that_cannot_be_factored_is_noted_and_the_layer_rounded():
    weight, broken = draw(24, 32), torch.eye(32)
    broken[0, 1] = broken[1, 0] = 1000.0
    result, factors = solve(weight, broken)
    assert result.incoh_mode is None
    [text] = factors.fallbacks
    assert text.startswith("round to nearest: The Hessian is not positive definite")


def test_there_is_no_checkpoint_format():
    quantizer = QUIP()
    result, _ = solve(draw(24, 32), torch.eye(32))
    with pytest.raises(NotImplementedError, match="QUIP has no checkpoint format"):
        quantizer.get_quant_config()
    with pytest.raises(NotImplementedError, match="QUIP has no checkpoint format"):
        quantizer.layer_format(NAME)
    with pytest.raises(NotImplementedError, match="QUIPResult has no inference layer"):
        quantizer.create_inference_layer(result, nn.Linear(32, 24, bias=False))


def test_a_layer_is_quantized_from_its_input_as_from_its_hessian():
    layer, inputs = nn.Linear(32, 24, bias=False), correlated(300, 32)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    hessian = GroupStatistics.of(inputs, None).hessian()
    one = QUIP().quantize_layer(layer, inputs)
    assert same_result(one, QUIP().quantize_layer(layer, None, hessian))
    with pytest.raises(LayerError, match="QUIP needs its input or its Hessian"):
        QUIP().quantize_layer(layer)


def test_error_propagation_corrects_the_weight_first():
    original = correlated(300, 32)
    quantized = original + 0.1 * original @ draw(32, 32, seed=9)
    statistics = GroupStatistics.of(quantized, original)
    weights = {"a": weight_like_a_models(24, 32), "b": draw(16, 32)}

    def loss(qep: QEPConfig | None) -> float:
        results, fallbacks = quantize_group(QUIP(wbits=4), weights, statistics, qep)
        assert not fallbacks
        pairs = [(weights[name], result.dequantize()) for name, result in results.items()]
        return sum((original @ w.T - quantized @ q.T).square().sum().item() for w, q in pairs)

    assert loss(QEPConfig(perccorr=1.0)) < 0.9 * loss(None)


def test_a_group_tells_its_errors():
    weights = {"a": weight_like_a_models(24, 32)}
    statistics = GroupStatistics.of(correlated(300, 32), None)
    results, _ = quantize_group(QUIP(), weights, statistics, None)
    expected = output_error(weights["a"], results["a"].dequantize(), statistics.hessian())
    energy = output_error(weights["a"], torch.zeros(24, 32), statistics.hessian())
    assert results["a"].relative_output_squared_error == pytest.approx(expected / energy, rel=1e-3)
