from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from onecomp.errors import ConfigError
from onecomp.jobs import quantize_group
from onecomp.quantizer import ARB, ARBResult
from onecomp.quantizer.factors import HessianFactors
from onecomp.statistics import GroupStatistics


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(size: int, num_tokens: int = 400) -> Tensor:
    return draw(num_tokens, size, seed=7) @ draw(size, size, seed=8)


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def drifted_errors(result: ARBResult, weight: Tensor, x: Tensor) -> Tensor:
    """What the search lowers, of every row."""
    hessian = 2 / len(x) * x.T @ x
    hessian = (hessian + torch.diag(ARB().drift_ratio * hessian.diagonal())).double()
    left = (weight - result.dequantize()).double()
    return torch.einsum("ri,ij,rj->r", left, hessian, left)


def test_rows_that_hold_two_values_are_kept():
    weight = torch.tensor([[0.5, 2.5, 2.5, 0.5], [-1.0, 1.0, -1.0, -1.0]])
    result = ARB().quantize_layer(layer_of(weight), inputs(4))
    assert torch.equal(result.dequantize(), weight)
    assert result.mu.tolist() == [[1.5], [0.0]]
    assert result.alpha.tolist() == [[1.0], [1.0]]
    assert result.sign.tolist() == [[-1, 1, 1, -1], [-1, 1, -1, -1]]
    assert (result.sign.dtype, result.alpha.dtype) == (torch.int8, torch.float16)


def test_groups_have_scale_and_mean_of_their_own():
    weight = torch.tensor([[0.0, 1.0, 10.0, 12.0]])
    result = ARB(groupsize=2).quantize_layer(layer_of(weight), inputs(4))
    assert (result.mu.tolist(), result.alpha.tolist()) == ([[0.5, 11.0]], [[0.5, 1.0]])
    assert torch.equal(result.dequantize(), weight)


@pytest.mark.parametrize("groupsize", [-1, 32])
def test_the_error_falls_with_iterations_and_signs_turn(groupsize):
    weight, x = draw(64, 96), inputs(96)
    results = [
        ARB(arb_iters=n, split_points=1, groupsize=groupsize).quantize_layer(layer_of(weight), x)
        for n in (1, 2, 4, 8)
    ]
    errors = [drifted_errors(result, weight, x).sum().item() for result in results]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.95 * errors[0]
    assert (results[3].sign != results[0].sign).float().mean() > 0.01


def test_split_points_change_the_result_and_make_no_row_worse():
    weight, x = draw(64, 96).exp(), inputs(96)
    one, two, three = (ARB(split_points=n).quantize_layer(layer_of(weight), x) for n in (1, 2, 3))
    errors = [drifted_errors(result, weight, x) for result in (one, two, three)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[1] < 0.999 * errors[0]).float().mean() > 0.05
    assert errors[2].sum() < errors[0].sum()
    assert (two.sign != one.sign).any()


def test_a_hessian_that_says_nothing_leaves_the_nearest_signs():
    weight = draw(40, 32)
    result = ARB().quantize_layer(layer_of(weight), hessian=torch.eye(32))
    middle = result.mu.float()
    assert torch.equal(result.sign > 0, weight >= middle)


def test_two_thousand_rows_in_pieces_are_as_rows_alone():
    weight, x = draw(2000, 32), inputs(32)
    statistics = GroupStatistics.of(x, None)
    quantizer = ARB(arb_iters=30, split_points=1)
    results, _ = quantize_group(quantizer, {"a": weight}, statistics, None)
    hessian = statistics.hessian()
    for row in range(0, 2000, 100):
        alone = quantizer.quantize_layer(layer_of(weight[row : row + 1]), hessian=hessian)
        whole = replace(
            results["a"], **{n: t[row : row + 1] for n, t in results["a"].tensors().items()}
        )
        errors = [drifted_errors(r, weight[row : row + 1], x) for r in (whole, alone)]
        assert torch.allclose(*errors, rtol=0.05)


def test_dead_columns_and_rows_of_zeros():
    weight, x = draw(10, 24), inputs(24)
    x[:, 5] = 0
    weight[3] = 0
    result = ARB().quantize_layer(layer_of(weight), x)
    assert torch.isfinite(result.dequantize()).all()
    assert result.dequantize()[3].abs().max() == 0


def test_no_token_reached_the_layer():
    weights = {"a": draw(100, 24)}
    results, fallbacks = quantize_group(ARB(), weights, None, None)
    assert fallbacks[0] == "round to nearest: no calibration token reached it"
    assert (results["a"].dequantize() - weights["a"]).square().mean() < 0.5


def test_a_singular_hessian_is_enough():
    weight, x = draw(20, 64), draw(10, 64, seed=3)
    factors = HessianFactors(2 / 10 * x.T @ x, 10)
    result = ARB().quantize_weights({"a": weight}, factors)["a"]
    error, energy = factors.row_errors["a"].sum(dim=1).tolist()
    assert error < 0.1 * energy
    assert torch.isfinite(result.dequantize()).all()


def test_no_checkpoint_format():
    with pytest.raises(NotImplementedError, match="ARB"):
        ARB().get_quant_config()


def test_names_and_problems():
    assert ARB.row_separable
    assert [ARB().name, ARB(groupsize=64).name] == ["ARB_perchannel", "ARB_gs64"]
    with pytest.raises(ConfigError, match="5 problems"):
        ARB(arb_iters=0, split_points=0, groupsize=0, percdamp=-1.0, drift_ratio=-1.0)
    assert ARB(groupsize=32).layer_problems("model.q", 64, 8) == []
    [problem] = ARB(groupsize=48).layer_problems("model.q", 64, 8)
    assert problem.startswith(
        "groupsize=48 must divide in_features, but model.q has in_features=64"
    )
