"""What QuIP makes of one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from onecomp.export.packing import WORD_BITS, pack_columns, unpack_columns
from onecomp.quantizer.quip.algorithm import Rounding
from onecomp.quantizer.quip.incoherence import Incoherence
from onecomp.quantizer.result import QuantizationResult


@dataclass(eq=False)
class QUIPResult(QuantizationResult):
    """Packed codes, their grid, and what undoes the transforms: the weight follows from these.

    The transformed weight is ``scale * (codes - zero)``. Without ``incoh_mode`` it is the layer's
    own: there plain rounding served the layer better.
    """

    wbits: int | None = None
    out_features: int | None = None
    in_features: int | None = None
    incoh_mode: str | None = None
    """``kron`` or ``had``: the matrices of the transforms; None for a layer plainly rounded."""
    packed_codes: Tensor | None = None
    """Codes 0..2**wbits - 1 row by row in one bit stream, int32; zeros fill its last words."""
    scale: Tensor | None = None
    """float32, ``(out, 1)``, or ``(1, 1)`` for one scale."""
    zero: Tensor | None = None
    """float16, ``(out, 1)`` or ``(1, 1)``; halves of whole numbers."""
    row_signs: Tensor | None = None
    """Signs of the transform of rows, int8 ``(out,)``; zero for a row of zeros."""
    column_scale: Tensor | None = None
    """Rescaling of the columns times the signs of their transform, float16 ``(in,)``."""

    @classmethod
    def of(cls, rounding: Rounding, transforms: Incoherence) -> "QUIPResult":
        """Keep a rounded weight, and what undoes the transforms it was rounded under."""
        codes = (rounding.levels + rounding.largest).T.to(torch.int32)
        zero = rounding.scale.new_full((1, 1), rounding.largest)
        result = cls.from_codes(codes, rounding.scale[:, None], zero, rounding.wbits)
        result.incoh_mode = transforms.incoh_mode
        result.row_signs = transforms.row_signs.to("cpu", torch.int8)
        result.column_scale = transforms.column_scale.to("cpu", torch.float16)
        return result

    @classmethod
    def from_codes(
        cls,
        codes: Integer[Tensor, "out in"],
        scale: Float[Tensor, "_ 1"],
        zero: Float[Tensor, "_ 1"],
        wbits: int,
    ) -> "QUIPResult":
        """Keep codes of the layer's own weight."""
        return cls(
            wbits=wbits,
            out_features=codes.shape[0],
            in_features=codes.shape[1],
            packed_codes=_pack(codes, wbits).cpu(),
            scale=scale.to("cpu", torch.float32).contiguous(),
            zero=zero.to("cpu", torch.float16).contiguous(),
        )

    def codes(self, device: torch.device | str | None = None) -> Int32[Tensor, "out in"]:
        """Codes of the transformed weight."""
        packed = self.packed_codes.to(device)
        count = self.out_features * self.in_features
        flat = unpack_columns(packed[None], self.wbits, len(packed) * WORD_BITS // self.wbits)
        return flat[0, :count].reshape(self.out_features, self.in_features)

    def incoherence(self, device: torch.device | str | None = None) -> Incoherence | None:
        """The transforms; None for a layer plainly rounded."""
        if self.incoh_mode is None:
            return None
        signs, scale = self.row_signs.to(device).float(), self.column_scale.to(device).float()
        return Incoherence(self.incoh_mode, signs, scale)

    def dequantize(self, device: torch.device | str | None = None) -> Float[Tensor, "out in"]:
        """Weight in float32 on ``device``, from the codes."""
        weight = self.codes(device).float().sub_(self.zero.to(device)).mul_(self.scale.to(device))
        transforms = self.incoherence(device)
        return weight if transforms is None else transforms.undo(weight.T)

    @property
    def bits_per_weight(self) -> float:
        """All that is stored, of every kind, over the number of weights."""
        num_bits = sum(8 * t.numel() * t.element_size() for t in self.tensors().values())
        return num_bits / (self.out_features * self.in_features)


def _pack(codes: Integer[Tensor, "out in"], wbits: int) -> Int32[Tensor, "words"]:
    flat = torch.nn.functional.pad(codes.reshape(1, -1), (0, -codes.numel() % WORD_BITS))
    return pack_columns(flat, wbits)[0]
