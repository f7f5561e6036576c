"""Training steps of a gang whose members each hold all adapters: they are small."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed, nn

from onecomp.post_process.engine import Engine, LocalEngine
from onecomp.post_process.gang import totals


class ReplicatedEngine(Engine):
    """The same update on every rank, from the mean of their gradients.

    Args:
        local: Carries out the updates.
        parameters: What it trains, the same on every rank.
    """

    def __init__(self, local: LocalEngine, parameters: Sequence[nn.Parameter]):
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._local, self._parameters = local, list(parameters)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient on this rank."""
        self._local.backward(loss)

    def step(self, lr_factor: float) -> bool:
        """Average the gradients in one message, and update."""
        flat = torch.cat([p.grad.flatten() for p in self._parameters if p.grad is not None])
        distributed.all_reduce(flat)
        flat /= self.world_size
        start = 0
        for parameter in self._parameters:
            if parameter.grad is not None:
                end = start + parameter.numel()
                parameter.grad.copy_(flat[start:end].view_as(parameter))
                start = end
        return self._local.step(lr_factor)

    def discard(self) -> None:
        """Forget the gradients."""
        self._local.discard()

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums in the order of the ranks: the same bits on all of them."""
        return totals(values, self._parameters[0].device)

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters."""
        return self._local.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values back."""
        self._local.restore(state)
