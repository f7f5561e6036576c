"""Signs packed eight to a byte, as checkpoints of binary methods hold them."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def num_bytes(num_bits: int) -> int:
    """Bytes that so many bits take."""
    return math.ceil(num_bits / 8)


def pack_bits(signs: Float[Tensor, "*shape"] | Bool[Tensor, "*shape"]) -> UInt8[Tensor, "bytes"]:
    """Signs row by row, the first in the highest bit of the first byte.

    Args:
        signs: A bit is 1 for a number >= 0 or for True. Bits that fill up the last byte are 1.

    Example:
        >>> pack_bits(torch.tensor([1.0, -1.0, -1.0])).tolist()
        [159]
    """
    bits = signs.flatten() if signs.dtype == torch.bool else signs.flatten() >= 0
    padded = bits.new_ones(8 * num_bytes(len(bits)))
    padded[: len(bits)] = bits
    packed = bits.new_zeros(len(padded) // 8, dtype=torch.uint8)
    for position, bit in enumerate(padded.view(-1, 8).unbind(dim=1)):
        packed |= bit.to(torch.uint8) << (7 - position)
    return packed


def unpack_bits(
    packed: UInt8[Tensor, "bytes"], shape: Sequence[int]
) -> Float[Tensor, "*unpacked_shape"]:
    """The inverse of :func:`pack_bits`: +1 and -1 in float32.

    Args:
        packed: Bytes; what fills up the last one is not looked at.
        shape: Shape of the signs.

    Example:
        >>> unpack_bits(torch.tensor([159], dtype=torch.uint8), (3,)).tolist()
        [1.0, -1.0, -1.0]
    """
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    return bits.flatten()[: math.prod(shape)].float().mul_(2).sub_(1).view(*shape)
