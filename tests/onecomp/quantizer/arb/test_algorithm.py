from itertools import pairwise

import pytest
import torch
from torch import Tensor

from onecomp.quantizer.arb.algorithm import alternate, staged_levels
from onecomp.quantizer.binary import Levels


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(groups: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """Weighted squared distance to the nearer level."""
    ends = torch.stack([end[:, None] for end in levels.ends()])
    return (weights * (groups - ends).square().amin(dim=0)).sum(dim=1)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_the_objective_falls_in_every_iteration(num_groups):
    groups = draw(num_groups, 60, 20).exp()
    weights = draw(num_groups, 60, 1, seed=1).exp()
    mean = groups.mean(dim=1)
    levels = Levels(mean, torch.zeros_like(mean))
    errors = [squares(groups, weights, levels)]
    for _ in range(8):
        levels = alternate(groups, weights, levels)
        errors.append(squares(groups, weights, levels))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert (errors[1] < errors[0]).all()
    assert (errors[8] < errors[1]).float().mean() > 0.9


def test_one_round_by_hand():
    groups = torch.tensor([[[-1.0], [0.0], [4.0], [5.0]]])
    start = Levels(torch.tensor([[2.0]]), torch.tensor([[0.0]]))
    found = alternate(groups, torch.ones(1, 4, 1), start)
    assert (found.half.item(), found.centre.item()) == (2.5, 2.0)


def test_stages_are_levels_of_the_weights_nearest_to_the_mean():
    columns = torch.tensor([-9.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 9.0])[:, None]
    whole, inner = staged_levels(columns, torch.ones(8), 1, split_points=2)
    assert (whole.centre.item(), whole.half.item()) == (0.0, 3.0)
    assert (inner.centre.item(), inner.half.item()) == (0.0, 1.0)


def test_the_first_stage_is_that_of_a_single_one():
    columns, importance = draw(64, 10), draw(64, seed=1).exp()
    alone = staged_levels(columns, importance, 2, split_points=1)
    first, *others = staged_levels(columns, importance, 2, split_points=3)
    assert torch.equal(alone[0].half, first.half)
    assert len(others) == 2
    assert (others[1].half < first.half).all()
