"""How strong the regularization of each row is: as strong as its outputs bear."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.jointq.algorithm import Effort, jointq_quantize
from onecomp.quantizer.jointq.problem import Problem, State
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

    problem_at: Callable[[float], Problem]
    """The problem with a strength."""
    hessian: Float[Tensor, "in in"]
    """Without regularization, in the order of the problem's columns."""
    starts: Starts
    gptq_at: Callable[[float], GPTQStart | None]
    """What solves again with a strength."""
    effort: Effort

    def along(self, path: LambdaPath) -> tuple[State, Float[Tensor, "out"]]:
        """The solution of every row, and the strength that it took last."""
        problem = self.problem_at(path.lambdas[0])
        start = self.starts.best(self.problem_at(0.0)).within(problem)
        state = self._solve(problem, start, path.lambdas[0])
        taken = torch.full_like(state.error[0], path.lambdas[0])
        found, begun = self._errors(state), self._errors(start)
        energy = problem.columns.square().sum(dim=0)
        rows = torch.arange(len(taken), device=taken.device)
        for strength in path.lambdas[1:]:
            rows = rows[path.goes_on(found[:, rows], begun[:, rows], energy[rows])]
            if not len(rows):
                break
            part = self.problem_at(strength).rows(rows)
            warm = state.rows(rows).within(part)
            warm.improve_by(start.rows(rows).within(part))
            new = self._solve(part, warm, strength)
            errors = self._errors(new)
            kept = path.accepts(found[:, rows], errors, energy[rows]).nonzero()[:, 0]
            rows = rows[kept]
            state.put_rows(rows, new.rows(kept))
            found[:, rows], taken[rows] = errors[:, kept], strength
        return state, taken

    def _solve(self, problem: Problem, start: State, strength: float) -> State:
        return jointq_quantize(problem, start, self.gptq_at(strength), self.effort)

    def _errors(self, state: State) -> Errors:
        output = quadratic_form(state.error, self.hessian)
        return torch.stack([state.error.square().sum(dim=0), output])
