"""What a span of blocks is trained to give for one sample."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from onecomp.post_process.distillation import TopTokens


class Goal(ABC):
    """What should come out of a span."""

    @abstractmethod
    def loss(self, output: Float[Tensor, "1 length hidden"]) -> Float[Tensor, ""]:
        """How far hidden states behind the span are from the goal; 0: there."""


@dataclass(frozen=True, eq=False)
class HiddenStates(Goal):
    """Certain hidden states."""

    target: Float[Tensor, "1 length hidden"]

    def loss(self, output: Float[Tensor, "1 length hidden"]) -> Float[Tensor, ""]:
        """Squared error relative to the target's size, mean over tokens.

        Relative for each token, as a few tokens of most models are a hundred times as large as
        the others and would be all that counts.
        """
        output, target = output.float(), self.target.to(output.device).float()
        error = (output - target).square().sum(-1)
        return (error / target.square().sum(-1).clamp_min(1e-12)).mean()


@dataclass(frozen=True, eq=False)
class Answers(Goal):
    """Certain answers of the model, for the last span: behind it there is only the output head."""

    told: TopTokens
    """The original model's."""
    logits: Callable[[Tensor], Tensor]
    """What the model makes of hidden states behind its last block."""

    def loss(self, output: Float[Tensor, "1 length hidden"]) -> Float[Tensor, ""]:
        """Divergence from the answers in nats, mean over tokens."""
        return self.told.to(output.device).divergence(self.logits(output), 1.0).mean()
