"""Settings that differ from layer to layer; group sizes that have to fit, and what they cost."""

from collections.abc import Mapping
from typing import TypeVar

USUAL_GROUP_SIZES = (128, 64, 32)

Setting = TypeVar("Setting")


def setting_of(
    layer_name: str | None,
    default: Setting,
    of_mlps: Setting | None = None,
    by_name: Mapping[str, Setting] | None = None,
) -> Setting:
    """A layer's setting: by its name, else for layers with ``mlp`` in it, else the default."""
    if layer_name is None:
        return default
    if by_name and layer_name in by_name:
        return by_name[layer_name]
    return of_mlps if of_mlps is not None and "mlp" in layer_name else default


def stored_bits(
    wbits: int | float, groupsize: int, in_features: int, *, group_bits: int | float | None = None
) -> float:
    """Bits a weight takes: those of its code, and its share of what its group stores.

    Args:
        wbits: Bits of the code.
        groupsize: Columns that share a group; -1 for a whole row.
        in_features: Columns of the layer.
        group_bits: Bits of a group; None for those of a scale (16) and a zero point (``wbits``).

    >>> stored_bits(4, 128, 4096), stored_bits(1, -1, 4096, group_bits=32)
    (4.15625, 1.0078125)
    """
    shared = 16 + wbits if group_bits is None else group_bits
    return wbits + shared / (in_features if groupsize == -1 else groupsize)


def group_problems(
    setting: str, size: int, layer_name: str, in_features: int, remedy: str = "Use a divisor"
) -> list[str]:
    """Group sizes have to divide ``in_features``; -1 always does.

    Args:
        setting: Name of the group size.
        size: Its value.
        layer_name: The layer.
        in_features: Its columns.
        remedy: What to do, but for excluding the layer.
    """
    if size == -1 or in_features % size == 0:
        return []
    return [
        f"{setting}={size} must divide in_features, but {layer_name} has "
        f"in_features={in_features} ({in_features} % {size} = {in_features % size}). "
        f"{remedy}, or exclude the layer with exclude_layer_names."
    ]


def fitting_sizes(setting: str, in_features: int, whole: object) -> str:
    """What to use instead: usual sizes that divide, else ``whole``, for one group a row."""
    fitting = [size for size in USUAL_GROUP_SIZES if in_features % size == 0]
    return f"Use {setting}={' or '.join(map(str, fitting or [whole]))}"
