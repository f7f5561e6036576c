import pytest
import torch
from torch import Tensor

from onecomp.quantizer.cq import algorithm
from onecomp.quantizer.cq.algorithm import _split, two_clusters


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best_of_all_thresholds(values: Tensor, weights: Tensor) -> float:
    """Least weighted sum of squares within two clusters, over all thresholds."""
    values, weights = values.double(), weights.double()

    def within(part: Tensor) -> Tensor:
        mean = (weights * values)[part].sum() / weights[part].sum()
        return (weights * (values - mean).square())[part].sum()

    splits = [values <= threshold for threshold in values.unique()[:-1]]
    return min(float(within(left) + within(~left)) for left in splits)


@pytest.mark.parametrize("kind", ["plain", "weighted", "ties", "skewed"])
def test_the_split_is_the_best_over_all_thresholds(kind):
    sets, weights = draw(12, 31), torch.ones(12, 31)
    if kind == "weighted":
        weights = draw(12, 31, seed=1).exp()
    if kind == "ties":
        sets = sets.mul(2).round()
    if kind == "skewed":
        sets = sets.exp()
    left, right = two_clusters(sets, weights)
    middle = (left + right) / 2
    nearest = torch.where(sets >= middle[:, None], right[:, None], left[:, None])
    found = (weights * (sets - nearest).square()).double().sum(dim=1)
    for row in range(12):
        assert found[row].item() == pytest.approx(best_of_all_thresholds(sets[row], weights[row]))


def test_a_split_by_hand():
    left, right = two_clusters(torch.tensor([[0.0, 1.0, 10.0, 12.0]]), torch.ones(1, 4))
    assert (left.item(), right.item()) == (0.5, 11.0)
    heavy = torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    left, _ = two_clusters(torch.tensor([[0.0, 1.0, 10.0, 12.0]]), heavy)
    assert left.item() == 0.25


def test_numbers_that_are_all_alike_have_one_mean():
    left, right = two_clusters(torch.tensor([[0.3] * 5, [0.0] * 5]), torch.ones(2, 5))
    assert torch.allclose(left, torch.tensor([0.3, 0.0]))
    assert torch.equal(left, right)
    assert two_clusters(torch.tensor([[2.0]]), torch.ones(1, 1))[1].item() == 2.0


def test_all_rows_at_once_are_row_by_row(monkeypatch):
    sets, weights = draw(2000, 64), draw(1, 64, seed=1).exp().expand(2000, 64)
    left, right = two_clusters(sets, weights)
    alone = [two_clusters(row[None], weights[:1]) for row in sets]
    assert torch.equal(left, torch.cat([pair[0] for pair in alone]))
    assert torch.equal(right, torch.cat([pair[1] for pair in alone]))
    monkeypatch.setattr(algorithm, "SETS_CHUNK", 7 * 64)
    assert torch.equal(two_clusters(sets, weights)[0], left)


def test_a_large_set_is_split_as_exactly_as_its_bins_tell_apart():
    values = torch.cat([draw(1, 60_000), 4 + draw(1, 30_000, seed=1)], dim=1)
    weights = draw(1, 90_000, seed=2).abs() + 0.1
    left, right = two_clusters(values, weights)
    cut = (left + right) / 2
    for side, mean in ((values < cut, left), (values >= cut, right)):
        expected = (weights * values)[side].double().sum() / weights[side].double().sum()
        torch.testing.assert_close(mean.double(), expected[None], rtol=1e-3, atol=1e-3)
    whole = [part.item() for part in _split(values.double(), weights.double())]
    assert [left.item(), right.item()] == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_a_large_set_of_one_number_has_it_twice(value):
    left, right = two_clusters(torch.full((1, 70_000), value), torch.ones(1, 70_000))
    assert left.item() == right.item() == pytest.approx(value)
