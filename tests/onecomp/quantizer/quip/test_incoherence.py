import math

import pytest
import torch
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.quip.incoherence import (
    MATRICES,
    Incoherence,
    column_rescaling,
    factor_sizes,
    mix,
    random_signs,
)

POWERS = [1, 2, 8, 64]
SIZES = {"kron": [1, 2, 13, 24, 36, 96], "had": POWERS}
EVERY_SIZE = [(mode, size) for mode, sizes in SIZES.items() for size in sizes]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_with_outliers(size: int) -> Tensor:
    """A few inputs carry nearly all of the energy, as in language models."""
    rows = draw(4 * size, size, seed=1) @ draw(size, size, seed=2)
    rows[:, :2] *= 50
    return 2 / len(rows) * rows.T @ rows


def weight_with_outliers(out_features: int, in_features: int) -> Tensor:
    weight = draw(out_features, in_features)
    weight[3, 5] = 40.0
    weight[:, 7] *= 20
    return weight


def transforms(weight: Tensor, hessian: Tensor, mode: str = "kron", seed: int = 0) -> Incoherence:
    return Incoherence.draw(weight, hessian.diagonal(), mode, seed)


@pytest.mark.parametrize(("mode", "size"), EVERY_SIZE)
def test_mixing_is_orthogonal_and_its_own_inverse(mode, size):
    mixed = mix(torch.eye(size), mode)
    torch.testing.assert_close(mixed.T @ mixed, torch.eye(size), rtol=0, atol=2e-6)
    torch.testing.assert_close(mix(mixed, mode), torch.eye(size), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("mode", "size"), EVERY_SIZE)
def test_mixing_is_the_kronecker_product_of_two_matrices(mode, size):
    left, right = (MATRICES[mode](n) for n in factor_sizes(size))
    columns = draw(size, 3)
    torch.testing.assert_close(mix(columns, mode), torch.kron(left, right) @ columns)


@pytest.mark.parametrize(("mode", "size"), EVERY_SIZE)
def test_no_entry_of_the_mixing_matrix_stands_out(mode, size):
    most = 1.0 if mode == "had" else 2.0
    assert mix(torch.eye(size), mode).abs().max() <= most / math.sqrt(size) + 1e-6


@pytest.mark.parametrize("size", range(1, 60))
def test_factor_sizes_are_the_divisors_nearest_to_the_root(size):
    small, large = factor_sizes(size)
    assert small * large == size
    assert small <= large
    assert not any(size % d == 0 for d in range(small + 1, math.isqrt(size) + 1))


@pytest.mark.parametrize("mode", MATRICES)
def test_output_errors_are_the_same_on_both_sides(mode):
    weight, hessian = weight_with_outliers(32, 64), hessian_with_outliers(64)
    both = transforms(weight, hessian, mode)
    inside = quadratic_form(both.weight(weight).double(), both.hessian(hessian).double()).sum()
    outside = quadratic_form(weight.T.double(), hessian.double()).sum()
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("mode", "shape"), [("kron", (24, 26)), ("kron", (13, 7)), ("had", (8, 32))]
)
def test_the_weight_comes_back(mode, shape):
    weight = draw(*shape)
    both = transforms(weight, torch.eye(shape[1]), mode)
    assert both.weight(weight).shape == (shape[1], shape[0])
    torch.testing.assert_close(both.undo(both.weight(weight)), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MATRICES)
def test_incoherence_falls(mode):
    """The largest entry beside the mean square, of the weight and of the eigenvectors."""
    weight, hessian = weight_with_outliers(32, 64), hessian_with_outliers(64)
    both = transforms(weight, hessian, mode)

    def of_weight(matrix: Tensor) -> float:
        return (matrix.abs().max() / matrix.square().mean().sqrt()).item()

    def of_hessian(matrix: Tensor) -> float:
        return torch.linalg.eigh(matrix.double()).eigenvectors.abs().max().item() * 8

    assert of_weight(both.weight(weight)) < of_weight(weight) / 2
    assert of_hessian(both.hessian(hessian)) < of_hessian(hessian) / 1.5


def test_the_hessian_stays_symmetric_and_balanced():
    weight, hessian = weight_with_outliers(32, 64), hessian_with_outliers(64)
    rotated = transforms(weight, hessian).hessian(hessian)
    diagonal, before = rotated.diagonal(), hessian.diagonal()
    assert torch.equal(rotated, rotated.T)
    assert diagonal.max() / diagonal.median() < 0.05 * before.max() / before.median()


def test_signs_follow_from_the_seed_alone():
    state = torch.get_rng_state()
    first = random_signs(50, 3)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert torch.equal(random_signs(50, 3), first)
    assert not torch.equal(random_signs(50, 4), first)
    assert torch.equal(first.abs(), torch.ones(50))


def test_signs_of_rows_and_columns_differ():
    both = transforms(draw(64, 64), torch.eye(64))
    assert not torch.equal(both.row_signs, both.column_scale.sign())


def test_columns_are_rescaled_more_finely_where_inputs_are_large_and_weights_small():
    curvature = torch.tensor([1.0, 16.0, 1.0, 1.0])
    weight = torch.tensor([[1.0, 1.0, 0.1, 0.0]])
    scale = column_rescaling(weight, curvature)
    assert scale[1] > scale[0]
    assert scale[2] > scale[0]
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert torch.equal(scale, scale.half().float())


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), 1e-30)])
def test_weights_of_nothing_have_finite_scales(weight):
    assert column_rescaling(weight, torch.zeros(4)).isfinite().all()
