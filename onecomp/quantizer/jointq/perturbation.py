"""Iterated local search: change a few codes of the worst rows at random, and search again."""

from dataclasses import dataclass

import torch

from onecomp.quantizer.jointq.coordinate_search import solve_scales, sweep_codes
from onecomp.quantizer.jointq.local_search import search_groups
from onecomp.quantizer.jointq.problem import Problem, State

PERTURBED_RATIO = 0.005
"""Of the codes of a clone."""
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
    num_rows = min(settings.num_channels, state.steps.shape[1])
    for _ in range(settings.num_iterations):
        worst = torch.argsort(state.objective(), descending=True, stable=True)[:num_rows]
        chosen = worst.repeat(settings.num_clones)
        part, clones = problem.rows(chosen), state.rows(chosen)
        _change_some(part, clones, generator)
        sweep_codes(part, clones)
        solve_scales(part, clones)
        search_groups(part, clones)
        best = clones.objective().view(settings.num_clones, num_rows).argmin(dim=0)
        best = clones.rows(best * num_rows + torch.arange(num_rows, device=best.device))
        before = state.rows(worst)
        before.improve_by(best)
        state.put_rows(worst, before)


def _change_some(problem: Problem, state: State, generator: torch.Generator) -> None:
    """Zero a few codes or step them by one, within their bounds."""
    device, shape = state.steps.device, state.steps.shape
    chance = torch.rand(shape, generator=generator).to(device)
    kind = torch.randint(-1, 2, shape, generator=generator).to(device)
    changed = torch.where(kind == 0, torch.zeros_like(state.steps), state.steps + kind)
    lowest = -problem.per_column(state.zero_point)
    changed = torch.clamp(changed, lowest, lowest + problem.maxq)
    state.steps = torch.where(chance < PERTURBED_RATIO, changed, state.steps)
    state.error = state.steps * problem.per_column(state.scale) - problem.columns
    state.gradient = problem.gram @ state.error
