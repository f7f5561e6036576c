"""The layer that computes with signs and two vectors of scales, as the checkpoint holds them."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from onecomp.export.bits import num_bytes, pack_bits, unpack_bits
from onecomp.export.quant_config import LayerFormat
from onecomp.quantizer.inference import inference_layer
from onecomp.quantizer.layer_state import adopt, require_names
from onecomp.quantizer.onebit.result import OnebitResult
from onecomp.quantizer.onebit.trainable import TrainableSigns
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.trainable import TrainableLinear, Trained, as_stored

TENSORS = ("a", "b", "sign_packed")


class OnebitLinear(QuantLinear):
    """Linear layer of signs between a scale per output and a scale per input.

    The constructor leaves the tensors empty; layers are made from a result (``inference_layer``)
    and by :meth:`from_checkpoint`.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is a bias.
        dtype: Type of the bias; scales are float16.
        device: Where the empty tensors are; ``"meta"`` allocates nothing.
    """

    code_tensors = frozenset({"sign_packed"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        a, b = (
            torch.empty(size, dtype=torch.float16, device=device)
            for size in (out_features, in_features)
        )
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        packed = torch.empty(
            num_bytes(out_features * in_features), dtype=torch.uint8, device=device
        )
        self.register_buffer("sign_packed", packed)
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", bias_values)

    @classmethod
    def from_checkpoint(
        cls, state: Mapping[str, Tensor], stored: LayerFormat, name: str
    ) -> "OnebitLinear":
        """Layer around the tensors of a checkpoint, which are not copied.

        Raises:
            InputError: A tensor is missing, unexpected or of the wrong shape or type.
        """
        del stored  # one bit, and nothing else to know
        require_names(state, name, TENSORS, ("bias",))
        sizes = state["b"].numel(), state["a"].numel()
        layer = cls(*sizes, bias="bias" in state, device="meta")
        adopt(layer, state, name, f"{sizes[1]} outputs and {sizes[0]} inputs")
        return layer

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``nn.Linear``'s result with the weight rounded to the type of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantize().to(x.dtype), bias)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight in float32."""
        signs = unpack_bits(self.sign_packed, (self.out_features, self.in_features))
        return signs * self.b.float() * self.a.float()[:, None]

    def trainable(
        self, trained: Trained, reference: Float[Tensor, "out in"] | None = None
    ) -> TrainableSigns:
        """Both vectors of scales, and the signs where ``trained`` says so."""
        signs = unpack_bits(self.sign_packed, (self.out_features, self.in_features))
        return TrainableSigns(signs, self.a, self.b, self.bias, trained, reference)

    def adopt(self, learned: TrainableLinear) -> None:
        """Take over scales, and signs where they were trained."""
        assert isinstance(learned, TrainableSigns)
        self.a.data = as_stored(learned.a.detach()).half().to(self.sign_packed.device)
        self.b.data = as_stored(learned.b.detach()).half().to(self.sign_packed.device)
        if learned.trained.signs:
            self.sign_packed = pack_bits(learned.signs().detach().to(self.sign_packed.device))

    def packed_state(self) -> dict[str, Tensor]:
        """Tensors as they are held; scales in float16."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        return {**state, "a": state["a"].half(), "b": state["b"].half()}

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


@inference_layer.register
def _(result: OnebitResult, linear: nn.Linear, *, pack_weights: bool = True) -> OnebitLinear:
    del pack_weights  # there is one layout
    state = {name: result.tensors()[name] for name in TENSORS if name in result.tensors()}
    if linear.bias is not None:
        state["bias"] = linear.bias.detach().clone()
    layer = OnebitLinear.from_checkpoint(state, LayerFormat("onebit", 1), "OnebitResult")
    return layer if linear.weight.is_meta else layer.to(linear.weight.device)
