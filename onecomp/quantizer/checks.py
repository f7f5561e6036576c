"""What a setting may be: tests that any value passes or fails, whatever its type."""

import math


def is_whole(value: object, least: int, most: int | None = None) -> bool:
    """Whether the value is a whole number in a range; True and False are none.

    >>> is_whole(4, 1, 8), is_whole(True, 0), is_whole(1.0, 0), is_whole("4", 1)
    (True, False, False, False)
    """
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value >= least and (most is None or value <= most)


def is_group_size(value: object) -> bool:
    """Whether the value is -1, for one group a row, or a number of columns."""
    return is_whole(value, -1) and value != 0


def is_texts(value: object) -> bool:
    """Whether the value is a collection of texts, or None; a text alone is none.

    >>> is_texts(["lm_head"]), is_texts(None), is_texts("lm_head"), is_texts([1])
    (True, True, False, False)
    """
    if value is None:
        return True
    is_collection = isinstance(value, list | tuple | set | frozenset)
    return is_collection and all(isinstance(item, str) for item in value)


def as_number(value: object) -> float:
    """The value of a finite number; NaN, which passes no comparison, for anything else.

    >>> as_number(0.5), as_number("0.5"), as_number(True), as_number(math.inf)
    (0.5, nan, nan, nan)
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan
