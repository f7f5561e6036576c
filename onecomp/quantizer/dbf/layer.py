"""The layer that computes with two binary factors; its buffers are the checkpoint's tensors."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from onecomp.errors import InputError
from onecomp.export.bits import num_bytes, pack_bits, unpack_bits
from onecomp.export.quant_config import LayerFormat
from onecomp.quantizer.dbf.rank import rank_of
from onecomp.quantizer.dbf.result import DBFResult, product
from onecomp.quantizer.dbf.trainable import TrainableFactors
from onecomp.quantizer.inference import inference_layer
from onecomp.quantizer.layer_state import adopt, require_names
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.trainable import TrainableLinear, Trained, as_stored

TENSORS = ("scaling0", "bp1", "scaling2", "bp3", "scaling4")
SCALES = ("scaling0", "scaling2", "scaling4")


class DoubleBinaryLinear(QuantLinear):
    """``y = ((((x * Db) Bᵀ) * mid) Aᵀ) * Da + bias`` with signs ``A`` and ``B``.

    Tensors in the order of use: ``scaling0`` is ``Db``, ``bp1`` holds ``B``, ``scaling2`` is
    ``mid``, ``bp3`` holds ``A`` and ``scaling4`` is ``Da``. The constructor leaves them empty.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        rank: Columns of ``A`` and rows of ``B``.
        bias: Whether there is a bias.
        dtype: Type of the bias; scales are float16.
        device: Where the empty tensors are; ``"meta"`` allocates nothing.
    """

    code_tensors = frozenset({"bp1", "bp3", "scaling2"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.scaling0 = _scale(in_features, device)
        self.scaling2 = _scale(rank, device)
        self.scaling4 = _scale(out_features, device)
        for name, num_signs in (("bp1", rank * in_features), ("bp3", out_features * rank)):
            packed = torch.empty(num_bytes(num_signs), dtype=torch.uint8, device=device)
            self.register_buffer(name, packed)
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", values)

    @classmethod
    def from_quantization_result(cls, result: DBFResult, linear: nn.Linear) -> "DoubleBinaryLinear":
        """Layer for ``result`` with the bias and the device of ``linear``.

        Raises:
            IncompleteResultError: The result lacks a factor; a ValueError.
        """
        state = {
            "scaling0": result.factor("dbf_Db"),
            "bp1": pack_bits(result.right_signs()),
            "scaling2": result.factor("dbf_mid"),
            "bp3": pack_bits(result.left_signs()),
            "scaling4": result.factor("dbf_Da"),
        }
        if linear.bias is not None:
            state["bias"] = linear.bias.detach().clone()
        layer = cls.from_saved_state(state)
        return layer if linear.weight.is_meta else layer.to(linear.weight.device)

    @classmethod
    def from_saved_state(
        cls, state: Mapping[str, Tensor], name: str = "DoubleBinaryLinear"
    ) -> "DoubleBinaryLinear":
        """Layer around the tensors of a checkpoint, which are not copied.

        Args:
            state: The five tensors and optionally ``bias``.
            name: What errors call the layer.

        Raises:
            InputError: A tensor is missing, unexpected or of the wrong shape or type.
        """
        require_names(state, name, TENSORS, ("bias",))
        layer = cls(
            state["scaling0"].numel(),
            state["scaling4"].numel(),
            state["scaling2"].numel(),
            bias="bias" in state,
            device="meta",
        )
        adopt(layer, state, name, f"a rank of {layer.rank}")
        return layer

    @classmethod
    def from_checkpoint(
        cls, state: Mapping[str, Tensor], stored: LayerFormat, name: str
    ) -> "DoubleBinaryLinear":
        """Layer around the tensors of a checkpoint, whose rank must be that of its bits."""
        layer = cls.from_saved_state(state, name)
        rank = rank_of(layer.out_features, layer.in_features, stored.bits)
        if layer.rank != rank:
            raise InputError(
                name,
                f"scaling2 has {layer.rank} entries, but bits={stored.bits:g} gives a layer of "
                f"{layer.out_features} x {layer.in_features} a rank of {rank}. "
                "The quantization_config does not describe these tensors.",
            )
        return layer

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``nn.Linear``'s result with the weight rounded to the type of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantize().to(x.dtype), bias)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight in float32."""
        scales = self.scaling4.float(), self.scaling2.float(), self.scaling0.float()
        return product(scales[0], self.left_signs(), scales[1], self.right_signs(), scales[2])

    def left_signs(self) -> Float[Tensor, "out rank"]:
        """``A``, unpacked."""
        return unpack_bits(self.bp3, (self.out_features, self.rank))

    def right_signs(self) -> Float[Tensor, "rank in"]:
        """``B``, unpacked."""
        return unpack_bits(self.bp1, (self.rank, self.in_features))

    def trainable(
        self, trained: Trained, reference: Float[Tensor, "out in"] | None = None
    ) -> TrainableFactors:
        """The three scales, and both factors' signs where ``trained`` says so."""
        scales = self.scaling0, self.scaling2, self.scaling4
        signs = self.left_signs(), self.right_signs()
        return TrainableFactors(*signs, scales, self.bias, trained, reference)

    def adopt(self, learned: TrainableLinear) -> None:
        """Take over scales, and signs where they were trained."""
        assert isinstance(learned, TrainableFactors)
        for name, scale in zip(SCALES, learned.scales(), strict=True):
            getattr(self, name).data = as_stored(scale.detach()).half().to(self.bp1.device)
        if learned.trained.signs:
            self.bp1 = pack_bits(learned.right_signs().detach().to(self.bp1.device))
            self.bp3 = pack_bits(learned.left_signs().detach().to(self.bp3.device))

    def packed_state(self) -> dict[str, Tensor]:
        """The tensors, scales in float16."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        return {**state, **{name: state[name].to(torch.float16) for name in SCALES}}

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


@inference_layer.register
def _(result: DBFResult, linear: nn.Linear, *, pack_weights: bool = True) -> DoubleBinaryLinear:
    del pack_weights  # the format knows packed signs only
    return DoubleBinaryLinear.from_quantization_result(result, linear)


def _scale(length: int, device: torch.device | str | None) -> nn.Parameter:
    values = torch.empty(length, dtype=torch.float16, device=device)
    return nn.Parameter(values, requires_grad=False)
