"""The problem that JointQ solves, and where a solution of it stands.

Everything here is transposed (``in out``), as in GPTQ's solver: a column of all rows is contiguous.
Columns are in the order in which they form groups: group ``t`` is columns ``t * groupsize`` to
``(t + 1) * groupsize - 1``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from onecomp.linalg import quadratic_form
from onecomp.quantizer.grid import LARGEST_SCALE, SMALLEST_SCALE, Grid, fit_grid, round_to_nearest

LEAST_DAMPING = 1e-6
"""Of the mean diagonal, added to every Hessian: a column that no token used is rounded to nearest,
and directions that float32 does not resolve stay bounded."""


@dataclass(frozen=True)
class Problem:
    """For every row ``w``, the least ``(ŵ - w) gram (ŵ - w)ᵀ`` over codes and scales of ``ŵ``."""

    columns: Float[Tensor, "in out"]
    """The weight."""
    gram: Float[Tensor, "in in"]
    """Regularized Hessian, with a positive diagonal."""
    groupsize: int
    wbits: int
    symmetric: bool

    @property
    def maxq(self) -> int:
        """Largest code."""
        return 2**self.wbits - 1

    @property
    def groups(self) -> list[slice]:
        """Columns of each group."""
        edges = range(0, len(self.columns), self.groupsize)
        return [slice(start, start + self.groupsize) for start in edges]

    def by_group(self, columns: Float[Tensor, "in out"]) -> Float[Tensor, "groups columns out"]:
        """A view with the columns of each group."""
        return columns.view(-1, self.groupsize, columns.shape[1])

    def per_column(self, values: Float[Tensor, "groups out"]) -> Float[Tensor, "in out"]:
        """A group's value for each of its columns."""
        return values.repeat_interleave(self.groupsize, dim=0)

    def rows(self, chosen: Tensor) -> "Problem":
        """The same for some rows, by number; a number may occur several times."""
        columns = self.columns[:, chosen].contiguous()
        return Problem(columns, self.gram, self.groupsize, self.wbits, self.symmetric)

    def state(
        self,
        steps: Float[Tensor, "in out"],
        scale: Float[Tensor, "groups out"],
        zero_point: Float[Tensor, "groups out"],
    ) -> "State":
        """The state with these codes and scales, none of which is copied."""
        error = self.error(steps, scale)
        return State(steps, scale, zero_point, error, self.gram @ error)

    def error(
        self, steps: Float[Tensor, "in out"], scale: Float[Tensor, "groups out"]
    ) -> Float[Tensor, "in out"]:
        """``scale * steps - columns``."""
        scaled = self.by_group(steps) * scale[:, None]
        return scaled.view_as(self.columns).sub_(self.columns)


@dataclass
class State:
    """Codes and scales of all rows, and what they leave of the error; solvers write to it."""

    steps: Float[Tensor, "in out"]
    """Codes counted from the zero point, whole numbers; the weight is ``scale * steps``."""
    scale: Float[Tensor, "groups out"]
    """Of any sign, never zero."""
    zero_point: Float[Tensor, "groups out"]
    """Whole numbers 0..maxq."""
    error: Float[Tensor, "in out"]
    """``scale * steps - columns``."""
    gradient: Float[Tensor, "in out"]
    """``gram @ error``: half the objective's gradient."""

    def objective(self) -> Float[Tensor, "out"]:
        """What is minimized, of every row; infinite where it is not a number."""
        return (self.error * self.gradient).sum(dim=0).nan_to_num_(nan=torch.inf)

    def improve_by(self, other: "State") -> None:
        """Take over the rows of another state that have a lower objective."""
        _replace_rows(self._tensors(), other._tensors(), other.objective() < self.objective())

    def rows(self, chosen: Tensor) -> "State":
        """Copies of some rows, by number; a number may occur several times."""
        return State(*(tensor[:, chosen].contiguous() for tensor in self._tensors()))

    def put_rows(self, chosen: Tensor, other: "State") -> None:
        """Write rows back to where ``rows`` took them from; each number once."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine[:, chosen] = theirs

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.steps, self.scale, self.zero_point, self.error, self.gradient


@dataclass
class Kept:
    """A state put aside: a byte a weight instead of twelve."""

    steps: Int8[Tensor, "in out"]
    scale: Float[Tensor, "groups out"]
    zero_point: Float[Tensor, "groups out"]
    objective: Float[Tensor, "out"]
    """In the problem in which it was last a state."""

    @classmethod
    def of(cls, state: State) -> "Kept":
        """A copy."""
        steps = state.steps.to(torch.int8)
        return cls(steps, state.scale.clone(), state.zero_point.clone(), state.objective())

    def state(self, problem: Problem) -> State:
        """A state that may be written to, in any problem of the same shape."""
        steps = self.steps.to(problem.columns.dtype)
        return problem.state(steps, self.scale.clone(), self.zero_point.clone())

    def error(self, problem: Problem) -> Float[Tensor, "in out"]:
        """Of the weights."""
        return problem.error(self.steps.to(problem.columns.dtype), self.scale)

    def measured(self, problem: Problem) -> "Kept":
        """The same, nothing copied, with its objective in a problem."""
        objective = quadratic_form(self.error(problem), problem.gram)
        return replace(self, objective=objective.nan_to_num_(nan=torch.inf))

    def improve_by(self, other: "Kept") -> None:
        """Take over the rows of another that have a lower objective."""
        _replace_rows(self._tensors(), other._tensors(), other.objective < self.objective)

    def rows(self, chosen: Tensor) -> "Kept":
        """Copies of some rows, by number."""
        return Kept(*(tensor[..., chosen] for tensor in self._tensors()))

    def put_rows(self, chosen: Tensor, other: "Kept") -> None:
        """Write rows back to where ``rows`` took them from; each number once."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine[..., chosen] = theirs

    def split(self, sizes: list[int]) -> list["Kept"]:
        """Cut by rows, as views."""
        parts = (tensor.split(sizes, dim=-1) for tensor in self._tensors())
        return [Kept(*tensors) for tensors in zip(*parts, strict=True)]

    @staticmethod
    def join(parts: Sequence["Kept"]) -> "Kept":
        """The inverse of ``split``."""
        if len(parts) == 1:
            return parts[0]
        tensors = zip(*(part._tensors() for part in parts), strict=True)
        return Kept(*(torch.cat(same, dim=-1) for same in tensors))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.steps, self.scale, self.zero_point, self.objective


def _replace_rows(
    mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...], rows: Bool[Tensor, "out"]
) -> None:
    for old, new in zip(mine, theirs, strict=True):
        torch.where(rows, new, old, out=old)


def damped(hessian: Float[Tensor, "in in"], added: Float[Tensor, "in"]) -> Float[Tensor, "in in"]:
    """A copy of the Hessian with ``added`` on its diagonal, and always a little more.

    A Hessian of zeros becomes the identity: rows are then rounded to nearest.
    """
    gram = hessian.clone()
    mean = hessian.diagonal().mean()
    gram.diagonal().add_(added).add_(torch.where(mean > 0, mean * LEAST_DAMPING, 1.0))
    return gram


def regularizer(hessian: Float[Tensor, "in in"], mode: str, gamma: float) -> Float[Tensor, "in"]:
    """Diagonal of ``R`` in units of the Hessian: with lambda = 1 its mean input energy.

    Both the Hessian and this are means over tokens and go with the square of the inputs' unit, so
    that lambda means the same for any number of tokens and any scale of the inputs.

    Args:
        hessian: ``2 / tokens * XᵀX``.
        mode: ``"identity"`` for the mean diagonal in every column, or ``"diagonal"`` for
            ``mean * (h_jj / mean) ** gamma``.
        gamma: 0 for the identity, 1 for the Hessian's own diagonal.
    """
    diagonal = hessian.diagonal().clamp(min=0)
    mean = diagonal.mean()
    if mode == "identity":
        return mean.expand(len(diagonal)).clone()
    relative = diagonal / torch.where(mean > 0, mean, 1.0)
    return mean * relative.pow(gamma)


def storable(scale: Float[Tensor, "groups out"]) -> Float[Tensor, "groups out"]:
    """The nearest scales that float16 holds, never zero; the sign stays."""
    magnitude = scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).float()
    return torch.copysign(magnitude, scale)


def nearest_state(problem: Problem) -> State:
    """Every weight rounded on its own, on the plain grid of its group (RTN)."""
    groups = problem.by_group(problem.columns)
    grid = fit_grid(groups, wbits=problem.wbits, sym=problem.symmetric)
    codes = round_to_nearest(groups, grid).flatten(0, 1).float()
    return state_on(problem, codes, grid)


def state_on(problem: Problem, codes: Float[Tensor, "in out"], grid: Grid) -> State:
    """The state with these codes 0..maxq, which are used up, on these grids."""
    problem.by_group(codes).sub_(grid.zero_point[:, None])
    return problem.state(codes, grid.scale.clone(), grid.zero_point.clone())
