"""Settings that differ from layer to layer, and group sizes that have to fit them."""

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
