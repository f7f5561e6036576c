"""PEFT's LoRA on top of quantized layers, so that PEFT's own functions work on quantized models.

PEFT keeps a table of the class that puts adapters of each kind into a model. Its entry for LoRA
becomes a class that also knows quantized layers and leaves every other layer to PEFT. So
``get_peft_model`` and ``PeftModel.from_pretrained`` take quantized models like any other.
"""

from typing import Any

import peft
from jaxtyping import Float
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from onecomp.errors import OneCompError
from onecomp.quantizer.quant_linear import QuantLinear

HOOK = "_create_new_module"
"""PEFT's function that makes the layer with an adapter; the one thing that is overridden."""
KNOWN_VERSION = "0.21"


class LoraQuantLinear(nn.Module, LoraLayer):
    """A quantized layer, plus ``lora_alpha / r`` times a trained product of two thin matrices.

    Adapters cannot be merged: the sum has no codes.

    Args:
        base_layer: The quantized layer; it is not changed.
        adapter_name: PEFT's name of the adapter.
        config: Its settings; variants such as DoRA are refused by PEFT.
        r: Inner size of the product.
        lora_alpha: The product counts ``lora_alpha / r`` times.
        **_options: What PEFT passes for other kinds of layers.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        **_options: Any,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """The quantized layer's output with every active adapter's added, in its type."""
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            down, up = self.lora_A[name], self.lora_B[name]
            inputs = self.lora_dropout[name](x.to(down.weight.dtype))
            result = (result + self.scaling[name] * up(down(inputs))).to(result.dtype)
        return result

    def get_delta_weight(self, adapter_name: str) -> Float[Tensor, "out in"]:
        """What an adapter adds to the weight."""
        up, down = self.lora_B[adapter_name].weight, self.lora_A[adapter_name].weight
        return self.scaling[adapter_name] * (up @ down)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            OneCompError: Always.
        """
        del safe_merge, adapter_names
        raise OneCompError(
            "an adapter cannot be merged into quantized weights: the sum has no codes. Serve it "
            "beside the checkpoint, or merge it into the original model and quantize that again."
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return int(module.in_features), int(module.out_features)


class QuantLoraModel(LoraModel):
    """Puts LoRA adapters on quantized layers too."""

    def __init__(self, *args: Any, **kwargs: Any):
        if not callable(getattr(LoraModel, HOOK, None)):
            raise OneCompError(
                f"peft {peft.__version__} makes LoRA layers in another way than peft "
                f"{KNOWN_VERSION} (LoraModel.{HOOK}), so that quantized layers cannot be taught to "
                f"it. Install peft {KNOWN_VERSION}."
            )
        super().__init__(*args, **kwargs)

    @staticmethod
    def _create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantLinear):
            return LoraQuantLinear(target, adapter_name, config=lora_config, **kwargs)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)


def register_with_peft() -> None:
    """Let PEFT know quantized layers; calling it again changes nothing."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QuantLoraModel


def adapter_layers(model: nn.Module) -> dict[str, LoraQuantLinear]:
    """The quantized layers of a model that have an adapter, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraQuantLinear)
    }


def set_dropout(model: nn.Module, *, active: bool) -> None:
    """Switch the dropout in front of adapters; the rest of the model stays in evaluation mode."""
    for layer in adapter_layers(model).values():
        layer.lora_dropout.train(active)
