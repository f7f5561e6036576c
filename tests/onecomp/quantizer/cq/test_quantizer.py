import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from onecomp.errors import ConfigError
from onecomp.jobs import quantize_group
from onecomp.quantizer import CQ, CQResult
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


def output_error(result: CQResult, weight: Tensor, x: Tensor) -> float:
    left = (weight - result.dequantize()) @ x.T
    return (left.square().sum() / (weight @ x.T).square().sum()).item()


def test_a_row_by_hand():
    weight = torch.tensor([[0.0, 1.0, 10.0, 12.0], [-2.0, -2.0, 3.0, 3.0]])
    result = CQ(refine_iters=0).quantize_layer(layer_of(weight), hessian=torch.eye(4))
    assert result.left_mean.tolist() == [[0.5], [-2.0]]
    assert result.right_mean.tolist() == [[11.0], [3.0]]
    assert result.threshold.tolist() == [[5.75], [0.5]]
    assert result.quantized_weight.tolist() == [[0, 0, 1, 1]] * 2
    assert result.quantized_weight.dtype == torch.int8
    assert result.dequantize().tolist() == [[0.5, 0.5, 11.0, 11.0], [-2.0, -2.0, 3.0, 3.0]]


def test_means_of_the_whole_layer_by_hand():
    weight = torch.tensor([[0.0, 1.0], [10.0, 13.0]])
    quantizer = CQ(each_row=False, refine_iters=0)
    result = quantizer.quantize_layer(layer_of(weight), hessian=torch.eye(2))
    assert (result.left_mean.tolist(), result.right_mean.tolist()) == ([[0.5]], [[11.5]])
    assert result.dequantize().tolist() == [[0.5, 0.5], [11.5, 11.5]]


def test_groups_have_means_of_their_own():
    weight = torch.tensor([[0.0, 1.0, 10.0, 12.0]])
    result = CQ(groupsize=2).quantize_layer(layer_of(weight), hessian=torch.eye(4))
    assert result.left_mean.tolist() == [[0.0, 10.0]]
    assert torch.equal(result.dequantize(), weight)


@pytest.mark.parametrize("settings", [{}, {"groupsize": 16}, {"each_row": False}])
def test_codes_turn_under_the_hessian_and_the_output_error_falls(settings):
    weight, x = draw(48, 64), inputs(64)
    layer, errors, codes = layer_of(weight), [], []
    for refine_iters in (0, 1, 6):
        result = CQ(refine_iters=refine_iters, **settings).quantize_layer(layer, x)
        errors.append(output_error(result, weight, x))
        codes.append(result.quantized_weight)
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < errors[1]
    assert (codes[2] != codes[0]).float().mean() > 0.05


def test_columns_that_carry_more_weigh_more_in_the_clusters():
    weight = torch.tensor([[0.0, 4.0, 6.0, 10.0]])
    light, heavy = (
        CQ(refine_iters=0).quantize_layer(layer_of(weight), hessian=torch.diag(torch.tensor(h)))
        for h in ([1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0])
    )
    assert light.quantized_weight.tolist() == [[0, 0, 1, 1]]
    assert heavy.quantized_weight.tolist() == [[0, 1, 1, 1]]


def test_rows_of_a_layer_are_independent_but_with_one_pair_of_means():
    assert CQ().row_separable
    assert CQ(groupsize=4).row_separable
    assert not CQ(each_row=False).row_separable


@pytest.mark.parametrize("each_row", [True, False])
def test_pieces_join_to_what_the_layer_is_alone(each_row):
    weights = {"a": draw(320, 32), "b": draw(128, 32, seed=1)}
    quantizer = CQ(each_row=each_row, refine_iters=2)
    statistics = GroupStatistics.of(inputs(32), None)
    results, _ = quantize_group(quantizer, weights, statistics, None, tile=128)
    hessian = statistics.hessian()
    for name, weight in weights.items():
        alone = quantizer.quantize_layer(layer_of(weight), hessian=hessian)
        assert alone.left_mean.shape == results[name].left_mean.shape
        different = alone.dequantize() != results[name].dequantize()
        assert different.float().mean() < 1e-3
        assert results[name].relative_output_squared_error is not None


def test_two_thousand_rows_are_as_each_row_alone():
    weight = draw(2000, 24)
    quantizer = CQ(refine_iters=0)
    whole = quantizer.quantize_layer(layer_of(weight), hessian=torch.eye(24))
    for row in range(0, 2000, 40):
        alone = quantizer.quantize_layer(layer_of(weight[row : row + 1]), hessian=torch.eye(24))
        assert torch.equal(alone.dequantize()[0], whole.dequantize()[row])


def test_rows_no_better_than_plain_ones_are_replaced_and_counted():
    weight, x = draw(100, 8), inputs(8)
    hessian = 2 / len(x) * x.T @ x
    factors = HessianFactors(hessian)
    result = CQ(refine_iters=0).quantize_weights({"a": weight}, factors)["a"]
    signs = torch.where(weight < 0, -1.0, 1.0)
    plain = signs * weight.abs().mean(dim=1, keepdim=True).half().float()
    mine, theirs = (
        torch.einsum("ri,ij,rj->r", weight - w, hessian, weight - w)
        for w in (result.dequantize(), plain)
    )
    assert (mine <= theirs * (1 + 1e-5)).all()
    assert 0 < factors.rounded_rows < 100


def test_no_checkpoint_format():
    with pytest.raises(NotImplementedError, match="CQ"):
        CQ().get_quant_config()


def test_names_and_problems():
    assert [CQ().name, CQ(groupsize=64).name] == ["CQ_perchannel", "CQ_gs64"]
    assert replace(CQ(groupsize=64), groupsize=32).name == "CQ_gs32"
    with pytest.raises(ConfigError, match="4 problems"):
        CQ(groupsize=0, refine_iters=-1, percdamp=0.0, drift_ratio=-1.0)
    message = (
        "each_row=False, groupsize=64: one pair of means for the whole layer has no groups. "
        "Use groupsize=-1."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        CQ(each_row=False, groupsize=64)
    [problem] = CQ(groupsize=48).layer_problems("model.q", 64, 8)
    assert problem.startswith(
        "groupsize=48 must divide in_features, but model.q has in_features=64"
    )
