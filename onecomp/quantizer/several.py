"""Several methods for the same layers, from one pass over their statistics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from onecomp.errors import LayerError
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.factors import FactorKey
from onecomp.quantizer.result import QuantizationResult

SEPARATOR = ": "
"""Between the name of a method and that of a layer."""
SELECTION = (
    "num_layers",
    "include_layer_names",
    "exclude_layer_names",
    "include_layer_keywords",
    "exclude_layer_keywords",
    "target_layer_types",
)


@dataclass
class Several(Quantizer):
    """Each method quantizes every layer on the original model's inputs; none sees another's errors.

    Results are named ``method: layer``, see ``results_of``.
    """

    quantizers: list[Quantizer] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = self.quantizers[0] if self.quantizers else None
        for name in SELECTION if isinstance(first, Quantizer) else ():
            setattr(self, name, getattr(first, name))
        super().__post_init__()
        self.flag_calibration = any(method.flag_calibration for method in self.quantizers)
        self.flag_hessian = any(method.flag_hessian for method in self.quantizers)
        self.calc_quant_error = any(method.calc_quant_error for method in self.quantizers)

    def default_name(self) -> str:
        """Names of the methods."""
        return ", ".join(str(getattr(method, "name", method)) for method in self.quantizers)

    def problems(self) -> list[str]:
        """What is wrong with the list, one sentence each."""
        strangers = [method for method in self.quantizers if not isinstance(method, Quantizer)]
        if strangers or not self.quantizers:
            return [f"quantizers={self.quantizers!r}: must be a list of Quantizers, e.g. [GPTQ()]."]
        unready = [method.name for method in self.quantizers if method.needs_survey]
        if unready:
            return [f"{', '.join(unready)} surveys the model first: run it by itself."]
        names = [method.name for method in self.quantizers]
        problems = [
            f"two methods are named {name!r}. Give one of them another name."
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        problems += [
            f"{method.name} has another {name} than {names[0]}: all have to be for the same layers."
            for method in self.quantizers[1:]
            for name in SELECTION
            if getattr(method, name) != getattr(self, name)
        ]
        return problems

    def layer_problems(self, layer_name: str, in_features: int, out_features: int) -> list[str]:
        """Those of every method."""
        return [
            f"{method.name}: {problem}"
            for method in self.quantizers
            for problem in method.layer_problems(layer_name, in_features, out_features)
        ]

    def model_problems(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Those of every method."""
        return [
            f"{method.name}: {problem}"
            for method in self.quantizers
            for problem in method.model_problems(shapes)
        ]

    def remarks(self, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Those of every method."""
        return [
            f"{method.name}: {remark}"
            for method in self.quantizers
            for remark in method.remarks(shapes)
        ]

    def methods(self) -> dict[str, Quantizer]:
        """Each method by what its results' names begin with."""
        return {f"{method.name}{SEPARATOR}": method for method in self.quantizers}

    def is_separable(self, layer_name: str) -> bool:
        """Whether each of them solves the layer's rows independently of each other."""
        return all(method.is_separable(layer_name) for method in self.quantizers)

    def piece_key(self, layer_name: str) -> tuple[object, ...]:
        """Layers that may share a piece in every method."""
        return tuple(method.piece_key(layer_name) for method in self.quantizers)

    def factor_keys(self) -> tuple[FactorKey, ...]:
        """Those of every method."""
        keys = (key for method in self.quantizers for key in method.factor_keys())
        return tuple(dict.fromkeys(keys))

    def solve_cost(self, num_rows: int, in_features: int) -> float:
        """That of all methods."""
        return sum(method.solve_cost(num_rows, in_features) for method in self.quantizers)

    def quantize_layer(
        self,
        module: nn.Module,
        input: Sequence[Tensor] | Tensor | None = None,  # noqa: A002 - documented name
        hessian: Tensor | None = None,
    ) -> QuantizationResult:
        """Always refuses: a layer has one result here for each method.

        Raises:
            LayerError: Always.
        """
        name = self.module_to_name.get(module, "the layer")
        raise LayerError(name, "give it to each of the methods, or all of them to a Runner.")


class ResultsOf(Mapping[str, QuantizationResult]):
    """One method's results by layer name, out of those of several."""

    def __init__(self, results: Mapping[str, QuantizationResult], method_name: str):
        self._results, self._prefix = results, method_name + SEPARATOR

    def __getitem__(self, layer_name: str) -> QuantizationResult:
        return self._results[self._prefix + layer_name]

    def __iter__(self) -> Iterator[str]:
        return (
            name.removeprefix(self._prefix)
            for name in self._results
            if name.startswith(self._prefix)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)


def methods_of(names: Iterable[str]) -> list[str]:
    """Methods that results of several are named after; none where there was one.

    >>> methods_of(["GPTQ_4bit: model.layers.0.q_proj"]), methods_of(["model.layers.0.q_proj"])
    (['GPTQ_4bit'], [])
    """
    return sorted({name.partition(SEPARATOR)[0] for name in names if SEPARATOR in name})
