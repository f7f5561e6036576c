"""The interface of every quantizer: settings in, one result per layer out."""

import copy
import time
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onecomp.errors import ConfigError, LayerError
from onecomp.linalg import one_thread
from onecomp.qep.correction import corrected_weight
from onecomp.quantizer import result_files
from onecomp.quantizer.checks import is_texts, is_whole
from onecomp.quantizer.errors_of import RowErrors
from onecomp.quantizer.factors import FactorKey, HessianFactors
from onecomp.quantizer.inference import inference_layer
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.result import QuantizationResult
from onecomp.statistics import GroupStatistics

RUN_STATE = ("module_to_name", "results")
"""Fields that a run fills; everything else is a setting."""
CHOICES = (
    "include_layer_names",
    "exclude_layer_names",
    "include_layer_keywords",
    "exclude_layer_keywords",
)
"""Settings that choose layers."""
METHODS = {"quantize_layer", "quantize_weights"}
"""What says how a method quantizes."""


class DefaultName(str):
    """A name that follows from the settings, told apart from one that the user gave."""

    __slots__ = ()


@dataclass
class Quantizer(ABC):
    """Settings of a method, and which layers it is for.

    A layer is quantized when all of this holds: it is one of ``target_layer_types``; it is in
    ``include_layer_names`` (if given); its name contains one of ``include_layer_keywords`` (if
    given); it is not in ``exclude_layer_names``; its name contains none of
    ``exclude_layer_keywords``; and fewer than ``num_layers`` were found before it.

    To add a method: inherit, implement ``quantize_layer``, and set ``flag_calibration`` and
    ``flag_hessian`` when it needs calibration data and the Hessian.
    """

    row_separable: ClassVar[bool] = False
    """Rows are quantized independently of each other, so that a layer's may be cut into pieces and
    solved by several workers. Not inherited by a class that quantizes in a way of its own."""

    needs_survey: ClassVar[bool] = False
    """Whether all layers have to be measured before the first is quantized."""

    name: str | None = None
    """Default: class name and main settings; ``dataclasses.replace`` makes a default name anew."""
    num_layers: int | None = None
    """Largest number of layers; None for all."""
    calc_quant_error: bool = False
    """Fill the error fields of the results; those of outputs where text is read, which a method
    without need for it does with ``flag_calibration=True``."""
    include_layer_names: list[str] | None = None
    exclude_layer_names: list[str] = field(default_factory=lambda: ["lm_head"])
    include_layer_keywords: list[str] | None = None
    exclude_layer_keywords: list[str] | None = None
    target_layer_types: tuple = field(default_factory=lambda: (nn.Linear,))
    hessian_dtype: torch.dtype = torch.float32
    """Precision in which the Hessian is handed to ``quantize_layer``; sums are always float32."""
    module_to_name: dict = field(default_factory=dict)
    results: Mapping[str, QuantizationResult] = field(default_factory=dict)
    flag_calibration: bool = False
    flag_hessian: bool = False
    flag_xtx: bool = False

    def __init_subclass__(cls, **kwargs: object):
        super().__init_subclass__(**kwargs)
        if METHODS & vars(cls).keys() and "row_separable" not in vars(cls):
            cls.row_separable = False

    def __post_init__(self) -> None:
        self.validate_params()
        if self.name is None or isinstance(self.name, DefaultName):
            self.name = DefaultName(self.default_name())

    def default_name(self) -> str:
        """Name built from the class and its main settings."""
        return type(self).__name__

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        return []

    def validate_params(self) -> None:
        """Check every setting.

        Raises:
            ConfigError: With all problems at once; it is a ``ValueError``.
        """
        if problems := self._shared_problems() + self.problems():
            raise ConfigError(type(self).__name__, problems)

    def _shared_problems(self) -> list[str]:
        """What is wrong with switches, of any method, and with the choice of layers."""
        problems = [
            f"{name}={value!r}: must be True or False."
            for name in (switch.name for switch in fields(self) if switch.type is bool)
            if not isinstance(value := getattr(self, name), bool)
        ]
        if not (self.num_layers is None or is_whole(self.num_layers, 0)):
            problems.append(f"num_layers={self.num_layers!r}: must be 0 or more, or None for all.")
        return problems + [
            f"{name}={value!r}: must be a list of texts, or None."
            for name in CHOICES
            if not is_texts(value := getattr(self, name))
        ]

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """What keeps this layer from being quantized with these settings, one sentence each."""
        return []

    def model_problems(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """What keeps these layers from being quantized that only all of them together show.

        Args:
            shapes: ``(out_features, in_features)`` of every target layer by full name.
        """
        return []

    def remarks(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """What the user should know of these settings on these layers, said once before the run."""
        return []

    def bits_per_weight(
        self,
        layer_name: str,
        in_features: int,
        out_features: int,
        *,
        wbits: int | float | None = None,
    ) -> float | None:
        """Bits that a weight of this layer takes in storage, scales included; None if not known.

        Args:
            layer_name: Full name.
            in_features: Its columns.
            out_features: Its rows.
            wbits: In place of the method's own bits; scales are added as the method stores them.
        """
        return wbits

    # Layers

    def selects(self, name: str, module: nn.Module) -> bool:
        """Whether a module is a target, ``num_layers`` aside."""
        return isinstance(module, tuple(self.target_layer_types)) and self.accepts(name)

    def accepts(self, layer_name: str) -> bool:
        """Whether a layer of this name may be a target."""
        included_names, included_keywords = self.include_layer_names, self.include_layer_keywords
        return (
            (included_names is None or layer_name in included_names)
            and (included_keywords is None or any(key in layer_name for key in included_keywords))
            and layer_name not in (self.exclude_layer_names or ())
            and not any(key in layer_name for key in self.exclude_layer_keywords or ())
        )

    def select_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Target layers by full name, in the order of ``named_modules``."""
        found = {n: m for n, m in model.named_modules() if self.selects(n, m)}
        return dict(list(found.items())[: self.num_layers])

    def setup(self, model: nn.Module) -> None:
        """Note a live model's target layers in ``module_to_name``, for the hook ``quantize``."""
        self.validate_params()
        self.module_to_name = {m: name for name, m in self.select_layers(model).items()}

    def execute_post_processing(self) -> None:
        """Forget the live model; results stay."""
        self.module_to_name = {}

    # One layer of a live model

    @abstractmethod
    def quantize_layer(
        self,
        module: nn.Module,
        input: Sequence[Tensor] | Tensor | None = None,  # noqa: A002 - documented name
        hessian: Tensor | None = None,
    ) -> Tensor | QuantizationResult:
        """Quantize one layer; its weight is not changed.

        Args:
            module: The layer.
            input: Its input activations ``(..., in)``; used where ``hessian`` is not given.
            hessian: ``2 / tokens * XᵀX``, ``(in, in)``.

        Returns:
            A result, or just the dequantized weight.
        """

    def quantize(
        self,
        module: nn.Module,
        input: Sequence[Tensor] | Tensor,  # noqa: A002 - documented name
        output: Tensor | None = None,
    ) -> None:
        """Quantize a layer within a forward pass (a forward hook); fills ``results``."""
        started = time.monotonic()
        statistics = self._observe(input) if self.flag_hessian or self.calc_quant_error else None
        hessian = statistics.hessian().to(self.hessian_dtype) if self.flag_hessian else None
        with one_thread():
            result = as_result(self.quantize_layer(module, input, hessian))
        result.quantization_time = time.monotonic() - started
        self._keep(module, module.weight.data, result, statistics)

    def quantize_with_qep(
        self,
        module: nn.Module,
        quant_input_activation: Tensor | None,
        original_input_activation: Tensor | None = None,
        percdamp: float = 0.01,
        perccorr: float = 0.5,
        hessian: Tensor | None = None,
        delta_hatX: Tensor | None = None,
    ) -> None:
        """Correct the weight for the error of the layer's input, then quantize; fills ``results``.

        Quantization error propagation (Arai and Ichikawa, 2025, arXiv:2504.09629), see
        ``onecomp.qep``. The corrected weight is written to ``module.weight``. Without
        ``original_input_activation`` and ``delta_hatX`` there is no correction.

        Args:
            module: The layer.
            quant_input_activation: Input in the model quantized so far, ``(..., in)``; None where
                ``hessian`` is given, output errors are then not measured.
            original_input_activation: The same tokens' input in the original model.
            percdamp: Damping of the correction, a fraction of the Hessian's mean diagonal.
            perccorr: How much of the correction to apply, 0 to 1.
            hessian: ``2 / tokens * X̂ᵀX̂``; computed from the input when missing.
            delta_hatX: ``2 / tokens * (X - X̂)ᵀX̂``; computed from both inputs when missing.

        Raises:
            LayerError: ``quant_input_activation`` is None and something must be computed from it.
        """
        started = time.monotonic()
        statistics = None
        if quant_input_activation is not None:
            statistics = GroupStatistics.of(quant_input_activation, original_input_activation)
            hessian = statistics.hessian() if hessian is None else hessian
            delta_hatX = statistics.delta() if delta_hatX is None else delta_hatX
        elif hessian is None or (delta_hatX is None and original_input_activation is not None):
            raise LayerError(
                self.module_to_name.get(module, "the layer"),
                "quant_input_activation=None: give it, or hessian and delta_hatX in its place.",
            )
        with one_thread():
            if delta_hatX is not None:
                factor = HessianFactors(hessian.float()).at(percdamp)
                weight = corrected_weight(module.weight.data.float(), delta_hatX, factor, perccorr)
                module.weight.data.copy_(weight)
            result = as_result(
                self.quantize_layer(module, quant_input_activation, hessian.to(self.hessian_dtype))
            )
        result.quantization_time = time.monotonic() - started
        self._keep(module, module.weight.data, result, statistics)

    def _observe(self, inputs: Sequence[Tensor] | Tensor) -> GroupStatistics:
        return GroupStatistics.of(inputs if isinstance(inputs, Tensor) else inputs[0], None)

    def _keep(
        self,
        module: nn.Module,
        weight: Tensor,
        result: QuantizationResult,
        statistics: GroupStatistics | None,
    ) -> None:
        if self.calc_quant_error:
            measured = (None, 0)
            if statistics is not None:
                measured = statistics.hessian(), statistics.num_tokens
            RowErrors.of(result, weight, *measured).fill(result, weight.shape[1])
        if not isinstance(self.results, MutableMapping):  # those of a run stay in its directory
            self.results = ChainMap({}, self.results)
        self.results[self.module_to_name.get(module, "")] = result

    # A group of layers with the same input: what the pipeline calls

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """Factors that ``quantize_weights`` asks for: they are made once, before."""
        return ()

    def methods(self) -> Mapping[str, "Quantizer"]:
        """Who quantizes, by what the names of their results begin with: itself, or several."""
        return {"": self}

    def piece_key(self, layer_name: str) -> tuple[object, ...]:
        """Rows of layers with equal keys may lie in one piece, to be solved together."""
        return ()

    def is_separable(self, layer_name: str) -> bool:
        """Whether this layer's rows may be cut into pieces; the same for all of a piece key."""
        return self.row_separable

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """Multiplications that take as long as ``quantize_weights`` of so many rows on a CPU."""
        return float(num_rows * in_features * (in_features if self.flag_hessian else 1))

    def baseline(
        self, layer_name: str, weight: Float[Tensor, "_ in"]
    ) -> Float[Tensor, "_ in"] | None:
        """Rows of a layer plainly rounded at the same bits, float32.

        The pipeline notes in the journal where the result's output error is larger than theirs.
        None where a method compares by itself, or is plain rounding.
        """
        return None

    def quantize_weights(
        self, weights: Mapping[str, Float[Tensor, "out in"]], factors: HessianFactors | None
    ) -> Mapping[str, QuantizationResult]:
        """Quantize layers that share an input; methods override it to share work between them.

        Args:
            weights: Float32 weights by full layer name; some rows of them where ``row_separable``.
                They are not changed.
            factors: The Hessian and its factors; None for methods without one.
        """
        hessian = None if factors is None else factors.hessian.to(self.hessian_dtype)
        method = copy.copy(self)  # other threads use this quantizer, too
        results = {}
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            method.module_to_name = {layer: name}
            results[name] = as_result(method.quantize_layer(layer, None, hessian))
        return results

    # Results

    def save_results(self, filepath: str | Path) -> None:
        """Write ``results`` to a file (``.pt``) of tensors and plain values."""
        result_files.save_results(self.results, filepath)

    def load_results(
        self, filepath: str | Path, weights_only: bool = False
    ) -> Mapping[str, QuantizationResult]:
        """Read ``results`` from a file; result objects are restored without unpickling any.

        Args:
            filepath: File written by ``save_results``.
            weights_only: Kept for compatibility; the safe loader is used in either case.
        """
        del weights_only
        self.results = result_files.load_results(filepath)
        return self.results

    def apply_results_to_model(self, model: nn.Module, **kwargs: object) -> None:
        """Let the layers of ``model`` that have a result compute with it, in place.

        They are replaced by their inference layers; where a method has none, the layer stays and
        its weight becomes the dequantized one.

        Args:
            model: The base model.
            **kwargs: For ``create_inference_layer``, e.g. ``pack_weights=True``.
        """
        for name, result in self.results.items():
            linear = model.get_submodule(name)
            try:
                model.set_submodule(name, self.create_inference_layer(result, linear, **kwargs))
            except NotImplementedError:
                linear.weight.data.copy_(result.dequantize(linear.weight.device))

    # Export

    def get_quant_config(self) -> dict:
        """``quantization_config`` of a checkpoint.

        Raises:
            NotImplementedError: The method has no checkpoint format.
        """
        raise NotImplementedError(f"{type(self).__name__} has no checkpoint format of its own.")

    def create_inference_layer(
        self, result: QuantizationResult, linear_module: nn.Linear, **kwargs: object
    ) -> QuantLinear:
        """The layer that runs and is saved in place of ``linear_module``; by the kind of result.

        Raises:
            NotImplementedError: Results of this kind have no layer of their own.
        """
        return inference_layer(result, linear_module, **kwargs)

    def finalize_quant_config_for_save(
        self,
        quant_config: dict,
        quantized_layer_names: Sequence[str],
        num_hidden_layers: int | None,
    ) -> dict:
        """Complete ``get_quant_config`` with what is known once the layers are."""
        return quant_config

    def settings(self) -> dict[str, object]:
        """Every setting by name, without what a run fills."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in RUN_STATE}


def as_result(outcome: Tensor | QuantizationResult) -> QuantizationResult:
    """A result, whatever ``quantize_layer`` returned."""
    if isinstance(outcome, Tensor):
        return QuantizationResult(dequantized_weight=outcome.to("cpu", torch.float16))
    return outcome
