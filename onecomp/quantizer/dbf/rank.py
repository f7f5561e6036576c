"""How many binary columns a layer gets, and how many bits that makes."""

VECTOR_BITS = 16
"""Of each entry of the three scales."""


def rank_of(out_features: int, in_features: int, target_bits: float) -> int:
    """Inner size of the factors: as many as ``target_bits`` a weight hold, 1 to the smaller side.

    Serving engines compute it anew from the same three numbers, by the same formula.

    >>> rank_of(576, 576, 1.5), rank_of(192, 576, 1.5), rank_of(192, 576, 0.001)
    (432, 192, 1)
    """
    both = out_features + in_features
    rank = int(target_bits * in_features * out_features / both)
    return max(1, min(out_features, in_features, rank))


def achievable_bits(out_features: int, in_features: int, target_bits: float) -> float:
    """Bits of signs per weight that a layer gets: ``target_bits``, less by rounding and its shape.

    >>> achievable_bits(4096, 14336, 1.0) < 1.0 < achievable_bits(4096, 14336, 2.0) < 1.3
    True
    """
    rank = rank_of(out_features, in_features, target_bits)
    return rank * (out_features + in_features) / (out_features * in_features)


def bits_with_scales(out_features: int, in_features: int, target_bits: float) -> float:
    """Bits per weight with the three scales."""
    rank = rank_of(out_features, in_features, target_bits)
    vectors = VECTOR_BITS * (out_features + rank + in_features)
    return achievable_bits(out_features, in_features, target_bits) + vectors / (
        out_features * in_features
    )


def is_clamped(out_features: int, in_features: int, target_bits: float) -> bool:
    """Whether the shape has no room for ``target_bits``."""
    both, smaller = out_features + in_features, min(out_features, in_features)
    return int(target_bits * in_features * out_features / both) > smaller
