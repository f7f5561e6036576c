"""Figures of a report as SVG in the text colour of the page, to be read in light and dark."""

import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from onecomp.report.journal import LayerRecord

INK = "#010203"
"""Stands for the page's text colour; replaced in the finished SVG."""
LINE = "#3b82c4"
WIDTH_INCHES = 9.6
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def error_heat_map(layers: Sequence[LayerRecord]) -> str | None:
    """Relative output error of each layer, block by kind of layer, as SVG.

    A cell that stands for several layers (experts) shows the worst. Errors of zero and layers
    that were not measured stay empty.

    Returns:
        None where no layer has a positive error.
    """
    cells: dict[tuple[str, int], float] = {}
    for layer in layers:
        if layer.block is not None and layer.output_error is not None and layer.output_error > 0:
            key = (layer.kind, layer.block)
            cells[key] = max(layer.output_error, cells.get(key, 0.0))
    cells = {key: error for key, error in cells.items() if np.isfinite(error)}
    if not cells:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = range(min(block for _, block in cells), max(block for _, block in cells) + 1)
    grid = np.array([[cells.get((kind, block), np.nan) for block in blocks] for kind in kinds])
    with mpl.rc_context({**STYLE, "svg.hashsalt": "heat"}):
        figure = Figure(figsize=(WIDTH_INCHES, 1.1 + 0.26 * len(kinds)), layout="constrained")
        _draw_heat_map(figure, grid, kinds, blocks)
        return svg_text(figure, "heat", "Relative output error by block and kind of layer")


def _draw_heat_map(figure: Figure, grid: np.ndarray, kinds: Sequence[str], blocks: range) -> None:
    axes = figure.add_subplot()
    low, high = np.nanmin(grid), np.nanmax(grid)
    norm = LogNorm(low, high if high > low else low * 10)
    columns = np.arange(blocks.start, blocks.stop + 1) - 0.5
    mesh = axes.pcolormesh(
        columns,
        np.arange(len(kinds) + 1) - 0.5,
        np.ma.masked_invalid(grid),
        norm=norm,
        cmap="viridis",
    )
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12)
    bar.outline.set_visible(False)


def bytes_bars(moved: dict[int, float], least: dict[int, float]) -> str | None:
    """Bytes that workers sent each other for each block, as SVG; None where nothing was sent.

    Args:
        moved: By block.
        least: The least that any plan sends, by block, as far as it is known.
    """
    if not any(moved.values()):
        return None
    unit, name = _bytes_unit(max([*moved.values(), *least.values()]))
    with mpl.rc_context({**STYLE, "svg.hashsalt": "bytes"}):
        figure = Figure(figsize=(WIDTH_INCHES, 2.2), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(list(moved), [value / unit for value in moved.values()], color=LINE, label="moved")
        if least:
            heights = [value / unit for value in least.values()]
            axes.plot(
                list(least), heights, linestyle="none", marker="_", markersize=7, color=INK,
                markeredgewidth=1.5, label="least possible",
            )  # fmt: skip
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8)
        _style_block_axes(axes, f"{name} a block")
        return svg_text(figure, "bytes", "Bytes moved between workers for each block")


def _bytes_unit(largest: float) -> tuple[float, str]:
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return 1024.0**power, name
    return 1.0, "bytes"


def block_error_line(errors: dict[int, float]) -> str | None:
    """Output error of each block by its number, as SVG; None where there is nothing to draw."""
    points = {block: e for block, e in sorted(errors.items()) if e > 0 and np.isfinite(e)}
    if not points:
        return None
    with mpl.rc_context({**STYLE, "svg.hashsalt": "line"}):
        figure = Figure(figsize=(WIDTH_INCHES, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.semilogy(list(points), list(points.values()), color=LINE, marker="o", markersize=3.5)
        _style_block_axes(axes, "output error")
        return svg_text(figure, "line", "Output error of each block")


def _style_block_axes(axes: Axes, label: str) -> None:
    axes.set_xlabel("block")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", which="both", color=INK, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def svg_text(figure: Figure, prefix: str, title: str) -> str:
    """The figure's ``<svg>`` element; identifiers carry ``prefix``, for one page holds several."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg role="img" aria-label="{title}" \1 '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
    )
