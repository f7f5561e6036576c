import re

import pytest
import torch
from torch import Tensor

from onecomp.errors import QuantizationError
from onecomp.linalg import (
    HessianFactor,
    from_strips,
    gram_strips,
    one_thread,
    quadratic_form,
    strip_bounds,
)

SIZES = [1, 7, 127, 128, 300, 2100]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hessian_of(size: int, *, num_rows: int = 500, seed: int = 0) -> Tensor:
    rows = draw(num_rows, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / num_rows * rows.T @ rows


def damped(hessian: Tensor, percdamp: float) -> Tensor:
    result = hessian.double()
    return result + percdamp * result.diagonal().mean() * torch.eye(len(result))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES)
def test_strips_cover_all_columns_in_at_most_16_strips(size):
    bounds = strip_bounds(size)
    assert [a for a, _ in bounds] == [0, *(b for _, b in bounds[:-1])]
    assert bounds[-1][1] == size
    assert len(bounds) <= 16
    assert len(bounds) == 1 or min(b - a for a, b in bounds) >= 128


@pytest.mark.parametrize("size", SIZES)
def test_gram_strips_are_the_upper_part_of_the_gram_matrix(size):
    rows = draw(20, size, dtype=torch.float64)
    gram = rows.T @ rows
    for (a, b), strip in zip(strip_bounds(size), gram_strips(rows), strict=True):
        torch.testing.assert_close(strip, gram[a:b, a:])


@pytest.mark.parametrize("size", SIZES)
def test_from_strips_restores_a_symmetric_matrix_exactly(size):
    rows = draw(20, size)
    strips = gram_strips(rows)
    full = from_strips(strips)
    torch.testing.assert_close(full, rows.T @ rows, rtol=1e-4, atol=1e-3)
    for (a, b), strip in zip(strip_bounds(size), strips, strict=True):
        assert torch.equal(full[a:b, a:], strip)
        assert torch.equal(full[b:, a:b], strip[:, b - a :].T)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_quadratic_form_is_row_times_matrix_times_row(size):
    rows = draw(9, size, dtype=torch.float64)
    matrix = hessian_of(size).double()
    matrix = (matrix + matrix.T) / 2
    expected = torch.stack([row @ matrix @ row for row in rows])
    torch.testing.assert_close(quadratic_form(rows.T, matrix), expected)


@pytest.mark.parametrize("with_order", [False, True])
def test_factor_squared_is_the_inverse_of_the_damped_hessian(with_order):
    hessian = hessian_of(60)
    order = torch.argsort(hessian.diagonal(), descending=True) if with_order else None
    factor = HessianFactor.of(hessian, percdamp=0.01, order=order, dtype=torch.float64)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    inverse = torch.linalg.inv(damped(hessian, 0.01))
    if order is not None:
        inverse = inverse[order][:, order]
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_order", [False, True])
def test_right_divide_solves_with_the_damped_hessian(with_order):
    hessian, matrix = hessian_of(60), draw(7, 60, seed=9)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)) if with_order else None
    factor = HessianFactor.of(hessian, percdamp=0.01, order=order, dtype=torch.float64)
    expected = torch.linalg.solve(damped(hessian, 0.01), matrix.double(), left=False)
    torch.testing.assert_close(factor.right_divide(matrix).double(), expected, rtol=1e-3, atol=1e-4)


def test_permuting_and_inverse_order_cancel():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    factor = HessianFactor.of(hessian_of(60), percdamp=0.01, order=order)
    matrix = draw(3, 60)
    assert torch.equal(factor.permuted(matrix), matrix[:, order])
    assert torch.equal(factor.permuted(matrix)[:, factor.inverse_order], matrix)


def test_a_column_without_inputs_gets_a_diagonal_of_one():
    hessian = hessian_of(10)
    hessian[3], hessian[:, 3] = 0, 0
    repaired = hessian.clone()
    repaired[3, 3] = 1
    factor, expected = (HessianFactor.of(h, percdamp=0.01) for h in (hessian, repaired))
    assert torch.equal(factor.upper, expected.upper)
    assert hessian[3, 3] == 0  # the argument is left as it was


def test_a_matrix_that_is_not_positive_definite_is_named_with_a_remedy():
    hessian = torch.diag(torch.tensor([1.0, 1.0, -5.0, 1.0]))
    message = (
        "The Hessian is not positive definite with percdamp=0.01 (leading minor 2 of 4). "
        "Raise percdamp, or calibrate on more tokens than in_features=4."
    )
    with pytest.raises(QuantizationError, match=re.escape(message)):
        HessianFactor.of(hessian, percdamp=0.01)


def test_one_thread_restores_the_count_even_after_an_error(two_threads):
    def fail() -> None:
        with one_thread():
            raise ValueError(torch.get_num_threads())

    with pytest.raises(ValueError, match=r"^1$"):
        fail()
    assert torch.get_num_threads() == 2


def test_factor_has_the_same_bits_in_processes_of_one_and_two_threads(two_threads):
    hessian, matrix = hessian_of(400), draw(32, 400)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        with one_thread():
            factor = HessianFactor.of(hessian, percdamp=0.01)
            results.append((factor.upper, factor.right_divide(matrix)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
