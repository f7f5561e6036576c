"""JointQ: choose codes and scales of a layer together, so that its output changes least.

GPTQ fixes every group's scale first and rounds each column once. JointQ, the joint optimization of
Fujitsu's OneComp, takes the best of several such solutions for each row and goes on from there:
single codes are changed as long as the output error falls, scales are solved for all groups of a
row at once, and both are repeated. Beyond the original there are sweeps over all codes at fixed
scales, and GPTQ again on the scales found so far.
"""

from dataclasses import dataclass, replace

from onecomp.quantizer.jointq.coordinate_search import (
    centre_codes,
    solve_scales,
    sweep_codes,
)
from onecomp.quantizer.jointq.local_search import search_groups
from onecomp.quantizer.jointq.perturbation import Perturbation, perturb
from onecomp.quantizer.jointq.problem import Kept, Problem, State, storable
from onecomp.quantizer.jointq.starts import GPTQStart

SWEEPS = 2
"""Sweeps, each with new scales after it, before the local search."""
FINAL_SWEEPS = 2
"""Sweeps on the scales that are stored."""


@dataclass(frozen=True)
class Effort:
    """How long the search goes on after its start."""

    num_restarts: int
    """How often GPTQ solves again on the scales found, where it is one of the starts."""
    perturbation: Perturbation | None = None


def jointq_quantize(problem: Problem, start: Kept, gptq: GPTQStart | None, effort: Effort) -> Kept:
    """Codes and scales at least as good as those of the start, in every row.

    Args:
        problem: The problem.
        start: Its scales are representable in float16. It is not written to.
        gptq: Solves again; None to go without.
        effort: How much is tried.

    Returns:
        A solution whose scales are representable in float16.
    """
    state = start.state(problem)
    start = replace(start, objective=state.objective())
    _refine(problem, state)
    best = Kept.of(state)
    del state  # before another is there
    for _ in range(effort.num_restarts if gptq is not None else 0):
        again = gptq.again(problem, best)
        _refine(problem, again)
        best.improve_by(Kept.of(again))
        del again
    if effort.perturbation is not None:
        state = best.state(problem)
        perturb(problem, state, effort.perturbation)
        best = Kept.of(state)
    stored = _swept(problem, replace(best, scale=storable(best.scale))).measured(problem)
    stored.improve_by(start)
    return stored


def _swept(problem: Problem, kept: Kept) -> Kept:
    state = kept.state(problem)
    for _ in range(FINAL_SWEEPS):
        sweep_codes(problem, state)
    return Kept.of(state)


def _refine(problem: Problem, state: State) -> None:
    """Go on to a state that single changes do not improve much."""
    for _ in range(SWEEPS):
        centre_codes(problem, state)
        sweep_codes(problem, state)
        solve_scales(problem, state)
    search_groups(problem, state)
    solve_scales(problem, state)
