"""Iterated local search: change a few codes of the worst rows at random, and search again."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from onecomp.quantizer.jointq.coordinate_search import solve_scales, sweep_codes
from onecomp.quantizer.jointq.local_search import search_groups
from onecomp.quantizer.jointq.problem import Problem, State

PERTURBED_RATIO = 0.005
"""Of the codes of a clone."""
PARTS, LEAST_ROWS = 4, 8
"""Clones that are searched at once, an n-th of the rows, and of at least so many rows."""
SEED = 20250429
"""Of all random choices: the same rows always meet the same."""


@dataclass(frozen=True)
class Perturbation:
    """How much of it."""

    num_iterations: int
    num_clones: int
    """Of each row, with random changes of their own."""
    num_channels: int
    """Rows at most, the worst first."""


def perturb(problem: Problem, state: State, settings: Perturbation) -> None:
    """Improve the worst rows, as far as chance finds something better; no row gets worse."""
    generator = torch.Generator().manual_seed(SEED)
    num_rows = state.steps.shape[1]
    at_once = max(LEAST_ROWS, num_rows // (PARTS * settings.num_clones))
    for _ in range(settings.num_iterations):
        worst = torch.argsort(state.objective(), descending=True, stable=True)
        for rows in worst[: settings.num_channels].split(at_once):
            _improve(problem, state, rows, settings.num_clones, generator)


def _improve(
    problem: Problem,
    state: State,
    rows: Int64[Tensor, "some"],
    num_clones: int,
    generator: torch.Generator,
) -> None:
    """Take over the best of each row's clones where it is better than the row."""
    chosen = rows.repeat(num_clones)
    part, clones = problem.rows(chosen), state.rows(chosen)
    _change_some(part, clones, generator)
    sweep_codes(part, clones)
    solve_scales(part, clones)
    search_groups(part, clones)
    best = clones.objective().view(num_clones, len(rows)).argmin(dim=0)
    best = clones.rows(best * len(rows) + torch.arange(len(rows), device=best.device))
    before = state.rows(rows)
    before.improve_by(best)
    state.put_rows(rows, before)


def _change_some(problem: Problem, state: State, generator: torch.Generator) -> None:
    """Zero a few codes or step them by one, within their bounds."""
    device, shape = state.steps.device, state.steps.shape
    chance = torch.rand(shape, generator=generator).to(device)
    kind = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8).to(device)
    changed = torch.where(kind == 0, torch.zeros_like(state.steps), state.steps + kind)
    lowest = -problem.per_column(state.zero_point)
    changed = torch.clamp(changed, lowest, lowest + problem.maxq)
    state.steps = torch.where(chance < PERTURBED_RATIO, changed, state.steps)
    state.error = state.steps * problem.per_column(state.scale) - problem.columns
    state.gradient = problem.gram @ state.error
