"""Signs as bits: eight to a byte, the first in the highest bit."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

WEIGHT_OF_BIT = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_signs(values: Float[Tensor, "rows columns"]) -> UInt8[Tensor, "_"]:
    """Bits of a matrix row by row: 1 for 0 and above, 0 below; the last byte is filled with ones.

    >>> pack_signs(torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])).tolist()
    [155]
    """
    bits = (values >= 0).flatten().to(torch.uint8)
    filled = torch.nn.functional.pad(bits, (0, -len(bits) % 8), value=1)
    weights = torch.tensor(WEIGHT_OF_BIT, dtype=torch.uint8, device=values.device)
    return (filled.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_signs(
    packed: UInt8[Tensor, "_"], shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows columns"]:
    """The inverse: +1 and -1.

    Args:
        packed: Bytes of ``pack_signs``.
        shape: Rows and columns.
        dtype: Of the signs.
    """
    weights = torch.tensor(WEIGHT_OF_BIT, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] & weights) != 0
    return (bits.flatten()[: shape[0] * shape[1]].to(dtype) * 2 - 1).view(shape)


def num_bytes(num_signs: int) -> int:
    """Bytes that so many signs take."""
    return -(-num_signs // 8)
