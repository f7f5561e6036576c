"""Amounts in a plan: of operations, bytes, seconds or money."""

Amount = int | float


def size(num_bytes: Amount) -> str:
    """Bytes with a binary prefix.

    >>> size(131.2 * 2**30)
    '131.2 GiB'
    """
    for power, prefix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.1f} {prefix}"
    return f"{num_bytes:.0f} B"
