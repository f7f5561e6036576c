"""The layer that computes with GPTQ's codes, and whose buffers are the checkpoint's tensors."""

import logging
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.nn import functional

from onecomp.errors import InputError
from onecomp.export.packing import pack_columns, pack_rows, packable, unpack_columns
from onecomp.export.quant_config import GROUP_SIZE, LayerFormat
from onecomp.quantizer.gptq.result import GPTQResult, group_index
from onecomp.quantizer.gptq.trainable import GridTensors, TrainableCodes
from onecomp.quantizer.inference import inference_layer
from onecomp.quantizer.layer_state import adopt, require_names
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.trainable import TrainableLinear, Trained, as_stored

logger = logging.getLogger(__name__)

REQUIRED_TENSORS = ("qweight", "qzeros", "scales")
OPTIONAL_TENSORS = ("g_idx", "bias")


class GPTQLinear(QuantLinear):
    """Linear layer with integer codes on one grid per group of columns.

    The constructor leaves the tensors empty; layers are made by :meth:`from_quantization_result`
    and :meth:`from_saved_state`. Zero points are stored minus one, modulo ``2**wbits`` (version 1
    of the format). Widths and shapes that cannot be packed keep codes ``(out, in)`` and zero
    points ``(groups, out)`` in one int32 each.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        wbits: Bits per weight, 1 to 8.
        groupsize: Columns per group, -1 for all.
        packed: Whether codes and zero points are packed.
        bias: Whether there is a bias.
        dtype: Type of the bias; scales are float16.
        device: Where the empty tensors are; ``"meta"`` allocates nothing.

    Attributes:
        actorder: Columns of a group are not neighbours, so that ``g_idx`` is needed.
    """

    checkpoint_format = "gptq"
    code_tensors = frozenset(REQUIRED_TENSORS)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        wbits: int,
        groupsize: int,
        packed: bool = True,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.wbits, self.groupsize, self.packed = wbits, groupsize, packed
        self.actorder = False
        num_groups = 1 if groupsize == -1 else math.ceil(in_features / groupsize)
        code_shape, zero_shape = (out_features, in_features), (num_groups, out_features)
        if packed:
            code_shape = (in_features * wbits // 32, out_features)
            zero_shape = (num_groups, out_features * wbits // 32)
        integers = {"dtype": torch.int32, "device": device}
        self.register_buffer("qweight", torch.empty(code_shape, **integers))
        self.register_buffer("qzeros", torch.empty(zero_shape, **integers))
        scales = torch.empty(num_groups, out_features, dtype=torch.float16, device=device)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("g_idx", torch.empty(in_features, **integers))
        bias_values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", bias_values)

    @classmethod
    def from_quantization_result(
        cls, result: GPTQResult, linear: nn.Linear, pack_weights: bool = True
    ) -> "GPTQLinear":
        """Layer for ``result`` with the bias and the device of ``linear``.

        Shapes without a packed layout stay unpacked, with a warning when packing was asked for.

        Raises:
            InputError: The result holds no codes, or zero points that are none.
        """
        codes, wbits, groupsize = result.qweight, result.wbits, result.groupsize
        if codes is None or wbits is None or groupsize is None:
            raise InputError("GPTQResult", "has no codes. Quantize the layer again.")
        out_features, in_features = codes.shape
        packed = pack_weights and packable(wbits, in_features, out_features)
        if pack_weights and not packed:
            logger.warning(
                "A layer of %d x %d keeps unpacked %d-bit codes: no packed layout fits it.",
                out_features,
                in_features,
                wbits,
            )
        scales, zeros = _by_group(result.scales, groupsize), _by_group(result.qzeros, groupsize)
        codes, zeros = codes.to(torch.int32), _stored_zeros(zeros, wbits)
        state = {
            "qweight": pack_rows(codes.T, wbits) if packed else codes,
            "qzeros": pack_columns(zeros, wbits) if packed else zeros,
            "scales": scales.to(torch.float16),
            "g_idx": result.group_index,
        }
        if linear.bias is not None:
            state["bias"] = linear.bias.detach().clone()
        layer = cls.from_saved_state(state, wbits=wbits, groupsize=groupsize)
        return layer if linear.weight.is_meta else layer.to(linear.weight.device)

    @classmethod
    def from_checkpoint(
        cls, state: Mapping[str, Tensor], stored: LayerFormat, name: str
    ) -> "GPTQLinear":
        """Layer around the tensors of a checkpoint, with every group number checked."""
        groupsize = stored.params.get(GROUP_SIZE, -1)
        layer = cls.from_saved_state(state, wbits=int(stored.bits), groupsize=groupsize, name=name)
        groups, low, high = len(layer.scales), *map(int, layer.g_idx.aminmax())
        if low < 0 or high >= groups:
            raise InputError(name, f"g_idx has values from {low} to {high} for {groups} groups.")
        return layer

    @classmethod
    def from_saved_state(
        cls, state: Mapping[str, Tensor], *, wbits: int, groupsize: int, name: str = "GPTQLinear"
    ) -> "GPTQLinear":
        """Layer around the tensors of a checkpoint, which are not copied.

        Packed and unpacked tensors are told apart by the width of ``qzeros``, which is the number
        of outputs only when it is unpacked.

        Args:
            state: ``qweight, qzeros, scales``, and optionally ``g_idx`` and ``bias``.
            wbits: Bits per weight.
            groupsize: Columns per group, -1 for all.
            name: What errors call the layer.

        Raises:
            InputError: A tensor is missing, unexpected or of the wrong shape.
        """
        require_names(state, name, REQUIRED_TENSORS, OPTIONAL_TENSORS)
        out_features = state["scales"].shape[-1]
        packed = state["qzeros"].shape[-1] != out_features
        rows, columns = state["qweight"].shape[0], state["qweight"].shape[-1]
        in_features = rows * 32 // wbits if packed else columns
        layer = cls(
            in_features,
            out_features,
            wbits=wbits,
            groupsize=groupsize,
            packed=packed,
            bias="bias" in state,
            device="meta",
        )
        plain = group_index(in_features, groupsize, None).to(state["qweight"].device)
        state = {"g_idx": plain, **state}
        adopt(layer, state, name, f"wbits={wbits} and groupsize={groupsize}")
        layer.actorder = not torch.equal(layer.g_idx, plain)
        return layer

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """``nn.Linear``'s result with the weight rounded to the type of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self._weight(x.dtype), bias)

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight in float32."""
        return self._weight(torch.float32)

    def trainable(
        self, trained: Trained, reference: Float[Tensor, "out in"] | None = None
    ) -> TrainableCodes:
        """Scales, and what ``trained`` says, on unpacked codes."""
        grid = GridTensors(
            self.codes(),
            self.zero_points(),
            self.scales.detach(),
            self.g_idx,
            self.wbits,
            has_plain_groups=self._has_plain_groups,
        )
        return TrainableCodes(grid, self.bias, trained, reference)

    def adopt(self, learned: TrainableLinear) -> None:
        """Take over scales, and zero points and codes where they were trained."""
        assert isinstance(learned, TrainableCodes)
        self.scales.data = as_stored(learned.scale.detach()).half().to(self.scales.device)
        if learned.zero.requires_grad:
            zeros = _stored_zeros(learned.rounded_zero_points().to(self.qzeros.device), self.wbits)
            self.qzeros = pack_columns(zeros, self.wbits) if self.packed else zeros
        if learned.latent is not None:
            codes = learned.codes().detach().to(self.qweight.device, torch.int32)
            self.qweight = pack_rows(codes.T, self.wbits) if self.packed else codes

    def packed_state(self) -> dict[str, Tensor]:
        """Tensors as they are held, packed or not; scales in float16."""
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        return {**state, "scales": state["scales"].to(torch.float16)}

    def codes(self) -> Int32[Tensor, "out in"]:
        """Unpacked codes 0..2**wbits - 1; not to be written to."""
        if not self.packed:
            return self.qweight
        return unpack_columns(self.qweight.T.contiguous(), self.wbits, self.in_features)

    def zero_points(self) -> Int32[Tensor, "groups out"]:
        """Unpacked zero points 0..2**wbits - 1."""
        stored = self.qzeros
        if self.packed:
            stored = unpack_columns(stored, self.wbits, self.out_features)
        return (stored + 1) & (2**self.wbits - 1)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"wbits={self.wbits}, groupsize={self.groupsize}, bias={self.bias is not None}"
        )

    def _weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        # Differences of codes are exact in every float type, and their products with float16 scales
        # in float32: one multiplication in float16 gives the bits of one in float32 and a cast.
        product_dtype = torch.promote_types(self.scales.dtype, dtype)
        steps = self.codes().to(product_dtype, copy=True)
        zeros, scales = self.zero_points().T.to(product_dtype), self.scales.T.to(product_dtype)
        if self._has_plain_groups:
            groups = steps.unflatten(1, (scales.shape[1], -1))
            weight = (groups.sub_(zeros.unsqueeze(2)) * scales.unsqueeze(2)).flatten(1)
        else:
            weight = steps.sub_(zeros[:, self.g_idx]) * scales[:, self.g_idx]
        return weight.to(dtype)

    @property
    def _has_plain_groups(self) -> bool:
        """Groups are neighbouring columns, all of one width."""
        num_groups = len(self.scales)
        return not self.actorder and (num_groups == 1 or self.in_features % self.groupsize == 0)


@inference_layer.register
def _(result: GPTQResult, linear: nn.Linear, *, pack_weights: bool = True) -> GPTQLinear:
    return GPTQLinear.from_quantization_result(result, linear, pack_weights)


def _by_group(values: Tensor | None, groupsize: int) -> Float[Tensor, "groups out"]:
    """Scales or zero points with one row per group, also when there is one group a row."""
    if values is None:
        raise InputError("GPTQResult", "has no scales or zero points. Quantize the layer again.")
    return (values.T if groupsize == -1 else values).contiguous()


def _stored_zeros(zeros: Float[Tensor, "groups out"], wbits: int) -> Int32[Tensor, "groups out"]:
    maxq = 2**wbits - 1
    if not bool(((zeros >= 0) & (zeros <= maxq) & (zeros == zeros.round())).all()):
        raise InputError(
            "GPTQResult",
            f"zero points from {zeros.min():g} to {zeros.max():g} cannot be stored: they must be "
            f"whole numbers from 0 to {maxq} with wbits={wbits}. Save the dequantized model.",
        )
    return (zeros.to(torch.int32) - 1) & maxq
