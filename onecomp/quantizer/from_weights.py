"""Methods that are defined by what they do to the weights of one input group."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from onecomp.errors import LayerError
from onecomp.export.quant_config import LayerFormat, finalize_quant_config
from onecomp.quantizer.base import Quantizer
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.result import QuantizationResult


@dataclass
class WeightQuantizer(Quantizer):
    """Base of the methods here: they implement ``quantize_weights``, and say how it is stored."""

    def quantize_layer(
        self,
        module: nn.Module,
        input: Sequence[Tensor] | Tensor | None = None,  # noqa: A002 - documented name
        hessian: Tensor | None = None,
    ) -> QuantizationResult:
        """Quantize one layer; its weight is not changed.

        Args:
            module: A linear layer.
            input: Its input ``(..., in)``, or the tuple a hook gets; used without ``hessian``.
            hessian: ``2 / tokens * XᵀX``, ``(in, in)``.

        Raises:
            LayerError: A shape that the method cannot take, or neither input nor Hessian where it
                needs one.
        """
        name = self.module_to_name.get(module, "the layer")
        weight = module.weight.data.float()
        out_features, in_features = weight.shape
        if problems := self.layer_problems(name, in_features, out_features):
            raise LayerError(name, problems[0])
        factors = self._factors(name, input, hessian) if self.flag_hessian else None
        return self.quantize_weights({name: weight}, factors)[name]

    def _factors(
        self, name: str, inputs: Sequence[Tensor] | Tensor | None, hessian: Tensor | None
    ) -> HessianFactors:
        if hessian is not None:
            return HessianFactors(hessian.float())
        if inputs is None:
            raise LayerError(name, f"{type(self).__name__} needs its input or its Hessian.")
        observed = self._observe(inputs)
        return HessianFactors(observed.hessian(), observed.num_tokens)

    def layer_format(self, layer_name: str) -> LayerFormat:
        """How a layer is stored in a checkpoint.

        Raises:
            NotImplementedError: The method has no checkpoint format.
        """
        raise NotImplementedError(f"{type(self).__name__} has no checkpoint format of its own.")

    def finalize_quant_config_for_save(
        self,
        quant_config: dict,
        quantized_layer_names: Sequence[str],
        num_hidden_layers: int | None,
    ) -> dict:
        """Note which layers are quantized, and how each is stored."""
        layers = {name: self.layer_format(name) for name in quantized_layer_names}
        return finalize_quant_config(quant_config, layers, num_hidden_layers)
