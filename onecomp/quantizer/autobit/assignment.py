"""Which child quantizes which layer: decided once, stored in the run directory as plain JSON."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class LayerChoice:
    """The child of one layer, and why."""

    child: int
    """Number of the child; those behind the candidates are the ones of ``dbf_bits``."""
    bits: float | None
    """Stored bits a weight, scales included; None where the child does not say."""
    num_weights: int
    errors: tuple[float | None, ...] = ()
    """What was minimized, by candidate, None for one that is not for the layer; empty where
    nothing was measured."""


@dataclass(frozen=True)
class Assignment:
    """Which child quantizes which layer."""

    layers: Mapping[str, LayerChoice]
    target_bits: float | None = None
    """Largest average of stored bits a weight; None without one."""
    dbf_bits: tuple[float, ...] = ()
    """Bits of children that were added, each a DBF."""

    @property
    def average_bits(self) -> float | None:
        """Stored bits a weight, over all layers; None where one is not known."""
        total = 0.0
        for choice in self.layers.values():
            if choice.bits is None:
                return None
            total += choice.bits * choice.num_weights
        return total / sum(choice.num_weights for choice in self.layers.values())

    def num_layers(self) -> Counter[int]:
        """Layers of each child that has any."""
        return Counter(choice.child for choice in self.layers.values())

    def record(self) -> dict:
        """As plain JSON values."""
        return {
            "average_bits": self.average_bits,
            "target_bits": self.target_bits,
            "dbf_bits": list(self.dbf_bits),
            "layers": {name: asdict(choice) for name, choice in self.layers.items()},
        }

    @staticmethod
    def from_record(record: Mapping) -> "Assignment":
        """The inverse of ``record``."""
        layers = {
            name: LayerChoice(**{**choice, "errors": tuple(choice["errors"])})
            for name, choice in record["layers"].items()
        }
        return Assignment(layers, record["target_bits"], tuple(record["dbf_bits"]))
