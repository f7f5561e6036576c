"""Codes in 32-bit words, as GPTQ checkpoints keep them.

Every width is one little-endian bit stream: value ``k`` occupies the bits ``[k*b, k*b + b)``,
counted from the lowest bit of the first word. With 2, 4 and 8 bits a word holds ``32 / b`` whole
values; with 3, 5, 6 and 7 bits 32 values fill ``b`` words and some values straddle two of them.
"""

import torch
from jaxtyping import Int32, Integer
from torch import Tensor

from onecomp.errors import ConfigError

WORD_BITS = 32
PACKED_WBITS = range(1, 9)
LAYER_WBITS = range(2, 9)


def packable(wbits: int, in_features: int, out_features: int) -> bool:
    """Whether a layer of this shape has a packed GPTQ layout.

    Codes are packed along the inputs and zero points along the outputs, so both must divide.
    One bit has no packed layout in this format.
    """
    if wbits not in LAYER_WBITS:
        return False
    num_values, _ = _period(wbits)
    return in_features % num_values == 0 and out_features % num_values == 0


def pack_rows(codes: Integer[Tensor, "rows cols"], wbits: int) -> Int32[Tensor, "words cols"]:
    """Codes packed along dimension 0, ``rows * wbits / 32`` words a column.

    Args:
        codes: Values 0..2**wbits - 1 of any integer type; higher bits are cut off.
        wbits: 1 to 8.

    Raises:
        ConfigError: The rows do not fill whole words.
    """
    return pack_columns(codes.T, wbits).T.contiguous()


def unpack_rows(
    packed: Int32[Tensor, "words cols"], wbits: int, num_rows: int
) -> Int32[Tensor, "rows cols"]:
    """Inverse of :func:`pack_rows`.

    Raises:
        ConfigError: ``packed`` does not hold ``num_rows`` rows.
    """
    return unpack_columns(packed.T.contiguous(), wbits, num_rows).T.contiguous()


def pack_columns(codes: Integer[Tensor, "rows cols"], wbits: int) -> Int32[Tensor, "rows words"]:
    """Codes packed along dimension 1, as zero points are; otherwise like :func:`pack_rows`."""
    _check(wbits, codes.shape[1])
    num_values, num_words = _period(wbits)
    values = (codes.to(torch.int32) & (2**wbits - 1)).unflatten(1, (-1, num_values))
    packed = values.new_zeros(*values.shape[:2], num_words)
    for k in range(num_values):
        word, shift = divmod(k * wbits, WORD_BITS)
        packed[..., word] |= values[..., k] << shift
        if shift + wbits > WORD_BITS:
            packed[..., word + 1] |= values[..., k] >> (WORD_BITS - shift)
    return packed.flatten(1)


def unpack_columns(
    packed: Int32[Tensor, "rows words"], wbits: int, num_columns: int
) -> Int32[Tensor, "rows cols"]:
    """Inverse of :func:`pack_columns`; contiguous when ``packed`` is.

    Raises:
        ConfigError: ``packed`` does not hold ``num_columns`` columns.
    """
    _check(wbits, num_columns)
    if packed.shape[1] * WORD_BITS != num_columns * wbits:
        raise ConfigError(
            "unpack",
            [
                f"{packed.shape[1]} words of {wbits}-bit values hold "
                f"{packed.shape[1] * WORD_BITS // wbits} values, not {num_columns}."
            ],
        )
    num_values, num_words = _period(wbits)
    words = packed.unflatten(1, (-1, num_words))
    offset = torch.arange(num_values, device=packed.device, dtype=torch.int32) * wbits
    shift = offset % WORD_BITS
    first = words if num_words == 1 else words[..., offset // WORD_BITS]
    # The mask also removes the sign bits that an arithmetic shift brings in.
    mask = (1 << torch.clamp(WORD_BITS - shift, max=wbits)) - 1
    values = (first >> shift).bitwise_and_(mask)
    for k in range(num_values):
        word, low = divmod(k * wbits, WORD_BITS)
        if low + wbits > WORD_BITS:
            values[..., k] |= (words[..., word + 1] << (WORD_BITS - low)) & (2**wbits - 1)
    return values.flatten(1)


def _period(wbits: int) -> tuple[int, int]:
    """After how many values, and how many words, the pattern of bits repeats."""
    if WORD_BITS % wbits == 0:
        return WORD_BITS // wbits, 1
    return WORD_BITS, wbits


def _check(wbits: int, num_values: int) -> None:
    if wbits not in PACKED_WBITS:
        raise ConfigError("packing", [f"wbits={wbits}, must be 1 to 8."])
    divisor, _ = _period(wbits)
    if num_values % divisor:
        raise ConfigError(
            "packing",
            [
                f"{num_values} values of {wbits} bits do not fill whole words: the number must "
                f"be a multiple of {divisor}. Keep the layer unpacked, or choose other wbits."
            ],
        )
