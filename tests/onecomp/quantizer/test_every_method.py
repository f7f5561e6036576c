"""What every method has to do, whatever it is."""

import dataclasses

import pytest
import torch
from every_method import METHODS
from live_bytes import peak_bytes
from torch import Tensor, nn

from onecomp.block_file import read_block_file, write_block_file
from onecomp.errors import ConfigError
from onecomp.job import quantizer_from_record, quantizer_record
from onecomp.jobs import quantize_group
from onecomp.planning.methods import method_shape
from onecomp.qep import QEPConfig
from onecomp.quantizer import (
    ARB,
    CQ,
    QBB,
    Onebit,
    QuantizationResult,
    Quantizer,
    ResultLoader,
)
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.result_files import statistics_line
from onecomp.statistics import GroupStatistics

SHAPES = {"a.q_proj": (64, 96), "a.mlp.up_proj": (160, 96)}
every_method = pytest.mark.parametrize("method", METHODS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(num_tokens: int = 500, size: int = 96) -> GroupStatistics:
    """Inputs with a few strong directions, and what they would be without errors before them."""
    rows = draw(num_tokens, size, seed=7) @ draw(size, size, seed=8).mul_(
        torch.logspace(-1, 1, size)
    )
    return GroupStatistics.of(rows, rows + 0.3 * draw(num_tokens, size, seed=9))


def weights() -> dict[str, Tensor]:
    return {name: draw(*shape, seed=i) / 10 for i, (name, shape) in enumerate(SHAPES.items())}


def quantized(
    method: str, sums: GroupStatistics | None, qep: QEPConfig | None = None, **more: object
) -> tuple[Quantizer, dict[str, QuantizationResult], list[str]]:
    quantizer = METHODS[method](**more)
    results, lines = quantize_group(quantizer, weights(), sums, qep)
    return quantizer, results, lines


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Quantizer, dict[str, QuantizationResult], list[str]]]:
    """By method, what it makes of the same group, errors measured."""
    return {name: quantized(name, statistics(), calc_quant_error=True) for name in METHODS}


def same(found: QuantizationResult, expected: QuantizationResult) -> bool:
    tensors, others = found.tensors(), expected.tensors()
    return (
        type(found) is type(expected)
        and tensors.keys() == others.keys()
        and all(
            t.dtype == others[n].dtype and torch.equal(t, others[n]) for n, t in tensors.items()
        )
        and found.values() == expected.values()
    )


@every_method
def test_every_error_field_is_filled_and_right(made, method):
    _, results, _ = made[method]
    sums = statistics()
    hessian = sums.hessian().double()
    for name, weight in weights().items():
        result = results[name]
        off = (weight - result.dequantize()).double()
        output, energy = (((m @ hessian) * m).sum().item() for m in (off, weight.double()))
        assert result.relative_output_squared_error == pytest.approx(output / energy, rel=1e-3)
        assert result.output_squared_error == pytest.approx(output * sums.num_tokens / 2, rel=1e-3)
        assert result.mean_output_squared_error == pytest.approx(output / 2 / len(weight), rel=1e-3)
        squares = off.square().sum().item()
        assert result.weight_squared_error == pytest.approx(squares, rel=1e-4)
        assert result.mean_weight_squared_error == pytest.approx(squares / off.numel(), rel=1e-4)
        assert result.relative_weight_squared_error > 0
        assert 0 < result.relative_output_squared_error < 1
        assert result.quantization_time > 0
        assert "-" not in statistics_line(result).replace("e-", "e")


@every_method
def test_the_statistics_change_what_a_method_with_a_hessian_makes(made, method):
    quantizer, results, _ = made[method]
    if not quantizer.flag_hessian:
        return
    other = GroupStatistics.of(draw(500, 96, seed=3), None)
    _, others, _ = quantized(method, other)
    assert not torch.equal(results["a.q_proj"].dequantize(), others["a.q_proj"].dequantize())


@every_method
def test_no_layer_is_worse_than_plain_rounding_without_a_word(made, method):
    quantizer, results, lines = made[method]
    hessian = statistics().hessian()
    for name, weight in weights().items():
        rounded = quantizer.baseline(name, weight)
        if rounded is None:
            continue
        found, plain = (
            (((weight - w) @ hessian) * (weight - w)).sum()
            for w in (results[name].dequantize(), rounded)
        )
        said = any(line.startswith("worse than") and name in line for line in lines)
        assert said == bool(found > plain * (1 + 1e-4))


@every_method
@pytest.mark.parametrize(("zero_rows", "zero_columns"), [(160, 96), (150, 0), (0, 90), (150, 90)])
def test_layers_that_are_mostly_zeros_stay_finite_and_bounded(method, zero_rows, zero_columns):
    weight = draw(160, 96) / 10
    weight[:zero_rows], weight[:, :zero_columns] = 0, 0
    results, _ = quantize_group(METHODS[method](), {"layer": weight}, statistics(), None)
    found = results["layer"].dequantize()
    assert found.isfinite().all()
    assert found.abs().max() <= 4 * weight.abs().max()


def test_one_pair_of_means_for_rows_of_all_sizes_is_said_to_be_worse():
    rows = {"layer": draw(64, 96) * torch.logspace(-2, 1, 64)[:, None]}
    _, lines = quantize_group(CQ(each_row=False, refine_iters=1), rows, statistics(), None)
    assert any(line.startswith("worse than plain rounding") and "layer" in line for line in lines)


@every_method
def test_the_same_is_made_whatever_the_global_generator_is_at(made, method):
    _, results, lines = made[method]
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    _, again, lines_again = quantized(method, statistics(), calc_quant_error=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert lines == lines_again
    for name, result in results.items():
        again[name].quantization_time = result.quantization_time
        assert same(again[name], result)


@every_method
def test_dead_inputs_and_too_few_tokens_give_finite_weights(method):
    rows = draw(20, 96, seed=5)
    rows[:, 10:13] = 0
    for sums in (GroupStatistics.of(rows, None), None):
        _, results, _ = quantized(method, sums)
        for result in results.values():
            assert result.dequantize().isfinite().all()


@every_method
def test_rows_of_zeros_and_of_one_value_give_finite_weights(method):
    quantizer, odd = METHODS[method](), draw(64, 96) / 10
    odd[3], odd[5], odd[7, 1:] = 0, 0.25, 0
    results, _ = quantize_group(quantizer, {"a.q_proj": odd}, statistics(), None)
    found = results["a.q_proj"].dequantize()
    assert found.isfinite().all()
    assert found[3].abs().max() < 0.05


@every_method
def test_error_propagation_corrects_what_it_quantizes(method):
    quantizer, plain, _ = quantized(method, statistics())
    _, corrected, _ = quantized(method, statistics(), QEPConfig(perccorr=1.0))
    for name in SHAPES:
        is_same = torch.equal(plain[name].dequantize(), corrected[name].dequantize())
        assert is_same == (not quantizer.flag_hessian)


@every_method
def test_results_survive_files_and_loaders(made, method, tmp_path):
    quantizer, results, _ = made[method]
    quantizer.results = results
    quantizer.save_results(tmp_path / "results.pt")
    loader = ResultLoader(results_file=str(tmp_path / "results.pt"))
    write_block_file(tmp_path / "00000.safetensors", results)
    stored = read_block_file(tmp_path / "00000.safetensors")
    for name, result in results.items():
        for found in (loader.results[name], stored[name], result.narrowed().widened()):
            assert same(found, result)
            assert torch.equal(found.dequantize(), result.dequantize())
        half = result.compute_dequantized_weight()
        assert (half.dtype, half.shape) == (torch.float16, SHAPES[name])


@every_method
def test_a_live_model_computes_with_loaded_results(made, method, tmp_path):
    quantizer, results, _ = made[method]
    quantizer.results = results
    quantizer.save_results(tmp_path / "results.pt")
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"q_proj": nn.Linear(96, 64), "mlp": nn.ModuleDict()})}
    )
    model["a"]["mlp"]["up_proj"] = nn.Linear(96, 160, bias=False)
    bias = model["a"]["q_proj"].bias.detach().clone()
    ResultLoader(results_file=str(tmp_path / "results.pt")).apply_results_to_model(model)
    x = draw(5, 96, seed=4)
    for name, result in results.items():
        expected = x @ result.dequantize().T + (bias if name == "a.q_proj" else 0)
        torch.testing.assert_close(model.get_submodule(name)(x), expected, rtol=1e-3, atol=1e-3)


@every_method
def test_settings_can_be_written_down_and_planned_for(method):
    quantizer = METHODS[method](exclude_layer_keywords=["k_proj"])
    assert quantizer_from_record(quantizer_record(quantizer)) == quantizer
    assert dataclasses.replace(quantizer) == quantizer
    shape = method_shape(quantizer)
    assert shape.has_hessian == quantizer.flag_hessian
    assert quantizer.solve_cost(100, 96) > 0


BINARY = [
    Onebit(iters=1),
    ARB(arb_iters=1),
    ARB(arb_iters=1, groupsize=32),
    CQ(refine_iters=1),
    CQ(refine_iters=1, groupsize=32),
    CQ(refine_iters=1, each_row=False),
    QBB(wbits=3, iters_per_basis=1),
    QBB(wbits=2, iters_per_basis=1, groupsize=32),
]


@pytest.mark.parametrize("quantizer", BINARY, ids=lambda q: q.name)
def test_binary_methods_say_what_signs_and_scales_take(quantizer):
    weight = draw(64, 96)
    factors = HessianFactors(statistics().hessian(), 500)
    result = quantizer.quantize_weights({"a": weight}, factors)["a"]
    scales = [t for t in result.tensors().values() if t.dtype == torch.float16]
    num_bits = getattr(quantizer, "wbits", 1) * weight.numel() + 16 * sum(map(Tensor.numel, scales))
    assert quantizer.bits_per_weight("a", 96, 64) * weight.numel() == pytest.approx(num_bits)


@every_method
def test_memory_is_at_most_four_times_weight_and_hessian(method):
    quantizer, size = METHODS[method](), (512, 768)
    hessian = statistics(1000, 768).hessian()
    factors = HessianFactors(hessian, 1000)
    for key in quantizer.factor_keys():
        factors.at(key.percdamp, key.by_activation)
    weight = draw(*size) / 10
    peak = peak_bytes(lambda: quantizer.quantize_weights({"a.q_proj": weight}, factors))
    assert peak <= 4 * 4 * (weight.numel() + hessian.numel())


def test_a_dash_stands_for_what_was_not_measured():
    line = statistics_line(QuantizationResult(dequantized_weight=draw(2, 2)))
    assert line.count(" -") == 7


@every_method
def test_switches_and_the_choice_of_layers_are_checked_with_everything_else(method: str):
    quantizer = METHODS[method]()
    switches = [f.name for f in dataclasses.fields(quantizer) if f.type is bool]
    for name in switches:
        setattr(quantizer, name, "no")
    quantizer.num_layers, quantizer.include_layer_names = -1, "mlp"
    with pytest.raises(ConfigError) as caught:
        quantizer.validate_params()
    for name in switches:
        assert f"{name}='no': must be True or False." in str(caught.value)
    assert "num_layers=-1: must be 0 or more, or None for all." in str(caught.value)
    assert "include_layer_names='mlp': must be a list of texts, or None." in str(caught.value)
