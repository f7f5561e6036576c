"""Whether a checkpoint's tensors are those of a quantized layer."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from onecomp.errors import InputError
from onecomp.quantizer.quant_linear import QuantLinear


def require_names(
    state: Mapping[str, Tensor], name: str, required: Sequence[str], optional: Sequence[str]
) -> None:
    """Check that nothing is missing, and nothing is there that no such layer has.

    Raises:
        InputError: For the layer called ``name``.
    """
    missing = [tensor for tensor in required if tensor not in state]
    unexpected = sorted(set(state) - {*required, *optional})
    for kind, tensors in (("missing", missing), ("unexpected", unexpected)):
        if tensors:
            raise InputError(
                name,
                f"tensor {kind} in the checkpoint: {', '.join(tensors)}. Such a layer has "
                f"{', '.join(required)} and at most {', '.join(optional)}. "
                "Write the checkpoint again.",
            )


def adopt(layer: QuantLinear, state: Mapping[str, Tensor], name: str, reason: str) -> None:
    """Give a layer a checkpoint's tensors, which are not copied.

    Args:
        layer: On the meta device, made for these tensors.
        state: A tensor for each of its own, with other types than its own only for scales and bias.
        name: What errors call it.
        reason: What the expected shapes follow from.

    Raises:
        InputError: A tensor of another shape, or no integers where they belong.
    """
    for tensor, expected in layer.state_dict().items():
        found = state[tensor]
        is_number = expected.is_floating_point() and found.is_floating_point()
        if found.shape != expected.shape or not (is_number or found.dtype == expected.dtype):
            raise InputError(
                name,
                f"{tensor} is {found.dtype} of shape {tuple(found.shape)}, but {expected.dtype} of "
                f"shape {tuple(expected.shape)} belongs to {reason}. "
                "The quantization_config does not describe these tensors.",
            )
    layer.load_state_dict(dict(state), assign=True)
