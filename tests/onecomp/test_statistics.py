import random
import re

import pytest
import torch
from torch import Tensor

from onecomp.errors import LayerError
from onecomp.statistics import Contribution, FewRows, GroupStatistics, ShardSums, merge, total

IN_FEATURES = 40
SHARD_ROWS = [3, 25, 40, 1, 19, 20, 21, 64, 7]
"""Uneven on purpose: shards on both sides of in / 2, and exactly on it."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shard_inputs(shard: int, *, with_cross: bool) -> tuple[Tensor, Tensor | None]:
    rows = draw(SHARD_ROWS[shard], IN_FEATURES, seed=shard)
    return rows, draw(*rows.shape, seed=100 + shard) if with_cross else None


def leaf(shard: int, *, with_cross: bool) -> Contribution:
    """A shard's contribution, its rows added as two micro-batches."""
    rows, originals = shard_inputs(shard, with_cross=with_cross)
    sums, middle = ShardSums(shard), len(rows) // 2
    for part in (slice(0, middle), slice(middle, None)):
        sums.add(rows[part], None if originals is None else originals[part])
    return sums.contribution()


def same_bits(one: GroupStatistics, other: GroupStatistics) -> bool:
    pairs = zip(one.gram, other.gram, strict=True)
    crosses = (one.cross is None) == (other.cross is None)
    if crosses and one.cross is not None:
        crosses = torch.equal(one.cross, other.cross)
    return (
        one.num_tokens == other.num_tokens and crosses and all(torch.equal(a, b) for a, b in pairs)
    )


@pytest.mark.parametrize("with_cross", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 5, 8, 9])
def test_no_assignment_of_shards_and_no_order_of_arrival_changes_a_bit(num_shards, with_cross):
    leaves = [leaf(shard, with_cross=with_cross) for shard in range(num_shards)]
    expected = total(merge(leaves, num_shards), num_shards)
    for seed in range(20):
        chance = random.Random(seed)
        holders = [[] for _ in range(chance.randint(1, num_shards))]
        for contribution in leaves:
            chance.choice(holders).append(contribution)
        arriving = []
        for held in holders:
            chance.shuffle(held)
            arriving += merge(held, num_shards)
        chance.shuffle(arriving)
        assert same_bits(total(arriving, num_shards), expected)


@pytest.mark.parametrize("with_cross", [False, True])
def test_the_total_is_the_sum_over_all_rows(with_cross):
    leaves = [leaf(shard, with_cross=with_cross) for shard in range(9)]
    rows, originals = zip(*(shard_inputs(s, with_cross=with_cross) for s in range(9)), strict=True)
    merged = total(leaves, 9)
    whole = GroupStatistics.of(torch.cat(rows), torch.cat(originals) if with_cross else None)
    assert merged.num_tokens == sum(SHARD_ROWS)
    torch.testing.assert_close(merged.hessian(), whole.hessian())
    if with_cross:
        torch.testing.assert_close(merged.delta(), whole.delta())


def test_the_tree_is_fixed_rather_than_left_to_right():
    leaves = [leaf(shard, with_cross=False) for shard in (1, 2, 7)]
    numbered = [Contribution(i, i + 1, part.content) for i, part in enumerate(leaves)]
    a, b, c = (part.content for part in numbered)
    assert same_bits(total(numbered, 3), a + (b + c))
    assert not same_bits(total(numbered, 3), (a + b) + c)


@pytest.mark.parametrize("num_rows", [1, 19, 20, 40])
def test_fewer_rows_than_half_their_width_are_sent_as_rows(num_rows):
    sums = ShardSums(0)
    sums.add(draw(num_rows, IN_FEATURES).bfloat16(), None)
    content = sums.contribution().content
    assert isinstance(content, FewRows) == (2 * num_rows < IN_FEATURES)


def test_rows_keep_the_dtype_of_the_stream_and_sums_are_float32():
    rows, originals = (draw(4, IN_FEATURES, seed=seed).bfloat16() for seed in (0, 1))
    sums = ShardSums(0)
    sums.add(rows[:1], originals[:1])
    sums.add(rows[1:], originals[1:])
    content = sums.contribution().content
    assert torch.equal(content.rows, rows)
    assert torch.equal(content.original_rows, originals)
    assert content.num_bytes == 2 * 4 * IN_FEATURES * 2
    statistics = content.statistics()
    assert statistics.gram[0].dtype == statistics.cross.dtype == torch.float32
    assert statistics.num_bytes == 2 * IN_FEATURES**2 * 4


def test_a_holder_adds_whole_subtrees_of_sums_and_passes_rows_on():
    sums = [Contribution(i, i + 1, GroupStatistics.of(draw(30, 8, seed=i), None)) for i in range(4)]
    assert [(c.first, c.last) for c in merge(sums, 4)] == [(0, 4)]
    assert [(c.first, c.last) for c in merge(sums[1:], 4)] == [(1, 2), (2, 4)]
    with_rows = [Contribution(0, 1, FewRows(draw(2, 8), None)), *sums[1:]]
    assert [(c.first, c.last) for c in merge(with_rows, 4)] == [(0, 1), (1, 2), (2, 4)]


def test_shards_that_no_token_reached_are_left_out():
    assert ShardSums(0).contribution() is None
    assert total([], 4) is None
    only = leaf(3, with_cross=False)
    assert same_bits(total([only], 5), only.content.statistics())


@pytest.mark.parametrize("shape", [(30,), (5, 6)])
def test_hessian_and_delta_are_the_direct_formulas(shape):
    quantized, original = (draw(*shape, IN_FEATURES, seed=seed).double() for seed in (0, 1))
    statistics = GroupStatistics.of(quantized.float(), original.float())
    x_hat, x = quantized.reshape(-1, IN_FEATURES), original.reshape(-1, IN_FEATURES)
    expected = 2 / 30 * x_hat.T @ x_hat
    torch.testing.assert_close(statistics.hessian().double(), expected, rtol=1e-5, atol=1e-5)
    expected = 2 / 30 * (x - x_hat).T @ x_hat
    torch.testing.assert_close(statistics.delta().double(), expected, rtol=1e-5, atol=1e-5)
    assert GroupStatistics.of(quantized, None).delta() is None


def test_asking_for_the_hessian_leaves_the_sums_as_they_are():
    statistics = GroupStatistics.of(draw(30, 300), None)
    first = statistics.hessian()
    assert torch.equal(statistics.hessian(), first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_with_the_layer_and_the_number(value):
    rows = draw(30, IN_FEATURES)
    rows[3, 7], rows[4, 9] = value, value
    message = (
        "model.layers.1.mlp.up_proj: its calibration inputs hold NaN or infinite values "
        "(2 of 40 columns). Compute in a wider dtype (--dtype bfloat16 or float32), or check "
        "the model's weights."
    )
    with pytest.raises(LayerError, match=re.escape(message)):
        GroupStatistics.of(rows, None).require_finite("model.layers.1.mlp.up_proj")


def test_original_inputs_that_are_not_finite_are_refused():
    originals = draw(30, IN_FEATURES)
    originals[3, 7] = torch.inf
    with pytest.raises(LayerError, match="NaN or infinite values"):
        GroupStatistics.of(draw(30, IN_FEATURES), originals).require_finite("layer")


def test_finite_inputs_pass():
    GroupStatistics.of(draw(30, 300), draw(30, 300, seed=1)).require_finite("layer")
