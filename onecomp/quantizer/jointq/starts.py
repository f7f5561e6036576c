"""Where the search may start: solutions of the whole row, made in one pass."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.linalg import HessianFactor
from onecomp.quantizer.gptq.algorithm import GridRule, Solution, gptq_quantize
from onecomp.quantizer.grid import Grid, GridSearch
from onecomp.quantizer.jointq.coordinate_search import store_scales, sweep_codes
from onecomp.quantizer.jointq.local_search import search_in_parts
from onecomp.quantizer.jointq.problem import Kept, Problem, State, nearest_state, state_on


@dataclass(frozen=True)
class GPTQStart:
    """GPTQ as a start, and again on scales found since."""

    factor: HessianFactor
    """Of the Hessian in the order of the problem's columns."""
    importance: Float[Tensor, "in"] | None
    """Weight of each column in the range search."""
    search: GridSearch | None
    live: bool
    """Fit each group's grid when its first column is reached, not to the original weight."""
    blocksize: int

    def state(self, problem: Problem) -> State:
        """Codes on grids of its own."""
        return self._solved(problem, live=self.live and self.factor.order is None)

    def again(self, problem: Problem, kept: Kept) -> State:
        """Codes on the grids of a solution.

        Each column makes up for the errors of all before it, where single steps of a code end in
        the nearest of many minima.
        """
        grid = Grid(kept.scale, kept.zero_point, problem.wbits)
        return self._solved(problem, live=False, grid=grid)

    def _solved(self, problem: Problem, *, live: bool, grid: Grid | None = None) -> State:
        rule = GridRule(
            problem.wbits, problem.groupsize, problem.symmetric, self.search, static=not live
        )
        solution: Solution = gptq_quantize(
            problem.columns.T,
            replace(self.factor),  # what it computes for GPTQ, as large as itself, goes with it
            rule,
            blocksize=self.blocksize,
            importance=self.importance,
            grid=grid,
        )
        return state_on(problem, solution.codes, solution.grid)


def in_group_order(factor: HessianFactor) -> HessianFactor:
    """The same factor where the columns are in its order already."""
    return replace(factor, order=None)


def clip_state(problem: Problem, *, propagate: bool) -> State:
    """Plain grids, then the local search in each group.

    Args:
        problem: The problem.
        propagate: The target of a group includes what the groups before it left ("EP"); otherwise
            each group is a problem of its own.

    Returns:
        Scales are representable in float16, as those of all starts.
    """
    state = nearest_state(problem)
    error = state.error
    for t, group in enumerate(problem.groups):
        known = slice(0 if propagate else group.start, group.stop)
        gradient = problem.gram[group, known] @ error[known]
        state.steps[group], state.scale[t] = search_in_parts(problem, state, t, gradient)
        torch.mul(state.steps[group], state.scale[t], out=error[group])
        error[group] -= problem.columns[group]
    store_scales(problem, state)
    sweep_codes(problem, state)
    return state


@dataclass(frozen=True)
class Starts:
    """Which solutions the search starts from, beside rounding to nearest: the best of each row."""

    clip: bool
    clip_propagating: bool
    gptq: GPTQStart | None

    def best(self, problem: Problem) -> Kept:
        """A solution whose scales are representable in float16."""
        best = Kept.of(nearest_state(problem))
        for is_wanted, propagate in ((self.clip, False), (self.clip_propagating, True)):
            if is_wanted:
                best.improve_by(Kept.of(clip_state(problem, propagate=propagate)))
        if self.gptq is not None:
            best.improve_by(Kept.of(self.gptq.state(problem)))
        return best
