"""Steps that never raise the objective: one code at a time, or all scales of a row at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.grid import SMALLEST_SCALE
from onecomp.quantizer.jointq.problem import Problem, State, storable

COLUMN_BLOCK = 64
"""Columns whose changes reach the gradients of all others in one product."""
RIDGE = 1e-5
"""Added to the normal equations of the scales, whose diagonal is 1."""
SYSTEM_ENTRIES = 1 << 22
"""Entries of normal equations that are built at once."""
PARTS, LEAST_PART = 4, 64
"""Parts in which rows get scales, to save memory, and rows that are no more cut."""


def sweep_codes(problem: Problem, state: State) -> None:
    """Give every code in turn its best value, all others and the scales being as they are.

    Coordinate descent: the objective is a parabola in each code, so the best whole number is the
    one nearest its minimum, within the bounds.
    """
    lowest, inverse_diagonal = -state.zero_point, 1 / problem.gram.diagonal()
    highest = lowest + problem.maxq
    step_of = 1 / state.scale
    for start in range(0, len(state.steps), COLUMN_BLOCK):
        block = slice(start, min(start + COLUMN_BLOCK, len(state.steps)))
        gram = problem.gram[block, block] * inverse_diagonal[block]
        pull = state.gradient[block] * inverse_diagonal[block, None]
        changes = torch.empty_like(pull)
        for i, column in enumerate(range(block.start, block.stop)):
            if i:
                pull[i].addmv_(changes[:i].T, gram[:i, i])
            group = column // problem.groupsize
            steps = torch.addcmul(state.steps[column], pull[i], step_of[group], value=-1)
            torch.clamp(steps.round_(), lowest[group], highest[group], out=steps)
            torch.mul(steps - state.steps[column], state.scale[group], out=changes[i])
            state.steps[column] = steps
        state.error[block] += changes
        state.gradient.addmm_(problem.gram[:, block], changes)


def solve_scales(problem: Problem, state: State) -> None:
    """Give every row the scales of all its groups that suit its codes best.

    The objective is quadratic in a row's scales; their change solves its normal equations.
    Rows whose equations cannot be solved keep theirs, as do groups whose codes are all zero.
    """
    num_groups = len(state.scale)
    part = max(LEAST_PART, -(-state.scale.shape[1] // PARTS))
    width = max(1, min(part, SYSTEM_ENTRIES // num_groups**2))
    parts = zip(
        problem.by_group(state.steps).split(width, dim=2),
        problem.by_group(state.gradient).split(width, dim=2),
        strict=True,
    )
    change = torch.cat([_newton_step(problem, *part) for part in parts], dim=1)
    set_scales(problem, state, state.scale + change)


def _newton_step(
    problem: Problem, steps: Float[Tensor, "groups columns some"], gradient: Tensor
) -> Float[Tensor, "groups some"]:
    num_groups, _, num_rows = steps.shape
    system = steps.new_empty(num_rows, num_groups, num_groups)
    for t, group in enumerate(problem.groups):
        reach = problem.by_group(problem.gram[group.start :, group] @ steps[t])
        entries = (reach * steps[t:]).sum(dim=1).T
        system[:, t, t:], system[:, t:, t] = entries, entries
    diagonal = system.diagonal(dim1=1, dim2=2)
    is_set = diagonal > 0
    unit = torch.where(is_set, diagonal, 1.0).rsqrt()
    system.mul_(unit[:, :, None]).mul_(unit[:, None, :])
    system.diagonal(dim1=1, dim2=2).copy_(torch.ones_like(unit)).add_(RIDGE)
    downhill = -(gradient * steps).sum(dim=1).T * unit * is_set
    lower, failed_minor = torch.linalg.cholesky_ex(system)
    change = torch.cholesky_solve(downhill[:, :, None], lower)[:, :, 0] * unit
    solved = (failed_minor == 0) & change.isfinite().all(dim=1)
    return torch.where(solved[:, None], change, 0.0).T


def set_scales(problem: Problem, state: State, scale: Float[Tensor, "groups out"]) -> None:
    """Put other scales under the same codes; none may be zero, so such get the smallest."""
    state.scale = torch.where(scale.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scale)
    steps, error = problem.by_group(state.steps), problem.by_group(state.error)
    torch.mul(steps, state.scale[:, None], out=error)
    state.error -= problem.columns
    torch.mm(problem.gram, state.error, out=state.gradient)


def store_scales(problem: Problem, state: State) -> None:
    """Round the scales to float16, and let the codes make up for it."""
    set_scales(problem, state, storable(state.scale))


def centre_codes(problem: Problem, state: State) -> None:
    """Move zero points so that codes have as much room below them as above; weights stay.

    Only where zero points are free. A group whose codes lie at one end of the range could go no
    further there, although the other end is not used.
    """
    if problem.symmetric:
        return
    low, high = torch.aminmax(problem.by_group(state.steps), dim=1)
    room = problem.maxq - (high - low)
    state.zero_point = (torch.floor(room / 2) - low).clamp_(0, problem.maxq)
