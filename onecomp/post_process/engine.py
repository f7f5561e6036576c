"""How a training step is carried out: by this process alone, or by a gang of workers together."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: tuple[nn.Parameter, ...]
    lr: float
    weight_decay: float = 0.0


class Engine(ABC):
    """Gradients, updates and sums of numbers; every rank of a gang calls the same in step."""

    rank: int = 0
    world_size: int = 1

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss, already divided by their number."""

    @abstractmethod
    def step(self, lr_factor: float) -> bool:
        """Clip, update each parameter at its rate times ``lr_factor``, forget the gradients.

        Returns:
            Whether there was an update: not if a gradient is not finite.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget the gradients without an update."""

    @abstractmethod
    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in their order."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Copies of what is trained, whole, in float32 on the CPU, by name; on every rank."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give the parameters the values of an earlier ``state()``."""


class LocalEngine(Engine):
    """AdamW in this process.

    Args:
        groups: What is trained.
        grad_clip: Largest norm of all gradients together.
        names: Name of every parameter, for ``state``.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], grad_clip: float, names: Mapping[str, nn.Parameter]
    ):
        self._parameters = [p for group in groups for p in group.parameters]
        self._rates = [group.lr for group in groups]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay}
                for g in groups
            ]
        )
        self._clip, self._names = grad_clip, dict(names)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient."""
        loss.backward()

    def step(self, lr_factor: float) -> bool:
        """One step of AdamW."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        is_finite = bool(norm.isfinite())
        if is_finite:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * lr_factor
            self._optimizer.step()
        self.discard()
        return is_finite

    def discard(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def total(self, values: Sequence[float]) -> list[float]:
        """The values: there is one rank."""
        return list(values)

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters."""
        return {
            name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self._names.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values back."""
        with torch.no_grad():
            for name, parameter in self._names.items():
                parameter.copy_(state[name])

    def moments(self) -> dict[str, Tensor]:
        """What AdamW keeps of each parameter, on the CPU; empty before the first step."""
        state = self._optimizer.state
        return {
            f"{name}/{key}": value.detach().to("cpu", copy=True)
            for name, parameter in self._names.items()
            if parameter in state
            for key, value in state[parameter].items()
        }

    def restore_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Go on with earlier ``moments()``."""
        for place, value in moments.items():
            name, _, key = place.rpartition("/")
            parameter = self._names[name]
            device = "cpu" if key == "step" else parameter.device
            self._optimizer.state[parameter][key] = value.to(device, copy=True)
