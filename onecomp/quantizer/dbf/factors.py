"""The two binary factors of a batch of layers, and how a product of real ones becomes them."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

SPLIT_STEPS = 8
"""Power iterations that part a matrix of magnitudes into a column and a row."""
SMALLEST = 1e-30
MOST_PARTS, LEAST_ROWS = 8, 128
"""Into how many parts a matrix is cut at most, and how many rows a part has at least."""
LEAST_MEAN = 1e-10
"""Of scales: products of three stay above the smallest float32."""


@dataclass(frozen=True)
class BinaryFactors:
    """``diag(row_scale) A diag(middle) B diag(column_scale)`` of layers of equal shape.

    Boža and Macko, 2025, arXiv:2505.11076, section 3.
    """

    row_scale: Float[Tensor, "layers out"]
    row_signs: Float[Tensor, "layers out rank"]
    """``A``, +1 and -1."""
    middle: Float[Tensor, "layers rank"]
    column_signs: Float[Tensor, "layers rank in"]
    """``B``, +1 and -1."""
    column_scale: Float[Tensor, "layers in"]

    @staticmethod
    def split(
        left: Float[Tensor, "layers out rank"], right: Float[Tensor, "layers rank in"]
    ) -> "BinaryFactors":
        """Signs and magnitudes of two matrices whose magnitudes have rank one, or nearly so."""
        row_scale, left_magnitude = rank_one(left, SPLIT_STEPS)
        right_magnitude, column_scale = rank_one(right, SPLIT_STEPS)
        middle = left_magnitude * right_magnitude
        return BinaryFactors(row_scale, signs(left), middle, signs(right), column_scale)

    def left(self) -> Float[Tensor, "layers out rank"]:
        """Everything left of ``B``."""
        return (self.row_signs * self.row_scale[..., None]).mul_(self.middle[..., None, :])

    def right(self) -> Float[Tensor, "layers rank in"]:
        """Everything right of ``A``."""
        return (self.middle[..., None] * self.column_signs).mul_(self.column_scale[..., None, :])

    def weight(self) -> Float[Tensor, "layers out in"]:
        """The product."""
        return (self.left() @ self.column_signs).mul_(self.column_scale[..., None, :])

    def normalised(self) -> "BinaryFactors":
        """The same product with scales that float16 holds well, none of them negative.

        Signs of scales move into ``A`` and ``B``. Column scales get a mean of 1, and the other two
        share what is left.
        """
        columns, rows, middle = self.column_scale, self.row_scale, self.middle
        mean_column = mean_magnitude(columns)
        mean_row, mean_middle = mean_magnitude(rows), mean_magnitude(middle) * mean_column
        share = (mean_row * mean_middle).sqrt()
        return replace(
            self,
            row_scale=rows.abs() * (share / mean_row),
            row_signs=self.row_signs * signs(rows)[..., None],
            middle=middle.abs() * (mean_column * share / mean_middle),
            column_signs=self.column_signs * signs(middle)[..., None] * signs(columns)[:, None],
            column_scale=columns.abs() / mean_column,
        )


def signs(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """+1 and -1; the sign of zero is +1."""
    return torch.where(values < 0, -1.0, 1.0)


def mean_magnitude(values: Float[Tensor, "layers length"]) -> Float[Tensor, "layers 1"]:
    """Mean of the magnitudes of each layer, above zero."""
    return values.abs().mean(dim=-1, keepdim=True).clamp_min(LEAST_MEAN)


def parts(matrix: Float[Tensor, "layers rows columns"]) -> tuple[Tensor, ...]:
    """Views of a few rows each: what is computed part by part takes little memory."""
    return matrix.split(max(LEAST_ROWS, -(-matrix.shape[-2] // MOST_PARTS)), dim=-2)


def rank_one(
    matrix: Float[Tensor, "layers rows columns"],
    num_steps: int,
    row: Float[Tensor, "layers columns"] | None = None,
) -> tuple[Float[Tensor, "layers rows"], Float[Tensor, "layers columns"]]:
    """Best column times row for the magnitudes of matrices, by power iterations.

    Args:
        matrix: Its magnitudes have leading singular vectors without negative entries.
        num_steps: Power iterations.
        row: Where to start; the mean of the magnitudes' rows by default.
    """
    pieces = parts(matrix)
    if row is None:
        row = torch.stack([piece.abs().sum(dim=-2) for piece in pieces]).sum(dim=0)
        row = row / matrix.shape[-2]
    column = row
    for _ in range(num_steps):
        columns, following = [], torch.zeros_like(row)
        for piece in pieces:
            magnitudes = piece.abs()
            columns.append((magnitudes @ row[..., None])[..., 0])
            following += (columns[-1][..., None, :] @ magnitudes)[..., 0, :]
        column = torch.cat(columns, dim=-1)
        length = column.norm(dim=-1, keepdim=True).clamp_min(SMALLEST)
        column, row = column / length, following / length
    return column, row
