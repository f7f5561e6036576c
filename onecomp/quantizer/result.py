"""What one layer became: the base of every method's result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.errors import ConfigError

NARROW = {"int32": torch.uint8, "int64": torch.int32}
"""Integers are sent and stored in these dtypes where every value fits."""
BITS = ("wbits", "bits", "target_bits")
"""Fields that say how many bits a weight was to have."""
AnyResult = TypeVar("AnyResult", bound="QuantizationResult")
STATISTICS = (
    "quantization_time",
    "output_squared_error",
    "mean_output_squared_error",
    "weight_squared_error",
    "mean_weight_squared_error",
    "relative_output_squared_error",
    "relative_weight_squared_error",
)


@dataclass(eq=False)
class QuantizationResult:
    """Result of one layer; each method adds its own fields.

    The error fields are filled when ``calc_quant_error=True``. Output errors are measured on the
    calibration inputs of the layer: ``||W X - Ŵ X||²``, per entry of the output (mean), and
    relative to ``||W X||²``. GPTQ fills ``relative_output_squared_error`` in any case, since its
    solver knows it: progress lines and the report show it.

    A result equals itself only, as tensors have no single truth value: declare subclasses with
    ``@dataclass(eq=False)``.
    """

    types: ClassVar[dict[str, type["QuantizationResult"]]] = {}
    """Every result class by name; files name the class, and only these are restored."""
    _sent_as: ClassVar[Mapping[str, torch.dtype]] = {}
    """Dtypes of the fields that a narrowed result has in fewer bytes; its own attribute then."""

    dequantized_weight: Tensor | None = None
    """Stored weight of methods without codes; None where the weight is recomputed from codes."""
    quantization_time: float | None = None
    """Seconds."""
    output_squared_error: float | None = None
    mean_output_squared_error: float | None = None
    weight_squared_error: float | None = None
    mean_weight_squared_error: float | None = None
    relative_output_squared_error: float | None = None
    relative_weight_squared_error: float | None = None

    def __init_subclass__(cls, **kwargs: object):
        super().__init_subclass__(**kwargs)
        QuantizationResult.types[cls.__name__] = cls

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, where the pipeline computes with it.

        Raises:
            NotImplementedError: The result holds neither a weight nor codes.
        """
        if self.dequantized_weight is None:
            raise NotImplementedError(
                f"{type(self).__name__} stores no dequantized_weight and defines no codes."
            )
        return self.dequantized_weight.to(device=device, dtype=torch.float32)

    def compute_dequantized_weight(
        self, device: torch.device | str | None = None
    ) -> Float[Tensor, "out in"]:
        """Dequantized weight in float16 on the CPU, computed on ``device``.

        Raises:
            NotImplementedError: The result holds neither a weight nor codes.
        """
        return self.dequantize(device).to(device="cpu", dtype=torch.float16).contiguous()

    def row_dims(self) -> dict[str, int]:
        """Dimension along which the layer's rows lie, of each tensor field that has one."""
        return {"dequantized_weight": 0}

    @staticmethod
    def join(parts: "Sequence[AnyResult]") -> "AnyResult":
        """The result of a layer from those of consecutive rows, in order.

        Raises:
            ValueError: A tensor differs between parts and is not in ``row_dims``.
        """
        first, dims = parts[0], parts[0].row_dims()
        if len(parts) == 1:
            return first
        joined = {}
        for name, tensor in first.tensors().items():
            tensors = [part.tensors()[name] for part in parts]
            if name in dims:
                joined[name] = torch.cat(tensors, dim=dims[name])
            elif not all(torch.equal(tensor, other) for other in tensors):
                raise ValueError(
                    f"{type(first).__name__}.{name} differs between rows of one layer. "
                    "Return the dimension that rows lie along from row_dims()."
                )
        return replace(first, **joined)

    def narrowed(self: AnyResult) -> AnyResult:
        """The same with integers in fewer bytes, for the way to another worker."""
        tensors = {name: narrow(tensor) for name, tensor in self.tensors().items()}
        small = replace(self, **tensors)
        small._sent_as = {n: t.dtype for n, t in self.tensors().items() if tensors[n] is not t}
        return small

    def widened(self: AnyResult) -> AnyResult:
        """The inverse of ``narrowed``."""
        dtypes = self._sent_as
        return replace(self, **{n: self.tensors()[n].to(dtype) for n, dtype in dtypes.items()})

    def nominal_bits(self) -> int | float | None:
        """Bits per weight that were asked for, scales aside; None where the method has one size."""
        found = (value for name, value in self.values().items() if name in BITS)
        return next((bits for bits in found if isinstance(bits, int | float)), None)

    def get_statistics(self) -> dict[str, float | None]:
        """The seven scalar fields by name."""
        return {name: getattr(self, name) for name in STATISTICS}

    def tensors(self) -> dict[str, Tensor]:
        """Tensor fields that are set, by name: the part a results file keeps as tensors."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def values(self) -> dict[str, object]:
        """All other fields, by name: plain JSON values."""
        return {
            f.name: v for f in fields(self) if not isinstance(v := getattr(self, f.name), Tensor)
        }

    @staticmethod
    def restore(
        type_name: str, tensors: Mapping[str, Tensor], values: Mapping[str, object]
    ) -> "QuantizationResult":
        """The inverse of ``tensors`` and ``values``.

        Raises:
            ConfigError: No class of this name is known; import the module that defines it first.
        """
        if type_name not in QuantizationResult.types:
            known = ", ".join(sorted(QuantizationResult.types))
            raise ConfigError(
                "QuantizationResult",
                [
                    f"{type_name!r} is not a known result class. Known: {known}. "
                    "Import its module first."
                ],
            )
        return QuantizationResult.types[type_name](**tensors, **values)


QuantizationResult.types[QuantizationResult.__name__] = QuantizationResult


def narrow(tensor: Tensor) -> Tensor:
    """Integers in fewer bytes where every value fits."""
    dtype = NARROW.get(str(tensor.dtype)[6:])
    if dtype is None or not tensor.numel():
        return tensor
    limits = torch.iinfo(dtype)
    fits = limits.min <= tensor.min().item() and tensor.max().item() <= limits.max
    return tensor.to(dtype) if fits else tensor
