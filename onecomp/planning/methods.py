"""What a plan has to know of a quantization method and its settings."""

from dataclasses import dataclass
from functools import singledispatch

from onecomp.errors import ConfigError
from onecomp.quantizer import GPTQ, RTN, Quantizer
from onecomp.quantizer.grid import GridSearch

TRIED_SHARE = 0.8
"""Part of a search's steps that are candidates."""
RTN_STRIDE = 4
"""Distance of the candidates that RTN tries first."""


@dataclass(frozen=True)
class MethodShape:
    """A method as far as it costs time and room."""

    name: str
    wbits: int
    groupsize: int
    """Columns that share a scale; -1 for all."""
    sym: bool
    search: GridSearch | None
    """Range search of each group of columns."""
    is_weighted: bool
    """Whether the search weighs columns."""
    has_hessian: bool
    """Whether text is read, and Hessians are summed up and factored."""

    @property
    def num_candidates(self) -> int:
        """Grids that the range search tries for each weight; 0 without a search."""
        return 0 if self.search is None else num_candidates(self.search, sym=self.sym)

    def num_scales(self, in_features: int) -> int:
        """Scales of one row."""
        return 1 if self.groupsize == -1 else in_features // self.groupsize


def num_candidates(search: GridSearch, *, sym: bool) -> int:
    """Grids that a search tries: every ``stride``-th, then two beside the best at each distance.

    >>> num_candidates(GridSearch(), sym=True)
    48
    """
    coarse = -(-max(1, int(TRIED_SHARE * search.steps)) // search.stride)
    return coarse * (2 if sym else 1) + 2 * (search.stride // 2).bit_length()


@singledispatch
def method_shape(quantizer: Quantizer) -> MethodShape:
    """What a method costs.

    Raises:
        ConfigError: A method whose costs are not known.
    """
    raise ConfigError(
        "plan",
        [f"the costs of {type(quantizer).__name__} are not known. Plan for GPTQ or RTN."],
    )


@method_shape.register
def _(quantizer: GPTQ) -> MethodShape:
    return MethodShape(
        name="GPTQ",
        wbits=quantizer.wbits,
        groupsize=quantizer.groupsize,
        sym=quantizer.sym,
        search=GridSearch(quantizer.q_grid, quantizer.q_norm) if quantizer.mse else None,
        is_weighted=quantizer.weighted_mse,
        has_hessian=True,
    )


@method_shape.register
def _(quantizer: RTN) -> MethodShape:
    search = GridSearch(quantizer.grid, quantizer.norm, stride=RTN_STRIDE)
    return MethodShape(
        name="RTN",
        wbits=quantizer.wbits,
        groupsize=quantizer.groupsize,
        sym=quantizer.sym,
        search=search if quantizer.mse else None,
        is_weighted=False,
        has_hessian=False,
    )
