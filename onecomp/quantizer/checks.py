"""What a setting may be: tests that any value passes or fails, and sentences where it fails."""

import math
from collections.abc import Mapping


def is_whole(value: object, least: int, most: int | None = None) -> bool:
    """Whether the value is a whole number in a range; True and False are none.

    >>> is_whole(4, 1, 8), is_whole(True, 0), is_whole(1.0, 0), is_whole("4", 1)
    (True, False, False, False)
    """
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value >= least and (most is None or value <= most)


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


def whole_problems(
    settings: Mapping[str, object], least: int, most: int | None = None
) -> list[str]:
    """What is wrong with settings, by name, that have to be whole numbers in a range.

    >>> whole_problems({"wbits": 9, "mlp_wbits": 4}, 1, 8)
    ['wbits=9: must be a whole number from 1 to 8.']
    """
    allowed = f", at least {least}" if most is None else f" from {least} to {most}"
    return [
        f"{name}={value!r}: must be a whole number{allowed}."
        for name, value in settings.items()
        if not is_whole(value, least, most)
    ]


def positive_problems(settings: Mapping[str, object]) -> list[str]:
    """What is wrong with settings, by name, that have to be numbers above 0.

    >>> positive_problems({"lr": 0.0})
    ['lr=0.0: must be above 0.']
    """
    return [
        f"{name}={value!r}: must be above 0."
        for name, value in settings.items()
        if not as_number(value) > 0
    ]


def ratio_problems(settings: Mapping[str, object]) -> list[str]:
    """What is wrong with settings, by name, that have to be numbers from 0 to 1.

    >>> ratio_problems({"warmup_ratio": 1.5})
    ['warmup_ratio=1.5: must be from 0 to 1.']
    """
    return [
        f"{name}={value!r}: must be from 0 to 1."
        for name, value in settings.items()
        if not 0 <= as_number(value) <= 1
    ]


def group_size_problems(settings: Mapping[str, object]) -> list[str]:
    """What is wrong with settings, by name, that say how many columns share a group.

    >>> group_size_problems({"groupsize": 0, "mlp_groupsize": -1})
    ['groupsize=0: must be -1 (one group a row) or at least 1.']
    """
    return [
        f"{name}={value!r}: must be -1 (one group a row) or at least 1."
        for name, value in settings.items()
        if not (is_whole(value, -1) and value != 0)
    ]
