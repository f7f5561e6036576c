"""Linear algebra whose bits do not depend on how many threads the process has."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from onecomp.errors import QuantizationError

STRIP_COLUMNS = 128
MAX_STRIPS = 16


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread: factors differ in the last bit between counts."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def all_finite(tensor: Shaped[Tensor, "*shape"]) -> bool:
    """Whether no value is NaN or infinite; much faster than ``isfinite().all()``, takes no memory.

    Smallest and largest value are NaN where any value is.
    """
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def strip_bounds(size: int) -> list[tuple[int, int]]:
    """Cut 0..size into at most 16 strips of 128 columns or more, as even as can be."""
    count = min(MAX_STRIPS, max(1, size // STRIP_COLUMNS))
    edges = [size * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def gram_strips(rows: Float[Tensor, "tokens in"]) -> list[Float[Tensor, "_ _"]]:
    """Upper part of ``rows.T @ rows`` as strips; strip i holds columns from its own first on.

    Computing strips instead of the whole matrix uses its symmetry: about 55 % of the operations
    and of the bytes to send.
    """
    return [rows[:, a:b].T @ rows[:, a:] for a, b in strip_bounds(rows.shape[1])]


def from_strips(strips: list[Float[Tensor, "_ _"]]) -> Float[Tensor, "in in"]:
    """The symmetric matrix that the strips are the upper part of."""
    size = strips[0].shape[1]
    full = strips[0].new_empty(size, size)
    for (a, b), strip in zip(strip_bounds(size), strips, strict=True):
        full[a:b, a:] = strip
        full[b:, a:b] = strip[:, b - a :].T
    return full


def quadratic_form(
    columns: Float[Tensor, "in rows"], matrix: Float[Tensor, "in in"]
) -> Float[Tensor, "rows"]:
    """``x @ matrix @ x`` for every column ``x``; ``matrix`` is symmetric.

    Uses the symmetry: half of the product is computed.
    """
    total = columns.new_zeros(columns.shape[1])
    for a, b in strip_bounds(matrix.shape[0]):
        part = matrix[a:b, a:b] @ columns[a:b]
        part.addmm_(matrix[a:b, b:], columns[b:], alpha=2)
        total += part.mul_(columns[a:b]).sum(dim=0)
    return total


def damped_hessian(hessian: Float[Tensor, "in in"], percdamp: float) -> Float[Tensor, "in in"]:
    """``hessian + percdamp * mean(diagonal) * I``, where a diagonal of zero counts as 1."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += percdamp * diagonal.mean()
    return damped


@dataclass(frozen=True)
class HessianFactor:
    """A damped Hessian in the order in which its columns are solved, ready to be inverted.

    With columns permuted by ``order``, ``inverse = upper.T @ upper`` where ``upper`` is upper
    triangular: the factor that GPTQ walks through (Frantar et al., 2023, section 3.3).
    """

    order: Tensor | None
    """Column ``order[i]`` is solved as the i-th; None for the layer's own order."""
    upper: Float[Tensor, "in in"]
    percdamp: float
    """Damping that was needed, as a fraction of the mean diagonal."""

    @classmethod
    def of(
        cls,
        hessian: Float[Tensor, "in in"],
        *,
        percdamp: float,
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "HessianFactor":
        """Factor ``hessian + percdamp * mean(diagonal) * I``.

        Columns that no token ever used (zero diagonal) get a diagonal of 1.

        Args:
            hessian: Symmetric and positive semi-definite.
            percdamp: Damping as a fraction of the mean diagonal.
            order: Permutation of the columns.
            dtype: Precision of the factorisation; the result is float32.

        Raises:
            QuantizationError: The damped matrix is not positive definite.
        """
        damped = damped_hessian(hessian.to(dtype), percdamp)
        if order is not None:
            damped = damped[order][:, order]
        # Reversing rows and columns turns the lower factor into an upper one: H = M Mᵀ with M upper
        # triangular, so H⁻¹ = M⁻ᵀ M⁻¹, and M⁻¹ is the factor wanted, without inverting H itself.
        lower, failed_minor = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if failed_minor or not torch.isfinite(lower.diagonal()).all():
            raise QuantizationError(
                f"The Hessian is not positive definite with percdamp={percdamp:g} "
                f"(leading minor {failed_minor.item()} of {len(hessian)}). "
                f"Raise percdamp, or calibrate on more tokens than in_features={len(hessian)}."
            )
        del damped  # before more of their size are made
        inverse = torch.linalg.solve_triangular(
            lower, torch.eye(len(lower), dtype=dtype, device=lower.device), upper=False
        )
        return cls(order, inverse.flip(0, 1).float().contiguous(), percdamp)

    @cached_property
    def unit_upper(self) -> Float[Tensor, "in in"]:
        """``upper`` with each row divided by its diagonal, and zeros on the diagonal.

        A column's plain error times its row here is what the columns behind it are corrected by.
        """
        return (self.upper / self.upper.diagonal()[:, None]).triu_(1)

    @cached_property
    def inverse_order(self) -> Tensor | None:
        """Position of each column in the order of solving."""
        return None if self.order is None else torch.argsort(self.order)

    def permuted(self, matrix: Shaped[Tensor, "rows in"]) -> Shaped[Tensor, "rows in"]:
        """Columns in the order of solving."""
        return matrix if self.order is None else matrix[:, self.order]

    def right_divide(self, matrix: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        """``matrix @ inverse``, in the layer's own column order."""
        solved = (self.permuted(matrix) @ self.upper.T) @ self.upper
        return solved if self.order is None else solved[:, self.inverse_order]
