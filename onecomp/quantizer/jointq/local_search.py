"""JointQ's local search: single steps of one group's codes, its best scale always taken along.

For codes ``z`` of one group, let ``R`` be the group's part of the gram, ``v = z R``, ``o = z R zᵀ``
and ``q = h zᵀ``, where ``h`` is the target seen through ``R``. The best scale is ``q / o`` and
lowers the error by ``q² / o``; a step of code ``j`` by ``±1`` would make that
``(q ± h_j)² / (o ± 2 v_j + R_jj)``. Here the *difference* of both is computed, without
cancellation, from the residual ``p = h - (q / o) v``: float32 is then enough for any bits.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.jointq.problem import Problem, State

STEPS_AT_ONCE = 8
"""Steps between two looks at which rows are still improving."""
PARTS, LEAST_PART = 16, 64
"""Part of the weights that is searched at once, an n-th, and rows that are no more cut."""
LEAST_GAIN = 1e-7
"""Of the energy that the codes explain: what float32 tells from nothing."""
LEAST_ENERGY = 1e-3
"""Of ``R_jj``: codes that the inputs hardly see would get scales without bounds."""


def search_groups(problem: Problem, state: State) -> None:
    """Search each group in turn, its target being what the other groups leave."""
    for t, group in enumerate(problem.groups):
        old = state.steps[group] * state.scale[t]
        steps, scale = search_in_parts(problem, state, t, state.gradient[group])
        state.steps[group], state.scale[t] = steps, scale
        change = (steps * scale).sub_(old)
        state.error[group] += change
        state.gradient.addmm_(problem.gram[:, group], change)


def search_in_parts(
    problem: Problem, state: State, t: int, gradient: Float[Tensor, "columns out"]
) -> tuple[Float[Tensor, "columns out"], Float[Tensor, "out"]]:
    """``search_group`` for group ``t`` of a state, a part of its rows at a time to save memory."""
    group = problem.groups[t]
    width = max(LEAST_PART, problem.columns.numel() // (PARTS * problem.groupsize))
    parts = zip(
        state.steps[group].split(width, dim=1),
        state.scale[t].split(width),
        gradient.split(width, dim=1),
        state.zero_point[t].split(width),
        strict=True,
    )
    gram = problem.gram[group, group]
    steps, scales = zip(*(search_group(gram, *part, problem.maxq) for part in parts), strict=True)
    return torch.cat(steps, dim=1), torch.cat(scales)


def search_group(
    gram: Float[Tensor, "columns columns"],
    steps: Float[Tensor, "columns out"],
    scale: Float[Tensor, "out"],
    gradient: Float[Tensor, "columns out"],
    zero_point: Float[Tensor, "out"],
    maxq: int,
) -> tuple[Float[Tensor, "columns out"], Float[Tensor, "out"]]:
    """Codes and scales of one group after the best steps of all rows, one at a time per row.

    Args:
        gram: The group's part of the gram.
        steps: Codes counted from the zero point.
        scale: Scales of the group.
        gradient: ``gram @ error`` of the group's columns, the errors of other groups included.
        zero_point: Where the range 0..maxq of codes has its zero.
        maxq: Largest code.

    Returns:
        New codes and scales; a row without codes, or without a step that helps, keeps its own
        codes. Scales are those that suit the codes best.
    """
    search = _Search.start(gram, steps, scale, gradient, zero_point, maxq)
    final = search.steps.clone()
    unfinished = torch.arange(len(final), device=final.device)
    for _ in range(-(-len(gram) // STEPS_AT_ONCE)):
        moved = search.several_steps()
        final[unfinished] = search.steps
        unfinished, search = unfinished[moved], search.rows(moved)
        if not len(unfinished):
            break
    return final.T.contiguous(), best_scale(gram, final, scale, gradient, steps)


def best_scale(
    gram: Float[Tensor, "columns columns"],
    codes: Float[Tensor, "out columns"],
    scale: Float[Tensor, "out"],
    gradient: Float[Tensor, "columns out"],
    steps: Float[Tensor, "columns out"],
) -> Float[Tensor, "out"]:
    """Best scale of new codes, computed afresh; the old one where they are as good as zero.

    Args:
        gram: The group's part of the gram.
        codes: New codes.
        scale: Old scale.
        gradient: ``gram @ error`` with the old codes and scale.
        steps: Old codes.
    """
    seen = codes @ gram
    energy = (codes * seen).sum(dim=1)
    # The error with the new codes and the old scale, so that only a change of scale is computed.
    residual = gradient.T + (codes - steps.T) @ gram * scale[:, None]
    is_set = energy > LEAST_ENERGY * gram.diagonal().mean()
    change = (residual * codes).sum(dim=1) / torch.where(is_set, energy, 1.0)
    found = scale - torch.where(is_set, change, 0.0)
    return torch.where(found == 0, scale, found)


@dataclass
class _Search:
    """Where the rows of a group stand; a row is contiguous here, as each row takes its own step."""

    gram: Float[Tensor, "columns columns"]
    steps: Float[Tensor, "out columns"]
    seen: Float[Tensor, "out columns"]
    """``v``: codes times the gram."""
    target: Float[Tensor, "out columns"]
    """``h``."""
    energy: Float[Tensor, "out 1"]
    """``o``."""
    product: Float[Tensor, "out 1"]
    """``q``."""
    lowest: Float[Tensor, "out 1"]
    highest: Float[Tensor, "out 1"]

    @classmethod
    def start(
        cls,
        gram: Tensor,
        steps: Tensor,
        scale: Tensor,
        gradient: Tensor,
        zero_point: Tensor,
        maxq: int,
    ) -> "_Search":
        codes = steps.T.contiguous()
        seen = codes @ gram
        target = scale[:, None] * seen - gradient.T
        energy = (codes * seen).sum(dim=1, keepdim=True)
        product = (codes * target).sum(dim=1, keepdim=True)
        lowest = -zero_point[:, None]
        return cls(gram, codes, seen, target, energy, product, lowest, lowest + maxq)

    def rows(self, chosen: Tensor) -> "_Search":
        """Some rows only."""
        return _Search(
            self.gram,
            self.steps[chosen],
            self.seen[chosen],
            self.target[chosen],
            self.energy[chosen],
            self.product[chosen],
            self.lowest[chosen],
            self.highest[chosen],
        )

    def several_steps(self) -> Tensor:
        """Take a few steps of every row; says which rows still moved in the last."""
        for _ in range(STEPS_AT_ONCE - 1):
            self.step()
        return self.step()

    def step(self) -> Tensor:
        """Take every row's best step, if there is one that helps; says which rows moved."""
        diagonal = self.gram.diagonal()
        is_set = self.energy > LEAST_ENERGY * diagonal.mean()
        energy = torch.where(is_set, self.energy, 0.0)
        scale = torch.where(is_set, self.product, 0.0) / torch.where(is_set, energy, 1.0)
        residual = torch.addcmul(self.target, self.seen, scale, value=-1)
        sign = torch.sign(residual) * torch.where(scale < 0, -1.0, 1.0)
        gain = residual.abs_().mul_(2 * scale.abs() * energy)
        gain.addcmul_(self.target, self.target)
        gain.addcmul_(scale.square() * energy, diagonal, value=-1)
        new_energy = (sign * self.seen).mul_(2).add_(diagonal).add_(energy)
        gain.div_(new_energy)
        moved = self.steps + sign
        barred = (moved < self.lowest).logical_or_(moved > self.highest)
        barred.logical_or_(new_energy <= LEAST_ENERGY * diagonal)
        best, column = gain.masked_fill_(barred, -1).max(dim=1, keepdim=True)
        helps = best > LEAST_GAIN * self.product * scale
        self._take(column, sign.gather(1, column) * helps)
        return helps[:, 0]

    def _take(self, column: Tensor, sign: Tensor) -> None:
        """Step the code ``column`` of each row by ``sign``, which is 0 where the row stays."""
        diagonal = self.gram.diagonal()[column]
        self.energy += sign * (2 * self.seen.gather(1, column) + sign * diagonal)
        self.product += sign * self.target.gather(1, column)
        self.steps.scatter_add_(1, column, sign)
        self.seen.addcmul_(sign, self.gram[column[:, 0]])
