"""How strong the regularization of each row is: as strong as its outputs bear."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.jointq.algorithm import Effort, jointq_quantize
from onecomp.quantizer.jointq.problem import Kept, Problem
from onecomp.quantizer.jointq.starts import GPTQStart, Starts

RELAXATION = (1.0, 0.1, 0.0)
"""Parts of the strength that is asked for, tried one after the other."""

Errors = Float[Tensor, "2 _"]
"""Squared weight error and output error of rows."""


@dataclass(frozen=True)
class LambdaPath(ABC):
    """Strengths of the regularization, tried in turn on the rows that want another."""

    lambdas: tuple[float, ...]

    @abstractmethod
    def goes_on(
        self, found: Errors, start: Errors, energy: Float[Tensor, "_"]
    ) -> Bool[Tensor, "_"]:
        """Which rows try the next strength.

        Args:
            found: Errors with the strengths so far.
            start: Errors of the start with the least output error.
            energy: Squares of the weights.
        """

    @abstractmethod
    def accepts(self, found: Errors, new: Errors, energy: Float[Tensor, "_"]) -> Bool[Tensor, "_"]:
        """Which rows take the next strength, and may try another; the others stop."""


@dataclass(frozen=True)
class Falling(LambdaPath):
    """One strength, and less of it where that costs a row more output error than allowed.

    Without regularization at last, a row's output error is not above that of its start.
    """

    largest_loss: float
    """Relative growth of the output error above that of the row's best start."""

    @classmethod
    def of(cls, strength: float, largest_loss: float) -> "Falling":
        """The strength, a tenth of it, and none."""
        strengths = dict.fromkeys(strength * part for part in RELAXATION)
        return cls(tuple(strengths), largest_loss)

    def goes_on(
        self, found: Errors, start: Errors, energy: Float[Tensor, "_"]
    ) -> Bool[Tensor, "_"]:
        """Which rows lose too much."""
        return found[1] > (1 + self.largest_loss) * start[1]

    def accepts(self, found: Errors, new: Errors, energy: Float[Tensor, "_"]) -> Bool[Tensor, "_"]:
        """Which rows lose less than before."""
        return new[1] < found[1]


@dataclass(frozen=True)
class Rising(LambdaPath):
    """Ever stronger, as long as a row's weights gain more than its outputs lose.

    The first is taken in any case, and the next wherever the squared error of the weights is still
    above ``skip_ew`` of their square. Otherwise the next is taken if both the weight error and the
    output error fall, or if the weight error falls by at least the fraction ``eps_w`` while the
    output error grows by at most ``eps_y``. A row stops at the first that it does not take.
    """

    eps_y: float
    eps_w: float
    skip_ew: float

    def goes_on(
        self, found: Errors, start: Errors, energy: Float[Tensor, "_"]
    ) -> Bool[Tensor, "_"]:
        """All of them."""
        return torch.ones_like(energy, dtype=torch.bool)

    def accepts(self, found: Errors, new: Errors, energy: Float[Tensor, "_"]) -> Bool[Tensor, "_"]:
        """By the rule above."""
        limits = found.new_tensor([[1 - self.eps_w], [1 + self.eps_y]])
        both_fall, worth_it = (new < found).all(dim=0), (new <= limits * found).all(dim=0)
        return both_fall | worth_it | (found[0] > self.skip_ew * energy)


@dataclass(frozen=True)
class RowSolver:
    """Solves rows with any strength of regularization."""

    problem_at: Callable[[Tensor, float], Problem]
    """The problem of columns ``(in, some)`` of the weight with a strength."""
    hessian: Float[Tensor, "in in"]
    """Without regularization, in the order of the problem's columns."""
    starts: Starts
    gptq_at: Callable[[float], GPTQStart | None]
    """What solves again with a strength."""
    effort: Effort

    def along(
        self, columns: Float[Tensor, "in out"], path: LambdaPath
    ) -> tuple[Kept, Float[Tensor, "out"]]:
        """The solution of every row, and the strength that it took last."""
        problem = self.problem_at(columns, 0.0)
        start = self.starts.best(problem)
        begun = self._errors(problem, start)
        del problem  # before another is there
        kept, found = self._solve(columns, start, path.lambdas[0])
        taken = torch.full_like(found[0], path.lambdas[0])
        energy = columns.square().sum(dim=0)
        rows = torch.arange(len(taken), device=taken.device)
        for strength in path.lambdas[1:]:
            going = path.goes_on(found[:, rows], begun[:, rows], energy[rows]).nonzero()[:, 0]
            rows, columns = rows[going], columns.index_select(1, going)
            if not len(rows):
                break
            problem = self.problem_at(columns, strength)
            warm = kept.rows(rows).measured(problem)
            warm.improve_by(start.rows(rows).measured(problem))
            del problem
            new, errors = self._solve(columns, warm, strength)
            taking = path.accepts(found[:, rows], errors, energy[rows]).nonzero()[:, 0]
            rows, columns = rows[taking], columns.index_select(1, taking)
            kept.put_rows(rows, new.rows(taking))
            found[:, rows], taken[rows] = errors[:, taking], strength
        return kept, taken

    def _solve(
        self, columns: Float[Tensor, "in _"], start: Kept, strength: float
    ) -> tuple[Kept, Errors]:
        problem = self.problem_at(columns, strength)
        kept = jointq_quantize(problem, start, self.gptq_at(strength), self.effort)
        return kept, self._errors(problem, kept)

    def _errors(self, problem: Problem, kept: Kept) -> Errors:
        error = kept.error(problem)
        return torch.stack([error.square().sum(dim=0), quadratic_form(error, self.hessian)])
