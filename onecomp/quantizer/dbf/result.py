"""What double binary factorisation makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.export.bits import pack_bits, unpack_bits
from onecomp.quantizer.result import QuantizationResult


class IncompleteResultError(ValueError):
    """A result lacks a factor, so that there is no weight to compute."""

    def __init__(self, missing: str):
        super().__init__(missing)
        self.missing = missing

    def __str__(self) -> str:
        return f"DBFResult has no {self.missing}. Quantize the layer again."


@dataclass(eq=False)
class DBFResult(QuantizationResult):
    """``diag(Da) A diag(mid) B diag(Db)`` with signs ``A`` and ``B``."""

    target_bits: float | None = None
    """Bits of signs per weight that were asked for; the rank follows from it."""
    iters: int | None = None
    reg: float | None = None
    use_balancing: bool | None = None
    balance_iters: int | None = None
    balance_alpha: float | None = None
    balance_mode: str | None = None
    use_adaptive_rho: bool | None = None
    is_dbf_quantized: bool = False
    """Whether the factors are there."""
    dbf_Da: Tensor | None = None  # noqa: N815 - documented name
    """Scales of the outputs, float16 ``(out,)``, CPU, as the other two scales."""
    dbf_A: Tensor | None = None  # noqa: N815
    """+1 and -1, float16 ``(out, rank)``; packed, uint8, eight to a byte."""
    dbf_mid: Tensor | None = None
    """Scales between the factors ``(rank,)``."""
    dbf_B: Tensor | None = None  # noqa: N815
    """As ``dbf_A``, of shape ``(rank, in)``."""
    dbf_Db: Tensor | None = None  # noqa: N815
    """Scales of the inputs ``(in,)``."""
    dbf_A_is_packed: bool = False  # noqa: N815
    dbf_B_is_packed: bool = False  # noqa: N815
    dbf_A_original_shape: list[int] | None = None  # noqa: N815
    """Shape of ``A`` where it is packed."""
    dbf_B_original_shape: list[int] | None = None  # noqa: N815

    def left_signs(self) -> Float[Tensor, "out rank"]:
        """``A``, unpacked."""
        return _signs(self.factor("dbf_A"), self.dbf_A_is_packed, self.dbf_A_original_shape)

    def right_signs(self) -> Float[Tensor, "rank in"]:
        """``B``, unpacked."""
        return _signs(self.factor("dbf_B"), self.dbf_B_is_packed, self.dbf_B_original_shape)

    def factor(self, name: str) -> Tensor:
        """One of the five tensors.

        Raises:
            IncompleteResultError: It is missing; a ValueError.
        """
        tensor = getattr(self, name)
        if tensor is None:
            raise IncompleteResultError(name)
        return tensor

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """The product in float32 on ``device``.

        Raises:
            IncompleteResultError: A factor is missing; a ValueError.
        """
        row_scale, middle, column_scale = (
            self.factor(name).to(device).float() for name in ("dbf_Da", "dbf_mid", "dbf_Db")
        )
        left, right = self.left_signs().to(device), self.right_signs().to(device)
        return product(row_scale, left, middle, right, column_scale)


def product(
    row_scale: Float[Tensor, "out"],
    left_signs: Float[Tensor, "out rank"],
    middle: Float[Tensor, "rank"],
    right_signs: Float[Tensor, "rank in"],
    column_scale: Float[Tensor, "in"],
) -> Float[Tensor, "out in"]:
    """``diag(Da) A diag(mid) B diag(Db)``."""
    return row_scale[:, None] * (left_signs @ (middle[:, None] * right_signs)) * column_scale


def packed_signs(values: Float[Tensor, "rows columns"]) -> Tensor:
    """Signs as the CPU keeps them."""
    return pack_bits(values).cpu()


def _signs(stored: Tensor, is_packed: bool, shape: list[int] | None) -> Tensor:
    if not is_packed:
        return stored.float()
    if shape is None:
        raise IncompleteResultError("shape of its packed signs")
    rows, columns = shape
    return unpack_bits(stored, (rows, columns))
