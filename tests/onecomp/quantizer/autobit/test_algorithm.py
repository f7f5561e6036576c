"""The integer programme against trying everything."""

import itertools
import random

import pytest

from onecomp.errors import ConfigError
from onecomp.quantizer.autobit.algorithm import TiedSet, allocate, reach, tie

BITS = (2, 3, 4, 8)


def sets_of(count: int, seed: int = 0) -> list[TiedSet]:
    """Sets of different sizes and sensitivities."""
    draw = random.Random(seed)
    sets = []
    for index in range(count):
        size, scale = draw.randint(1, 8) * 4096, 10 ** draw.uniform(-3, 3)
        bits = tuple(size * b + size // 64 * (16 + b) for b in BITS)
        errors = tuple(scale * 4.0**-b * draw.uniform(0.8, 1.2) for b in BITS)
        sets.append(TiedSet((f"layer{index}",), size, bits, errors))
    return sets


def total(sets: list[TiedSet], chosen: tuple[int, ...] | list[int], what: str) -> float:
    return sum(getattr(part, what)[index] for part, index in zip(sets, chosen, strict=True))


def size(sets: list[TiedSet]) -> int:
    return sum(part.num_weights for part in sets)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [2.3, 2.9, 4.0, 5.5])
def test_no_assignment_within_the_budget_has_a_smaller_error(target, seed):
    sets = sets_of(6, seed)
    chosen = allocate(sets, target)
    assert total(sets, chosen, "bits") <= target * size(sets)
    tried = itertools.product(range(len(BITS)), repeat=len(sets))
    least = min(
        total(sets, each, "errors")
        for each in tried
        if total(sets, each, "bits") <= target * size(sets)
    )
    assert total(sets, chosen, "errors") == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("target", [2.3, 3.1, 4.3125, 6.0])
def test_many_layers_spend_the_budget_and_no_bit_more(target):
    sets = sets_of(120)
    spent = total(sets, allocate(sets, target), "bits")
    assert (target - 0.05) * size(sets) <= spent <= target * size(sets)


def test_a_target_that_one_candidate_meets_exactly_is_met_by_it():
    sets = [TiedSet((str(i),), 64, (64 * 2 + 18, 64 * 4 + 20), (5.0, 1.0)) for i in range(3)]
    assert allocate(sets, 4 + 20 / 64) == [1, 1, 1]
    assert allocate(sets, 2 + 18 / 64) == [0, 0, 0]


def test_a_candidate_that_is_not_for_a_layer_is_not_taken():
    sets = [TiedSet(("a",), 10, (None, 40), (0.0, 7.0)), TiedSet(("b",), 10, (20, 40), (3.0, 1.0))]
    assert allocate(sets, 3.0) == [1, 0]
    assert reach(sets) == (60, 80)


def test_too_small_a_target_is_refused_with_what_there_is():
    sets = sets_of(4)
    with pytest.raises(ConfigError, match=r"from 2\.2812 to 8\.3750"):
        allocate(sets, 2.2)


def test_layers_are_tied_within_their_parent_only():
    names = ["0.attn.q", "0.attn.k", "0.mlp.e.0.up", "0.mlp.e.0.gate", "0.mlp.e.1.up", "1.attn.q"]
    assert tie(names, [["q", "k", "v"], ["gate", "up"]]) == [
        ("0.attn.q", "0.attn.k"),
        ("0.mlp.e.0.up", "0.mlp.e.0.gate"),
        ("0.mlp.e.1.up",),
        ("1.attn.q",),
    ]
