"""The loss that adapters are trained with: a weighted sum of up to three parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from onecomp.post_process.distillation import TeacherDistribution, WholeDistribution
from onecomp.post_process.lora.answers import KL, Answer
from onecomp.post_process.lora.outputs import Outputs
from onecomp.post_process.lora.tokens import Batch


@dataclass(frozen=True)
class LoraLoss:
    """How much each part counts; every part is a mean over tokens, padding left out."""

    next_token: float = 1.0
    """Cross entropy of the next token."""
    teacher: float = 0.0
    """Distance of the logits from the teacher's."""
    teacher_type: str = KL
    """``KL``: divergence, times the squared temperature. ``MSE``: squared difference of logits,
    mean over the vocabulary."""
    temperature: float = 1.0
    """Divides logits in the divergence."""
    hidden: float = 0.0
    """Squared difference of hidden states from the teacher's, mean over their width and the
    chosen blocks."""

    def __call__(self, student: Outputs, batch: Batch, answer: Answer) -> Float[Tensor, ""]:
        """The loss of a batch, in float32.

        Args:
            student: What the trained model says.
            batch: The tokens.
            answer: What the teacher says; parts that count nothing may be missing.
        """
        loss = student.predictions.new_zeros((), dtype=torch.float32)
        if self.next_token:
            predictions = student.predictions.float()
            loss = loss + self.next_token * functional.cross_entropy(predictions, batch.targets)
        if self.teacher and answer.distribution is not None:
            loss = loss + self.teacher * self._distance(student.predictions, answer.distribution)
        if self.hidden:
            loss = loss + self.hidden * hidden_distance(student.hidden, answer.hidden)
        return loss

    def _distance(
        self, predictions: Float[Tensor, "targets vocabulary"], told: TeacherDistribution
    ) -> Float[Tensor, ""]:
        if self.teacher_type == KL:
            divergence = told.divergence(predictions.unsqueeze(0), self.temperature)
            return self.temperature**2 * divergence.mean()
        assert isinstance(told, WholeDistribution)  # kept tokens are kept for the divergence only
        return functional.mse_loss(predictions.float(), told.logits[0].float())


def hidden_distance(
    student: Mapping[int, Float[Tensor, "tokens hidden"]],
    teacher: Mapping[int, Float[Tensor, "tokens hidden"]],
) -> Float[Tensor, ""]:
    """Mean squared difference of hidden states, mean over blocks.

    Args:
        student: By number of block.
        teacher: Of the same blocks.
    """
    distances = [
        functional.mse_loss(states.float(), teacher[index].float())
        for index, states in student.items()
    ]
    return torch.stack(distances).mean()
