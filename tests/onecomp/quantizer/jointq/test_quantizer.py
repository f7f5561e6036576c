import dataclasses
import json
import re

import pytest
import torch
from jointq_problems import correlated_hessian, draw
from torch import Tensor, nn

from onecomp.errors import ConfigError, LayerError
from onecomp.job import quantizer_from_record, quantizer_record
from onecomp.jobs import quantize_group
from onecomp.linalg import quadratic_form
from onecomp.quantizer import GPTQ, JointQ, JointQResult
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.gptq import GPTQLinear
from onecomp.statistics import GroupStatistics


def solve(quantizer: JointQ | GPTQ, weight: Tensor, hessian: Tensor) -> JointQResult:
    return quantizer.quantize_weights({"layer": weight}, HessianFactors(hessian))["layer"]


def output_error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> Tensor:
    return quadratic_form((weight - dequantized).T.double(), hessian.double())


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("actorder", [False, True])
def test_results_are_saved_in_the_layout_of_gptq(bits, symmetric, group_size, actorder):
    weight, hessian = draw(32, 64), correlated_hessian(64)
    quantizer = JointQ(
        bits=bits, symmetric=symmetric, group_size=group_size, actorder=actorder, num_restarts=0
    )
    result = solve(quantizer, weight, hessian)
    layer = quantizer.create_inference_layer(result, linear(weight))
    assert isinstance(layer, GPTQLinear)
    assert torch.equal(layer.dequantize(), result.dequantize())
    assert layer.actorder == (actorder and group_size is not None)
    config = quantizer.get_quant_config()
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", bits, symmetric)
    assert config["group_size"] == (-1 if group_size is None else 16)
    assert config["desc_act"] == (actorder and group_size is not None)
    assert quantizer.layer_format("layer").bits == bits


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_result_is_what_is_documented(symmetric):
    weight, hessian = draw(32, 64), correlated_hessian(64)
    quantizer = JointQ(bits=3, symmetric=symmetric, group_size=16, actorder=True)
    result = solve(quantizer, weight, hessian)
    assert result.scale.dtype == torch.float64
    assert result.scale.shape == result.zero_point.shape == (32, 4)
    assert result.assignment.shape == (32, 4, 16)
    assert result.zero_point.dtype == result.assignment.dtype == torch.int8
    low, high = (-4, 3) if symmetric else (0, 7)
    assert result.assignment.min() >= low
    assert result.assignment.max() <= high
    assert torch.equal(result.perm, hessian.diagonal().argsort(descending=True, stable=True))
    assert result.accepted_lambda.shape == (32,)
    assert result.accepted_lambda.max() == torch.tensor(0.1)
    by_hand = result.scale[3, 2] * (result.assignment[3, 2, 5] - result.zero_point[3, 2])
    assert result.dequantize()[3, result.perm[2 * 16 + 5]] == by_hand.float()
    assert result.dequantized_weight is None
    assert result.compute_dequantized_weight().shape == (32, 64)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("actorder", [False, True])
def test_outputs_are_closer_than_those_of_gptq(symmetric, actorder):
    weight, hessian = draw(64, 64), correlated_hessian(64)
    joint = JointQ(
        bits=3, symmetric=symmetric, group_size=16, actorder=actorder, regularization_lambda=0.0
    )
    gptq = GPTQ(
        wbits=3, sym=symmetric, groupsize=16, mse=True, actorder=True, static_groups=not actorder
    )
    found, reference = (solve(q, weight, hessian).dequantize() for q in (joint, gptq))
    one, other = (output_error(weight, w, hessian).sum() for w in (found, reference))
    assert one < 0.93 * other
    nearest = output_error(weight, joint.baseline("layer", weight), hessian)
    if not actorder:  # else groups are others than the baseline's
        assert (output_error(weight, found, hessian) <= nearest * 1.0001).all()


@pytest.mark.parametrize("mode", ["identity", "diagonal"])
def test_rising_lambdas_work_with_every_mode(mode):
    weight, hessian = draw(64, 64), correlated_hessian(64, num_tokens=80)
    settings = {"bits": 3, "group_size": 16, "regularization_mode": mode}
    first = solve(JointQ(**settings, regularization_lambda=0.001), weight, hessian)
    result = solve(
        JointQ(**settings, lambda_mode="incremental_lambda", incremental_eps_y=0.1),
        weight,
        hessian,
    )
    taken = result.accepted_lambda
    assert taken.shape == (64,)
    assert set(taken.tolist()) <= set(torch.tensor(JointQ().lambda_list).tolist())
    went_on = taken > 0.001
    assert went_on.any()
    before, after = ((weight - r.dequantize()).square().sum(1) for r in (first, result))
    assert (after[went_on] < before[went_on]).all()
    assert torch.equal(after[~went_on], before[~went_on])


def test_rows_that_regularization_costs_too_much_get_less_of_it():
    weight, hessian = draw(64, 64), correlated_hessian(64)
    gptq = GPTQ(
        wbits=3,
        sym=False,
        groupsize=16,
        mse=True,
        weighted_mse=True,
        actorder=True,
        static_groups=True,
    )
    reference = output_error(weight, solve(gptq, weight, hessian).dequantize(), hessian)
    errors, taken = {}, {}
    for limit in (0.05, 100.0):
        quantizer = JointQ(
            bits=3,
            group_size=16,
            regularization_lambda=1.0,
            regularization_largest_loss=limit,
            enable_clip_optimize=False,
            gptq=gptq,
        )
        result = solve(quantizer, weight, hessian)
        errors[limit] = output_error(weight, result.dequantize(), hessian)
        taken[limit] = result.accepted_lambda
    assert (errors[100.0] > 1.05 * reference).any()
    assert (errors[0.05] <= 1.051 * reference).all()
    assert set(taken[100.0].tolist()) == {1.0}
    assert len(taken[0.05].unique()) >= 2
    assert set(taken[0.05].tolist()) <= set(torch.tensor([1.0, 0.1, 0.0]).tolist())


def test_regularization_trades_output_error_for_weight_error():
    weight, hessian = draw(64, 64), correlated_hessian(64, num_tokens=80)
    found = [
        solve(
            JointQ(bits=3, group_size=16, regularization_lambda=s, regularization_largest_loss=9.0),
            weight,
            hessian,
        ).dequantize()
        for s in (0.0, 0.1, 1.0)
    ]
    outputs = [output_error(weight, w, hessian).sum() for w in found]
    weights = [(weight - w).square().sum() for w in found]
    assert outputs == sorted(outputs)
    assert weights == sorted(weights, reverse=True)


def damaged(kind: str) -> tuple[Tensor, Tensor]:
    """A weight and a Hessian that are hard on solvers."""
    weight, hessian = draw(32, 64), correlated_hessian(64)
    if kind == "few tokens":
        hessian = correlated_hessian(64, num_tokens=3)
    elif kind == "dead columns":
        hessian[:20], hessian[:, :20] = 0, 0
    elif kind == "dead layer":
        hessian = torch.zeros(64, 64)
    elif kind == "constant rows":
        weight[:8], weight[8:16], weight[16:24] = 0.25, 0.0, -1e-6
    elif kind == "an outlier":
        weight[0, 0], hessian[0, 0] = 1e4, 1e6 * hessian[0, 0]
    else:
        weight, hessian = weight * 1e-7, hessian * 1e-12
    return weight, hessian


KINDS = ["few tokens", "dead columns", "dead layer", "constant rows", "an outlier", "tiny values"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_without_regularization_nothing_is_nan(kind, actorder, symmetric):
    weight, hessian = damaged(kind)
    quantizer = JointQ(
        bits=3,
        group_size=16,
        symmetric=symmetric,
        actorder=actorder,
        regularization_lambda=0.0,
        num_restarts=1,
    )
    result = solve(quantizer, weight, hessian)
    found = result.dequantize()
    assert found.isfinite().all()
    assert (result.scale != 0).all()
    nearest = quantizer.baseline("layer", weight)
    if not actorder:
        errors = (output_error(weight, w, hessian).sum() for w in (found, nearest))
        assert next(errors) <= next(errors) * 1.001 + 1e-30


def test_columns_that_no_token_used_are_rounded_to_nearest():
    weight, hessian = damaged("dead columns")
    result = solve(JointQ(bits=4, group_size=16, num_restarts=0), weight, hessian)
    nearest = (weight[:, :16] / result.scale[:, :1].float()).round() + result.zero_point[:, :1]
    assert torch.equal(result.assignment[:, 0].float(), nearest.clamp(0, 15))


def test_lambda_does_not_depend_on_tokens_or_on_scales():
    weight, hessian = draw(32, 64), correlated_hessian(64)
    quantizer = JointQ(bits=3, group_size=16)
    one = solve(quantizer, weight, hessian)
    louder = solve(quantizer, weight, hessian * 1024)
    larger = solve(quantizer, weight * 4, hessian)
    assert torch.equal(one.assignment, louder.assignment)
    assert torch.equal(one.assignment, larger.assignment)
    assert torch.equal(4 * one.scale, larger.scale)
    few, many = (
        quantizer.quantize_weights({"a": weight}, HessianFactors(hessian, tokens))["a"]
        for tokens in (10, 10_000)
    )
    assert torch.equal(few.assignment, many.assignment)


def test_layers_of_a_group_are_solved_together_and_taken_apart():
    weights = {
        name: draw(rows, 64, seed=i) for i, (name, rows) in enumerate({"a": 40, "b": 24}.items())
    }
    inputs = draw(300, 64, seed=5) @ draw(64, 64, seed=6)
    quantizer = JointQ(bits=3, group_size=16, lambda_mode="incremental_lambda")
    receipt = quantize_group(quantizer, weights, GroupStatistics.of(inputs, None), None)
    results = receipt[0] if isinstance(receipt, tuple) else receipt
    hessian = GroupStatistics.of(inputs, None).hessian()
    for name, weight in weights.items():
        alone = solve(quantizer, weight, hessian)
        result = results[name]
        assert result.assignment.shape == alone.assignment.shape
        assert (result.assignment == alone.assignment).float().mean() > 0.98
        assert result.relative_output_squared_error > 0


def test_settings_and_results_survive_being_written(tmp_path):
    quantizer = JointQ(bits=3, group_size=16, gptq=GPTQ(percdamp=0.05), num_restarts=1)
    record = json.loads(json.dumps(quantizer_record(quantizer)))
    assert quantizer_from_record(record) == quantizer
    assert dataclasses.replace(quantizer) == quantizer
    quantizer = JointQ(bits=3, group_size=16, lambda_mode="incremental_lambda")
    quantizer.results = {"layer": solve(quantizer, draw(32, 64), correlated_hessian(64))}
    quantizer.save_results(tmp_path / "results.pt")
    again = JointQ().load_results(tmp_path / "results.pt")["layer"]
    assert torch.equal(again.dequantize(), quantizer.results["layer"].dequantize())
    assert torch.equal(again.accepted_lambda, quantizer.results["layer"].accepted_lambda)


def test_gptq_as_given_is_what_the_search_starts_from():
    weight, hessian = draw(64, 64), correlated_hessian(64)
    settings = {"bits": 3, "group_size": 16, "enable_clip_optimize": False, "num_restarts": 0}
    without = solve(JointQ(**settings, enable_gptq=False), weight, hessian)
    default = solve(JointQ(**settings), weight, hessian)
    plain = solve(JointQ(**settings, gptq=GPTQ(percdamp=1.0)), weight, hessian)
    errors = [
        output_error(weight, r.dequantize(), hessian).sum() for r in (default, plain, without)
    ]
    assert errors == sorted(errors)
    assert len(set(errors)) == 3
    assert JointQ(enable_gptq=False).factor_keys() == ()
    assert JointQ(gptq=GPTQ(percdamp=0.5)).factor_keys()[0].percdamp == 0.5


PROBLEMS = [
    ({"bits": 8}, "bits=8: must be a whole number from 1 to 7 with symmetric=False"),
    ({"bits": 9, "symmetric": True}, "bits=9: must be a whole number from 1 to 8 with"),
    ({"bits": 0}, "bits=0: must be a whole number from 1 to 7"),
    ({"group_size": -1}, "group_size=-1: must be None (one group a row) or at least 1."),
    ({"regularization_lambda": -0.1}, "regularization_lambda=-0.1: must be at least 0."),
    ({"regularization_mode": "x"}, "regularization_mode='x': must be one of"),
    ({"regularization_gamma": 2.0}, "regularization_gamma=2.0: must be from 0 to 1."),
    ({"lambda_mode": "x"}, "lambda_mode='x': must be 'fixed_lambda' or 'incremental_lambda'."),
    ({"lambda_list": [0.2, 0.1]}, "lambda_list=[0.2, 0.1]: must be rising numbers"),
    ({"lambda_list": []}, "lambda_list=[]: must be rising numbers"),
    ({"incremental_eps_y": -1.0}, "incremental_eps_y=-1.0: must be at least 0."),
    ({"ils_num_clones": 0}, "ils_num_clones=0: must be a whole number, at least 1."),
    ({"ils_num_channels": 0}, "ils_num_channels=0: must be a whole number, at least 1."),
    ({"num_restarts": -1}, "num_restarts=-1: must be a whole number, at least 0."),
]


@pytest.mark.parametrize(("settings", "problem"), PROBLEMS)
def test_settings_are_checked_at_construction(settings, problem):
    with pytest.raises(ConfigError, match=f"^JointQ: {re.escape(problem)}"):
        JointQ(**settings)


def test_eight_bits_are_for_symmetric_codes():
    weight, hessian = draw(8, 32), correlated_hessian(32)
    result = solve(JointQ(bits=8, symmetric=True, group_size=16), weight, hessian)
    assert result.assignment.min() < -64
    assert ((weight - result.dequantize()).abs() < 0.1).all()


@pytest.mark.parametrize("group_size", [16, None])
def test_bits_that_are_planned_for_are_those_that_are_stored(group_size):
    """16 bits for a group's scale, and a zero point of the codes' size."""
    quantizer = JointQ(bits=3, group_size=group_size, num_restarts=0)
    result = solve(quantizer, draw(32, 64), correlated_hessian(64))
    num_bits = 3 * result.assignment.numel() + 16 * result.scale.numel()
    num_bits += 3 * result.zero_point.numel()
    assert quantizer.bits_per_weight("layer", 64, 32) == num_bits / (32 * 64)
    assert quantizer.bits_per_weight("layer", 64, 32, wbits=4) > 4


@pytest.mark.parametrize("order", [None, "by activation"])
def test_rows_of_layers_that_lie_on_top_of_each_other_are_cut_alike(order):
    """More rows than are solved at once, of three layers: none is lost, doubled or moved."""
    weights = {
        name: draw(rows, 32, seed=rows) for name, rows in {"a": 700, "b": 9, "c": 500}.items()
    }
    quantizer = JointQ(bits=4, group_size=32, num_restarts=0, actorder=order is not None)
    together = quantizer.quantize_weights(weights, HessianFactors(correlated_hessian(32)))
    for name, weight in weights.items():
        alone = solve(quantizer, weight, correlated_hessian(32))
        assert (alone.assignment == together[name].assignment).float().mean() > 0.98


def test_layers_whose_groups_do_not_fit_are_named():
    [problem] = JointQ(group_size=48).layer_problems("a.b", 64, 8)
    assert problem.startswith("group_size=48 must divide in_features, but a.b has in_features=64 (")
    assert JointQ(group_size=None).layer_problems("a.b", 65, 8) == []
    with pytest.raises(LayerError, match="group_size=48 must divide"):
        JointQ(group_size=48).quantize_layer(linear(draw(8, 64)), None, torch.eye(64))


def test_documented_settings_keep_their_order_and_defaults():
    documented = {
        "bits": 4,
        "symmetric": False,
        "group_size": 128,
        "log_level": 0,
        "device": None,
        "regularization_lambda": 0.1,
        "regularization_mode": "diagonal",
        "regularization_gamma": 0.5,
        "lambda_mode": "fixed_lambda",
        "lambda_list": [0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5],
        "incremental_eps_y": 0.03,
        "incremental_eps_w": 0.10,
        "incremental_initial_skip_ew_threshold": 0.3,
        "actorder": False,
        "ils_enabled": False,
        "ils_num_iterations": 10,
        "ils_num_clones": 8,
        "ils_num_channels": None,
        "enable_clip_optimize": True,
        "enable_clip_optimize_ep": False,
        "enable_gptq": True,
        "gptq": None,
    }
    positional = [f.name for f in dataclasses.fields(JointQ) if not f.kw_only]
    assert positional[-len(documented) :] == list(documented)
    assert {name: getattr(JointQ(), name) for name in documented} == documented
