"""What a model says of a batch: its logits, and hidden states behind chosen blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from onecomp.models import ModelConfig, Skeleton
from onecomp.post_process.lora.tokens import Batch


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of all tokens of a batch, padding left out; one sample after another."""

    predictions: Float[Tensor, "targets vocabulary"]
    """Logits that predict the batch's targets."""
    hidden: dict[int, Float[Tensor, "tokens hidden"]]
    """By number of the block that they come out of."""


def blocks_of(model: nn.Module, model_config: ModelConfig) -> nn.ModuleList:
    """The decoder blocks of a model, quantized or not.

    Args:
        model: The model.
        model_config: The original one, which says where blocks are: structure is not seen in
            quantized layers.
    """
    skeleton = Skeleton.build(model_config.source, model_config.torch_dtype)
    blocks: Any = model.get_submodule(skeleton.blocks_name)
    return blocks


def outputs_of(
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, indices: Sequence[int]
) -> Outputs:
    """Run a model on a batch that lies on its device.

    Args:
        model: A causal language model.
        blocks: Its decoder blocks.
        batch: Tokens.
        indices: Numbers of the blocks whose hidden states are wanted.
    """
    with _caught(blocks, indices) as hidden:
        answer = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    return Outputs(
        batch.predictions(answer.logits),
        {index: states[batch.is_token] for index, states in hidden.items()},
    )


@contextmanager
def _caught(blocks: nn.ModuleList, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    found: dict[int, Tensor] = {}
    handles = [
        blocks[index].register_forward_hook(partial(_keep, found, index)) for index in indices
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    found: dict[int, Tensor], index: int, _block: nn.Module, _args: object, output: object
) -> None:
    found[index] = output[0] if isinstance(output, tuple) else output
