"""The one loss of every process that trains against a teacher, and of next-token prediction.

The teacher is the model before quantization. What it says of a position is a distribution over the
vocabulary, kept whole or as its most probable tokens and the mass of all others. With the others
as one outcome the divergence is a lower bound of the whole one and differs from it by the mass of
the others times the divergence within them (the chain rule of relative entropy), and by what
rounding the kept logarithms to float16 does (they are scaled to add up to one again).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

LEAST_REST = 1e-7
"""Least mass that the student is taken to have outside the kept tokens, for its logarithm."""


class TeacherDistribution(ABC):
    """What the teacher says of every position of some samples, at one temperature."""

    @abstractmethod
    def divergence(
        self, logits: Float[Tensor, "samples length vocabulary"], temperature: float
    ) -> Float[Tensor, "samples length"]:
        """Kullback-Leibler divergence of the student from the teacher, in nats, per position.

        Args:
            logits: The student's.
            temperature: Divides the logits of both; for kept tokens the one they were kept at.
        """


@dataclass(frozen=True, eq=False)
class WholeDistribution(TeacherDistribution):
    """All of the teacher's logits."""

    logits: Float[Tensor, "samples length vocabulary"]

    def divergence(
        self, logits: Float[Tensor, "samples length vocabulary"], temperature: float
    ) -> Float[Tensor, "samples length"]:
        """The divergence over the whole vocabulary."""
        teacher = (self.logits.float() / temperature).log_softmax(-1)
        student = (logits.float() / temperature).log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1)


@dataclass(frozen=True, eq=False)
class TopTokens(TeacherDistribution):
    """The teacher's most probable tokens, and the mass of all others as one outcome."""

    ids: Int[Tensor, "samples length top"]
    log_probs: Float[Tensor, "samples length top"]
    """At the temperature that they were kept at."""
    rest: Float[Tensor, "samples length"]
    """Mass of the tokens that were not kept, before logarithms were rounded."""

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "samples length vocabulary"],
        top: int,
        temperature: float,
        *,
        dtype: torch.dtype = torch.float16,
    ) -> "TopTokens":
        """The ``top`` most probable tokens of logits, logarithms rounded to ``dtype``."""
        log_probs = (logits.float() / temperature).log_softmax(-1)
        kept = log_probs.topk(min(top, logits.shape[-1]), dim=-1)
        others = log_probs.scatter(-1, kept.indices, -torch.inf)
        rest = others.exp().sum(-1)  # one minus what is kept would be lost in rounding
        return cls(kept.indices.to(torch.int32), kept.values.to(dtype), rest)

    def to(self, device: torch.device) -> "TopTokens":
        """The same on a device."""
        return TopTokens(self.ids.to(device), self.log_probs.to(device), self.rest.to(device))

    def _whole_log_probs(self) -> Float[Tensor, "samples length top"]:
        """Logarithms shifted so that with the rest all masses add up to one in spite of rounding.

        So the divergence is that of two distributions: never negative, and next to nothing for the
        teacher itself.
        """
        log_probs = self.log_probs.float()
        shift = torch.log1p(-self.rest) - log_probs.logsumexp(-1)
        return log_probs + shift.unsqueeze(-1)

    def divergence(
        self, logits: Float[Tensor, "samples length vocabulary"], temperature: float
    ) -> Float[Tensor, "samples length"]:
        """The divergence with all other tokens as one outcome."""
        scaled = logits.float() / temperature
        total = scaled.logsumexp(-1)
        kept = scaled.gather(-1, self.ids.long())
        log_probs = self._whole_log_probs()
        among = (log_probs.exp() * (log_probs - kept + total.unsqueeze(-1))).sum(-1)
        if self.ids.shape[-1] == logits.shape[-1]:
            return among
        share = (kept.logsumexp(-1) - total).clamp_max(-LEAST_REST)
        student_rest = torch.log(-torch.expm1(share))
        return among + torch.special.xlogy(self.rest, self.rest) - self.rest * student_rest


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts."""

    distill: float = 1.0
    """Divergence from the teacher, mean over positions, times the squared temperature."""
    next_token: float = 0.0
    """Cross entropy of the next token, mean over positions."""
    temperature: float = 1.0


def training_loss(
    logits: Float[Tensor, "samples length vocabulary"],
    input_ids: Int[Tensor, "samples length"],
    teacher: TeacherDistribution | None,
    weights: LossWeights,
) -> Float[Tensor, ""]:
    """Weighted sum of both parts; a mean over positions, so that no length changes its size.

    Args:
        logits: The student's.
        input_ids: The tokens that the logits are for.
        teacher: What the teacher says of them; None where ``weights.distill`` is 0.
        weights: How much each part counts.
    """
    loss = logits.new_zeros((), dtype=torch.float32)
    if weights.distill and teacher is not None:
        divergence = teacher.divergence(logits, weights.temperature).mean()
        loss = loss + weights.distill * weights.temperature**2 * divergence
    if weights.next_token:
        predictions = logits[:, :-1].flatten(0, 1).float()
        targets = input_ids[:, 1:].flatten().long()
        loss = loss + weights.next_token * functional.cross_entropy(predictions, targets)
    return loss
