"""Small problems for the tests of JointQ."""

import torch
from torch import Tensor

from onecomp.linalg import HessianFactor
from onecomp.quantizer.grid import GridSearch
from onecomp.quantizer.jointq.problem import Problem, State, damped, regularizer
from onecomp.quantizer.jointq.starts import GPTQStart


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(size: int, seed: int = 0, num_tokens: int | None = None) -> Tensor:
    """Singular with fewer tokens than columns."""
    num_tokens = 4 * size if num_tokens is None else num_tokens
    rows = draw(num_tokens, size, seed=seed) @ draw(size, size, seed=seed + 1)
    return 2 / num_tokens * rows.T @ rows


def problem(
    num_rows: int = 24,
    size: int = 48,
    *,
    groupsize: int = 16,
    wbits: int = 3,
    symmetric: bool = False,
    strength: float = 0.0,
    hessian: Tensor | None = None,
) -> Problem:
    hessian = correlated_hessian(size) if hessian is None else hessian
    gram = damped(hessian, strength * regularizer(hessian, "diagonal", 0.5))
    columns = draw(size, num_rows, seed=7)
    return Problem(columns, gram, groupsize, wbits, symmetric)


def gptq_start(of: Problem, *, order: Tensor | None = None) -> GPTQStart:
    factor = HessianFactor.of(of.gram, percdamp=0.01, order=order, dtype=torch.float64)
    return GPTQStart(factor, of.gram.diagonal().sqrt(), GridSearch(40), live=False, blocksize=128)


def exact_objective(of: Problem, state: State) -> Tensor:
    """Of the codes and scales alone, in float64."""
    error = state.steps.double() * of.per_column(state.scale).double() - of.columns.double()
    return ((of.gram.double() @ error) * error).sum(dim=0)


def in_bounds(of: Problem, state: State) -> bool:
    codes = state.steps + of.per_column(state.zero_point)
    is_whole = bool((codes == codes.round()).all())
    return is_whole and codes.min().item() >= 0 and codes.max().item() <= of.maxq
