import torch
from torch import Tensor

from onecomp.quantizer.binary import Binary, Levels, sign_mean
from onecomp.quantizer.binary_group import BinarySearch, importance_of
from onecomp.quantizer.factors import HessianFactors

SEARCH = BinarySearch(groupsize=-1, num_rounds=3, percdamp=0.01, drift_ratio=0.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_factors(size: int, seed: int = 0) -> HessianFactors:
    rows = draw(4 * size, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return HessianFactors(2 / len(rows) * rows.T @ rows, len(rows))


def sign_means(columns: Tensor, importance: Tensor, num_groups: int) -> list[Levels]:
    return [sign_mean(columns, num_groups).levels]


def wrong(columns: Tensor, importance: Tensor, num_groups: int) -> list[Levels]:
    levels = sign_mean(columns, num_groups).levels
    return [Levels(levels.centre + 1e3, levels.half)]


def errors(binary: Binary, weight: Tensor, factors: HessianFactors) -> Tensor:
    return binary.errors(weight.T.contiguous(), factors.hessian)


def test_compensation_fit_and_turns_are_far_better_than_the_sign_times_the_mean():
    weights, factors = {"a": draw(30, 64), "b": draw(20, 64, seed=1)}, correlated_factors(64)
    found = SEARCH.group(weights, factors, sign_means)
    assert list(found) == ["a", "b"]
    for name, weight in weights.items():
        plain = sign_mean(weight.T.contiguous())
        least = errors(found[name], weight, factors)
        assert least.sum() < 0.6 * errors(plain, weight, factors).sum()
        assert torch.allclose(factors.row_errors[name][0], least, rtol=1e-4)
        energy = torch.einsum("ri,ij,rj->r", weight, factors.hessian, weight)
        assert torch.allclose(factors.row_errors[name][1], energy, rtol=1e-4)
    assert factors.rounded_rows == 0


def test_rows_that_the_sign_times_the_mean_serves_better_become_that_and_are_counted():
    weight, factors = draw(30, 64), correlated_factors(64)
    search = BinarySearch(groupsize=32, num_rounds=0, percdamp=0.01, drift_ratio=0.0)
    found = search.group({"a": weight}, factors, wrong)["a"]
    assert factors.rounded_rows == 30
    assert torch.equal(found.columns(), sign_mean(weight.T, 2).columns())


def test_layers_alone_are_as_layers_together():
    weights, factors = {"a": draw(128, 48), "b": draw(160, 48, seed=1)}, correlated_factors(48)
    together = SEARCH.group(weights, factors, sign_means)
    for name, weight in weights.items():
        alone = SEARCH.group({name: weight}, factors.for_piece(), sign_means)[name]
        assert (alone.signs != together[name].signs).float().mean() < 1e-3


def test_the_search_goes_on_without_compensation_where_no_factor_exists():
    hessian = -10 * torch.eye(16) + torch.ones(16, 16)
    factors = HessianFactors(hessian)
    SEARCH.group({"a": draw(4, 16)}, factors, sign_means)
    assert any(text.startswith("signs not compensated: ") for text in factors.fallbacks)


def test_importance_is_relative_and_above_zero():
    relative = importance_of(torch.diag(torch.tensor([0.0, 1.0, 3.0])))
    assert torch.equal(relative, torch.tensor([1e-6, 0.75, 2.25]))
    assert torch.equal(importance_of(torch.zeros(2, 2)), torch.tensor([1e-6, 1e-6]))
