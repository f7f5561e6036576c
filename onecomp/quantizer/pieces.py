"""Numbered pieces: the rows of an input group's layers, cut so that any worker may solve any piece.

The cut follows from the layers' shapes and the tile alone, and one worker solves the same pieces as
many do. So the bits do not depend on who solves what.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from onecomp.qep.config import QEPConfig
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.factors import FactorKey

LEAST_ROWS = 100
"""No layer is cut finer: products of a handful of rows have other bits, and are slow."""
CPU_TILE = (512, 2048)
CPU_TILE_WEIGHTS = 1 << 23
"""Weights of a piece, within these bounds of its rows. A column costs some calls of kernels, which
take as long as its work on 60 to 250 rows: wider layers need fewer rows to outweigh them."""
CUDA_TILE = 4096
"""There the calls weigh more."""
FACTOR_COST = {"cpu": 1.5, "cuda": 0.15}
"""Of ``in ** 3``: a Cholesky factor and its inverse run slower than a product (measured on CPUs).
On GPUs solving columns is mostly calls of small kernels, so factors cost less beside it."""
LEAST_STEP_ROWS = 256
"""Rows of a step within a piece: fewer would not keep products fast."""
EDGE = 16
"""Edges are multiples of this many rows, as vectors of the processor are."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` to ``stop - 1`` of a layer that has ``out_features`` of them."""

    layer_name: str
    start: int
    stop: int
    out_features: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the layer."""
        return len(self) == self.out_features

    def __str__(self) -> str:
        if self.is_whole:
            return "its weight"
        return f"rows {self.start} to {self.stop - 1} of its weight"


@dataclass(frozen=True)
class RowPiece:
    """Rows of a group that are quantized in one go, of one or several layers."""

    index: int
    count: int
    """Pieces that the group has."""
    in_features: int
    ranges: tuple[RowRange, ...]
    """At most one of each layer."""

    @property
    def num_rows(self) -> int:
        """Rows of all ranges."""
        return sum(len(rows) for rows in self.ranges)

    def share(self, layer_name: str) -> float:
        """Fraction of the piece's rows that are this layer's."""
        return sum(len(r) for r in self.ranges if r.layer_name == layer_name) / self.num_rows

    def rows_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This piece's rows of whole weights, as views."""
        return {r.layer_name: weights[r.layer_name][r.start : r.stop] for r in self.ranges}


def row_tile(device: torch.device | str, in_features: int) -> int:
    """Most rows that are solved at once, by the kind of device.

    >>> [row_tile("cpu", size) for size in (576, 8192, 28672)]
    [2048, 1024, 512]
    """
    if torch.device(device).type == "cuda":
        return CUDA_TILE
    least, most = CPU_TILE
    return min(max(CPU_TILE_WEIGHTS // in_features, least), most)


def even_cuts(num_rows: int, tile: int) -> list[tuple[int, int]]:
    """Cut rows into about as few even runs as the tile allows, none under 100 rows but a whole.

    More than eight become a multiple of eight, which is what nodes have of GPUs.

    >>> even_cuts(960, 512)
    [(0, 480), (480, 960)]
    >>> even_cuts(150, 16)
    [(0, 150)]
    """
    count = -(-num_rows // tile)
    count = -(-count // 8) * 8 if count > 8 else count
    count = max(1, min(count, num_rows // (LEAST_ROWS + EDGE)))
    edges = [num_rows * i // count // EDGE * EDGE for i in range(count)]
    return list(pairwise([*edges, num_rows]))


def step_cuts(num_rows: int, in_features: int) -> list[tuple[int, int]]:
    """Rows that steps with many temporaries take at once, so that a Hessian outweighs those.

    For steps in which rows are independent and calls are few, on any device.

    >>> step_cuts(960, 4096)
    [(0, 960)]
    >>> step_cuts(960, 576)
    [(0, 240), (240, 480), (480, 720), (720, 960)]
    """
    return even_cuts(num_rows, max(LEAST_STEP_ROWS, in_features // 4))


def row_pieces(
    quantizer: Quantizer, out_features: Mapping[str, int], in_features: int, tile: int
) -> list[RowPiece]:
    """The pieces of an input group; layers whose rows are not independent are not cut.

    Args:
        quantizer: Says of which layers rows are independent, and which may share a piece.
        out_features: Rows of each layer by full name, in the order of the group.
        in_features: Columns of all of them.
        tile: Most rows of a piece, give or take 16, see ``row_tile``.
    """
    cut: list[tuple[RowRange, ...]] = []
    names = sorted(out_features, key=quantizer.piece_key)
    for _, alike in groupby(names, key=quantizer.piece_key):
        stack = {name: out_features[name] for name in alike}
        is_separable = all(map(quantizer.is_separable, stack))
        cut += _cut(stack, tile if is_separable else max(1, sum(stack.values())))
    return [RowPiece(i, len(cut), in_features, ranges) for i, ranges in enumerate(cut)]


def prepare_cost(
    quantizer: Quantizer, in_features: int, qep: QEPConfig | None, device_type: str = "cpu"
) -> float:
    """Multiplications that take as long as making the factors of a group, as ``piece_cost``."""
    keys = set(quantizer.factor_keys())
    is_corrected = qep is not None and quantizer.flag_hessian
    if is_corrected and qep.percdamp not in {key.percdamp for key in keys}:
        keys.add(FactorKey(qep.percdamp))
    each = FACTOR_COST.get(device_type, FACTOR_COST["cuda"])
    return len(keys) * each * in_features**3


def piece_cost(quantizer: Quantizer, piece: RowPiece, qep: QEPConfig | None) -> float:
    """Multiplications of a product that take as long as correcting and solving a piece on a CPU.

    A core makes some 5e10 of them a second.
    """
    names = [rows.layer_name for rows in piece.ranges]
    corrected = quantizer.flag_hessian and qep is not None and any(map(qep.corrects, names))
    correction = 3.0 * piece.num_rows * piece.in_features**2 if corrected else 0.0
    return correction + quantizer.solve_cost(piece.num_rows, piece.in_features)


def _cut(out_features: Mapping[str, int], tile: int) -> list[tuple[RowRange, ...]]:
    """Cut layers that lie on top of each other."""
    ends, total = {}, 0
    for name, rows in out_features.items():
        total += rows
        ends[name] = total
    pieces = []
    for start, stop in even_cuts(total, tile):
        ranges = [
            RowRange(name, max(start - end + rows, 0), min(stop - end + rows, rows), rows)
            for (name, rows), end in zip(out_features.items(), ends.values(), strict=True)
            if end - rows < stop and start < end
        ]
        pieces.append(tuple(ranges))
    return pieces
