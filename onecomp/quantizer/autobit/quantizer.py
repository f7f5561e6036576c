"""AutoBit's settings: which candidates there are, and what all of them together may take."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from onecomp.calibration.config import CalibrationConfig
from onecomp.errors import LayerError
from onecomp.export.quant_config import LayerFormat, mixed_quant_config
from onecomp.quantizer.autobit.assigning import Assigner, Shapes, dbf_of, layer_choice
from onecomp.quantizer.autobit.assignment import Assignment
from onecomp.quantizer.autobit.survey import Survey
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.checks import as_number, is_whole
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.from_weights import WeightQuantizer
from onecomp.quantizer.result import QuantizationResult

STRATEGIES = ("activation_aware", "ilp", "manual")
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that inference engines join in one, which then needs one format."""


@dataclass
class AutoBitQuantizer(WeightQuantizer):
    """Gives each layer one of several methods, so that all keep to a number of bits on average.

    Every candidate is tried on every layer with its own settings, and the integer programme of
    ``autobit.algorithm`` takes those with the least sum of errors. The error of a layer is what its
    outputs move on the calibration text, weighted by the square of the loss's derivative by each
    output: the second-order change of the loss with a diagonal approximation over outputs, as in
    Optimal Brain Compression (Frantar and Alistarh, 2022, arXiv:2208.11580) with K-FAC's factors
    (Martens and Grosse, 2015, arXiv:1503.05671).

    Example:
        >>> from onecomp import RTN
        >>> AutoBitQuantizer(quantizers=[RTN(wbits=2), RTN(wbits=4)], target_bit=3).name
        'AutoBit_3bit'
    """

    needs_survey: ClassVar[bool] = True

    quantizers: list[Quantizer] = field(default_factory=list)
    """Candidates; each is used only for layers that its own selection rules accept."""
    assignment_strategy: str = "activation_aware"
    """``activation_aware``; ``ilp`` for plain ``‖ΔW‖²`` without any text; ``manual`` for the first
    candidate that accepts the layer's name, without a target."""
    ratios: list[float] | None = None
    """Accepted for compatibility and without effect."""
    target_bit: int | float | None = None
    """Average bits a weight, at least 1; see ``estimate_wbits_from_vram``."""
    target_bit_is_effective: bool = False
    """``target_bit`` counts scales, too; else they are added as the candidates have them."""
    calibration_config: CalibrationConfig | None = None
    """Text of the survey; None for that of the run."""
    use_curvature_b: bool = True
    """Weigh each output by the loss's derivative; else all outputs alike."""
    save_path: str | None = None
    """Where a picture of the assignment goes: a PNG file or a directory."""
    auto_dbf: bool = True
    """Make DBF a candidate where bits are few, and take nothing else below all candidates."""
    dbf_threshold: int | float = 2.0
    """``target_bit`` up to which bits are few."""
    dbf_iters: int | None = None
    """Its iterations; None for its default."""
    bitpack_on_quantize: bool = True
    """Accepted for compatibility and without effect."""
    fused_groups: list[list[str]] = field(default_factory=lambda: [list(g) for g in FUSED_GROUPS])
    """Layers of one module, by the last part of their names, that get the same candidate."""
    enable_fused_groups: bool = True
    _: KW_ONLY
    assignment: Assignment | None = None
    """Filled by the run before its first block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_text = self.assignment_strategy == "activation_aware" or self._may_take_dbf()
        self.flag_calibration = needs_text or any(c.flag_calibration for c in self.quantizers)
        self.flag_hessian = self._may_take_dbf() or any(c.flag_hessian for c in self.quantizers)

    def default_name(self) -> str:
        """Name from the target."""
        bits = self.assignment_strategy if self.target_bit is None else f"{self.target_bit:g}bit"
        return f"AutoBit_{bits}"

    def settings(self) -> dict[str, object]:
        """Every setting by name; the assignment is none."""
        return {n: value for n, value in super().settings().items() if n != "assignment"}

    # Checks

    def problems(self) -> list[str]:
        """What is wrong with the settings, those of the candidates included, one sentence each."""
        problems = [*_candidate_problems(self.quantizers), *self._target_problems()]
        if self.assignment_strategy not in STRATEGIES:
            names = ", ".join(STRATEGIES)
            problems.append(
                f"assignment_strategy={self.assignment_strategy!r}: must be of {names}."
            )
        if not isinstance(self.calibration_config, CalibrationConfig | None):
            problems.append(
                f"calibration_config={self.calibration_config!r}: must be a CalibrationConfig."
            )
        if not as_number(self.dbf_threshold) >= 0:
            problems.append(f"dbf_threshold={self.dbf_threshold!r}: must be a number, at least 0.")
        if self.dbf_iters is not None and not is_whole(self.dbf_iters, 1):
            problems.append(f"dbf_iters={self.dbf_iters!r}: must be None or at least 1.")
        if not isinstance(self.save_path, str | None):
            problems.append(f"save_path={self.save_path!r}: must be a path as text, or None.")
        return problems + _fused_problems(self.fused_groups)

    def _target_problems(self) -> list[str]:
        if self.target_bit is None:
            if self.assignment_strategy == "manual":
                return []
            return ["target_bit=None: give one, e.g. estimate_wbits_from_vram(model_id)."]
        if not as_number(self.target_bit) >= 1:
            return [f"target_bit={self.target_bit!r}: must be a number of bits, at least 1."]
        return []

    def accepts(self, layer_name: str) -> bool:
        """Whether its own rules accept the layer, and those of a candidate."""
        return super().accepts(layer_name) and any(c.accepts(layer_name) for c in self.quantizers)

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """Those of every candidate for the layer."""
        return [
            f"{candidate.name}: {problem}"
            for candidate in self.quantizers
            if candidate.accepts(layer_name)
            for problem in candidate.layer_problems(layer_name, in_features, out_features)
        ]

    def model_problems(self, shapes: Shapes) -> list[str]:
        """Those of the candidates, and a target that no assignment keeps to."""
        problems = [
            f"{candidate.name}: {problem}"
            for candidate in self.quantizers
            for problem in candidate.model_problems(_own(candidate, shapes))
        ]
        if problems or self.assignment_strategy == "manual":
            return problems
        return self._assigner.problems(shapes)

    def remarks(self, shapes: Shapes) -> list[str]:
        """What is to be known of DBF, and of each candidate that there will be."""
        is_manual = self.assignment_strategy == "manual"
        remarks = [] if is_manual else self._assigner.remarks(shapes)
        if not is_manual and self._assigner.takes_only_dbf(shapes):
            return remarks
        return remarks + [
            f"{candidate.name}: {remark}"
            for candidate in self._candidates()
            for remark in candidate.remarks(_own(candidate, shapes))
        ]

    # Assigning

    @property
    def _assigner(self) -> Assigner:
        return Assigner(
            self.quantizers,
            self.fused_groups if self.enable_fused_groups else [],
            self.target_bit,
            self.target_bit_is_effective,
            self.auto_dbf,
            self.dbf_threshold,
            self.dbf_iters,
        )

    def _may_take_dbf(self) -> bool:
        if self.assignment_strategy == "manual":
            return False
        is_candidate = len(self._candidates()) > len(self.quantizers)
        return is_candidate or self._assigner.may_take_only_dbf()

    def _candidates(self) -> list[Quantizer]:
        """Those that were given, and DBF where the target is low."""
        is_manual = self.assignment_strategy == "manual"
        return list(self.quantizers) if is_manual else self._assigner.children

    def survey(self) -> Survey:
        """What measures the candidates' errors."""
        is_weighted = self.assignment_strategy == "activation_aware"
        return Survey(
            quantizers=self._candidates(), flag_calibration=is_weighted, flag_hessian=is_weighted
        )

    def assign_unmeasured(self, shapes: Shapes) -> Assignment | None:
        """The assignment where nothing has to be measured: by name, or DBF for all; else None."""
        if self.assignment_strategy == "manual":
            chosen = {name: self._first_that_accepts(name) for name in shapes}
            return Assignment(
                {n: layer_choice(self.quantizers, n, shapes, i) for n, i in chosen.items()}
            )
        is_dbf = self._assigner.takes_only_dbf(shapes)
        return self._assigner.only_dbf(shapes) if is_dbf else None

    def assign(self, shapes: Shapes, errors: Mapping[str, Sequence[float]]) -> Assignment:
        """The assignment with the least sum of errors that keeps to the target.

        Args:
            shapes: All target layers.
            errors: By layer, of each candidate.

        Raises:
            ConfigError: None keeps to the target; with what there is.
        """
        return self._assigner.assign(shapes, errors)

    def _first_that_accepts(self, layer_name: str) -> int:
        return next(i for i, c in enumerate(self.quantizers) if c.accepts(layer_name))

    @property
    def children(self) -> list[Quantizer]:
        """The candidates, and behind them what the assignment added."""
        added = () if self.assignment is None else self.assignment.dbf_bits
        return [*self._candidates(), *(dbf_of(bits, self.dbf_iters) for bits in added)]

    def child_of(self, layer_name: str) -> int:
        """Number of the child that quantizes a layer.

        Raises:
            LayerError: The layer has none: the candidates were not compared yet.
        """
        if self.assignment is not None and layer_name in self.assignment.layers:
            return self.assignment.layers[layer_name].child
        if self.assignment_strategy == "manual" and self.accepts(layer_name):
            return self._first_that_accepts(layer_name)
        raise LayerError(
            layer_name, "AutoBitQuantizer has no method for it yet: Runner.run() compares them."
        )

    def used_children(self) -> list[tuple[int, Quantizer]]:
        """Children that have layers, that with the most first; all while nothing is assigned."""
        if self.assignment is None:
            return list(enumerate(self._candidates()))
        counts = self.assignment.num_layers().most_common()
        return [(number, self.children[number]) for number, _ in counts]

    # Quantizing

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """Those of every child that has layers."""
        keys = (key for _, child in self.used_children() for key in child.factor_keys())
        return tuple(dict.fromkeys(keys))

    def piece_key(self, layer_name: str) -> tuple[object, ...]:
        """Layers of one child that may share a piece there."""
        number = self.child_of(layer_name)
        return number, *self.children[number].piece_key(layer_name)

    def is_separable(self, layer_name: str) -> bool:
        """Whether the layer's child solves rows independently; all it may get, before that."""
        if self.assignment is None and self.assignment_strategy != "manual":
            return self.survey().is_separable(layer_name)
        return self.children[self.child_of(layer_name)].is_separable(layer_name)

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """That of the slowest child."""
        return max(child.solve_cost(num_rows, in_features) for _, child in self.used_children())

    def baseline(
        self, layer_name: str, weight: Float[Tensor, "_ in"]
    ) -> Float[Tensor, "_ in"] | None:
        """That of the layer's child."""
        return self.children[self.child_of(layer_name)].baseline(layer_name, weight)

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float | None:
        """That of the layer's child."""
        child = self.children[self.child_of(layer_name)]
        return child.bits_per_weight(layer_name, in_features, out_features, wbits=wbits)

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> dict[str, QuantizationResult]:
        """Each child quantizes its layers."""
        children, results = self.children, {}
        for number in sorted({self.child_of(name) for name in weights}):
            child = children[number]
            own = {name: w for name, w in weights.items() if self.child_of(name) == number}
            results |= child.quantize_weights(own, factors if child.flag_hessian else None)
        return {name: results[name] for name in weights}

    # Export

    def get_quant_config(self) -> dict:
        """Top level of the ``quantization_config``: GPTQ's where all layers have its layout."""
        average = None if self.assignment is None else self.assignment.average_bits
        configs = [child.get_quant_config() for _, child in self.used_children()]
        return mixed_quant_config(configs, average)

    def layer_format(self, layer_name: str) -> LayerFormat:
        """That of the layer's child."""
        return self.children[self.child_of(layer_name)].layer_format(layer_name)


def _own(candidate: Quantizer, shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The layers that a candidate is for."""
    return {name: shape for name, shape in shapes.items() if candidate.accepts(name)}


def _candidate_problems(candidates: object) -> list[str]:
    if not isinstance(candidates, list | tuple) or not candidates:
        kind = "empty" if candidates == [] else f"a {type(candidates).__name__}"
        return [f"quantizers is {kind}: must be a list of methods, e.g. [GPTQ(wbits=4)]."]
    problems = []
    for index, candidate in enumerate(candidates):
        place = f"quantizers[{index}]"
        if not isinstance(candidate, WeightQuantizer) or candidate.needs_survey:
            problems.append(
                f"{place} is a {type(candidate).__name__}: must be a method of single layers, "
                "e.g. GPTQ(wbits=4)."
            )
            continue
        problems += [f"{place} ({candidate.name}): {p}" for p in candidate.problems()]
        if candidate.num_layers is not None:
            problems.append(
                f"{place} ({candidate.name}): num_layers={candidate.num_layers} has no meaning for "
                "one of several candidates. Set it on AutoBitQuantizer."
            )
    return problems


def _fused_problems(groups: object) -> list[str]:
    rule = 'must be lists of two or more names, e.g. [["gate_proj", "up_proj"]].'
    if not isinstance(groups, list | tuple) or not all(isinstance(g, list | tuple) for g in groups):
        return [f"fused_groups={groups!r}: {rule}"]
    problems = [
        f"fused_groups: {list(group)!r} {rule}"
        for group in groups
        if len(group) < 2 or not all(isinstance(name, str) and name for name in group)
    ]
    names = [name for group in groups for name in group]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    return problems + [f"fused_groups: {name!r} is named twice. Name it once." for name in twice]
