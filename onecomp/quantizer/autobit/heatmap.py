"""A picture of an assignment: bits by layer and block."""

from pathlib import Path

from onecomp.export.quant_config import split_layer_name
from onecomp.quantizer.autobit.assignment import Assignment

FILE = "autobit_assignment.png"
"""Name of the picture in a directory."""


def bits_by_place(found: Assignment) -> tuple[list[str], list[list[float]]]:
    """Names of layers within a block, and for each its bits in every block; NaN where it has none.

    Experts share a row, with their mean. Layers outside the blocks are left out.
    """
    cells: dict[tuple[str, int], list[float]] = {}
    for name, choice in found.layers.items():
        place = split_layer_name(name)
        if place is not None and choice.bits is not None:
            kind = ".".join(part for part in place[1].split(".") if not part.isdigit())
            cells.setdefault((kind, place[0]), []).append(choice.bits)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = range(1 + max((block for _, block in cells), default=-1))
    means = {cell: sum(bits) / len(bits) for cell, bits in cells.items()}
    return kinds, [[means.get((kind, block), float("nan")) for block in blocks] for kind in kinds]


def save_heatmap(found: Assignment, path: str | Path) -> Path:
    """Draw an assignment.

    Args:
        found: What to draw.
        path: A ``.png`` file, or a directory that it goes to; made where it is missing.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second to import

    path = Path(path)
    target = path if path.suffix == ".png" else path / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    kinds, bits = bits_by_place(found)
    figure = Figure(figsize=(2 + 0.25 * len(bits[0]), 1.5 + 0.35 * len(kinds)))
    axes = figure.add_subplot()
    image = axes.imshow(bits, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    axes.set_title(f"{found.average_bits:.3f} bits a weight")
    figure.colorbar(image, label="bits a weight, scales included")
    figure.savefig(target, bbox_inches="tight", dpi=120)
    return target
