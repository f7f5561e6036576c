"""What a plan has to know of a quantization method and its settings."""

from dataclasses import asdict, dataclass, replace
from functools import singledispatch

from onecomp.errors import ConfigError
from onecomp.quantizer import (
    ARB,
    CQ,
    DBF,
    GPTQ,
    QBB,
    QUIP,
    RTN,
    AutoBitQuantizer,
    JointQ,
    Onebit,
    Quantizer,
)
from onecomp.quantizer.autobit.assigning import NOMINAL_SHAPE
from onecomp.quantizer.autobit.survey import Survey
from onecomp.quantizer.grid import GridSearch

TRIED_SHARE = 0.8
"""Part of a search's steps that are candidates."""
RTN_STRIDE = 4
"""Distance of the candidates that RTN tries first."""


@dataclass(frozen=True)
class MethodShape:
    """A method as far as it costs time and room."""

    name: str
    wbits: int | float
    """Bits per weight, scales aside."""
    groupsize: int
    """Columns that share a scale; -1 for all."""
    sym: bool
    search: GridSearch | None
    """Range search of each group of columns."""
    is_weighted: bool
    """Whether the search weighs columns."""
    has_hessian: bool
    """Whether text is read, and Hessians are summed up and factored."""
    layout: str | None = "gptq"
    """Of its layers in a checkpoint; None where dequantized weights are stored."""
    rated: Quantizer | None = None
    """The method, where its own ``solve_cost`` says what solving takes, and which factors it needs;
    None for the walk through columns, whose operations are counted."""

    @property
    def num_candidates(self) -> int:
        """Grids that the range search tries for each weight; 0 without a search."""
        return 0 if self.search is None else num_candidates(self.search, sym=self.sym)

    @property
    def num_factors(self) -> int:
        """Factors of each Hessian."""
        return 1 if self.rated is None else len(self.rated.factor_keys())

    def num_scales(self, in_features: int) -> int:
        """Scales of one row."""
        return 1 if self.groupsize == -1 else in_features // self.groupsize

    def as_json(self) -> dict[str, object]:
        """Plain values by name."""
        search = None if self.search is None else asdict(self.search)
        return asdict(replace(self, search=None, rated=None)) | {"search": search}


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
        [f"the costs of {type(quantizer).__name__}, a method of your own, are not known."],
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


def _rated(quantizer: Quantizer, wbits: int | float, layout: str | None) -> MethodShape:
    """A method that says itself what it takes."""
    return MethodShape(
        name=type(quantizer).__name__,
        wbits=wbits,
        groupsize=-1,
        sym=False,
        search=None,
        is_weighted=False,
        has_hessian=quantizer.flag_hessian,
        layout=layout,
        rated=quantizer,
    )


@method_shape.register
def _(quantizer: QUIP) -> MethodShape:
    return _rated(quantizer, quantizer.wbits, layout=None)


@method_shape.register
def _(quantizer: DBF) -> MethodShape:
    return _rated(quantizer, quantizer.target_bits, layout="dbf")


@method_shape.register
def _(quantizer: AutoBitQuantizer) -> MethodShape:
    """As if every layer had the slowest candidate; the survey comes on top."""
    most = _most_bits(quantizer.quantizers)
    return _rated(quantizer, most if quantizer.target_bit is None else quantizer.target_bit, "gptq")


@method_shape.register
def _(quantizer: Survey) -> MethodShape:
    """All candidates, one after the other."""
    return _rated(quantizer, _most_bits(quantizer.quantizers), layout=None)


def _most_bits(quantizers: list[Quantizer]) -> float:
    bits = [quantizer.bits_per_weight("", *NOMINAL_SHAPE) for quantizer in quantizers]
    return max((b for b in bits if b is not None), default=8.0)


@method_shape.register
def _(quantizer: JointQ) -> MethodShape:
    return _rated(quantizer, quantizer.bits, "gptq")


@method_shape.register
def _(quantizer: CQ | ARB) -> MethodShape:
    return _rated(quantizer, 1, None)


@method_shape.register
def _(quantizer: QBB) -> MethodShape:
    return _rated(quantizer, quantizer.wbits, None)


@method_shape.register
def _(quantizer: Onebit) -> MethodShape:
    return _rated(quantizer, 1, "onebit")
