"""Reads saved results; quantizes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from onecomp.errors import LayerError
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.result import QuantizationResult


@dataclass
class ResultLoader(Quantizer):
    """A quantizer that already has its results, read from ``results_file`` when it is built."""

    target_layer_types: tuple = field(default_factory=tuple)
    results_file: str | None = None
    weights_only: bool = False
    """Kept for compatibility; the safe loader is used in either case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.results_file is not None and not self.results:
            self.load_results(self.results_file, self.weights_only)

    def quantize_layer(
        self,
        module: nn.Module,
        input: Sequence[Tensor] | Tensor | None = None,  # noqa: A002 - documented name
        hessian: Tensor | None = None,
    ) -> QuantizationResult:
        """Always refuses: there is nothing to quantize with.

        Raises:
            LayerError: Always; it is a RuntimeError, too.
        """
        raise LoaderCannotQuantizeError(self.module_to_name.get(module, "the layer"))


class LoaderCannotQuantizeError(LayerError, RuntimeError):
    """A ResultLoader was asked to quantize."""

    def __init__(self, layer_name: str):
        LayerError.__init__(self, layer_name, "ResultLoader only reads results; use a quantizer.")
        self.args = (layer_name,)
