"""Numbers as a report writes them."""

from onecomp.log import format_duration

DASH = "–"  # noqa: RUF001 - an en dash stands for what is not known


def number_text(value: float | None, digits: int = 2) -> str:
    """A number with ``digits`` decimals, or a dash."""
    return DASH if value is None else f"{value:,.{digits}f}"


def error_text(value: float | None) -> str:
    """An error in three digits, or a dash."""
    return DASH if value is None else f"{value:.2e}"


def duration_text(seconds: float | None) -> str:
    """A duration in its two largest units, or a dash."""
    return DASH if seconds is None else format_duration(seconds)


def bytes_text(count: int | float) -> str:
    """A number of bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
