"""What has to fit before any work starts: stored tensors, lengths of samples, numbers of tokens."""

import logging

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from onecomp.errors import InputError
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import StoredTensor

logger = logging.getLogger(__name__)

NUM_NAMED = 5
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes of weights that stand for themselves; those of 8 bits and fewer come with scales."""
TABLE_OFFSET = 4
"""Rows that a table of positions may have beyond the positions; OPT has two."""


def require_stored_tensors(skeleton: Skeleton) -> None:
    """Check that the checkpoint holds every tensor of the model; only headers are read.

    A tensor that the model ties to another one may be absent, and so may buffers, which the model
    computes. Tensors that the model does not use do not matter.

    Args:
        skeleton: Model without weights, and its checkpoint.

    Raises:
        InputError: Parameters that are missing, of another shape, or not floating point.
    """
    model, headers = skeleton.model, skeleton.source.headers()
    problems, fused = [], []
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = headers.get(skeleton.tensor_name(name))
        if stored is not None:
            problems += _misfits(name, tensor, stored)
        elif isinstance(tensor, nn.Parameter) and name not in model.all_tied_weights_keys:
            problems.append(f"{name} {tuple(tensor.shape)} is missing")
            fused += [name] if _is_fused_expert(name, tensor) else []
    if fused:
        raise _fused_experts(skeleton, fused)
    if problems:
        more = f"; and {len(problems) - NUM_NAMED} more" if len(problems) > NUM_NAMED else ""
        raise InputError(
            skeleton.source.directory,
            f"its weights do not fit its architecture ({model.config.model_type}): "
            f"{'; '.join(problems[:NUM_NAMED])}{more}. The weights belong to another model, or "
            "the download is incomplete. Download the model again.",
        )


def _misfits(name: str, tensor: Tensor, stored: StoredTensor) -> list[str]:
    if stored.shape != tuple(tensor.shape):
        return [f"{name} has shape {stored.shape} and must have {tuple(tensor.shape)}"]
    if tensor.is_floating_point() and stored.dtype not in FLOATING:
        return [f"{name} is stored as {stored.dtype} and must be {', '.join(sorted(FLOATING))}"]
    return []


def _is_fused_expert(name: str, tensor: Tensor) -> bool:
    return tensor.ndim > 2 and "experts" in name.rpartition(".")[0]


def _fused_experts(skeleton: Skeleton, names: list[str]) -> InputError:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return InputError(
        skeleton.source.directory,
        f"its architecture ({skeleton.model.config.model_type}) fuses experts into one tensor, "
        f"and the checkpoint does not keep them so: {', '.join(names[:NUM_NAMED])}{more} missing. "
        "Mixture-of-experts models with fused experts are not supported yet. "
        "Give a model without experts.",
    )


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model was made to read at once; None where its configuration is silent."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def require_positions(
    model: PreTrainedModel, max_length: int, *, may_extrapolate: bool = True
) -> None:
    """Check that samples of ``max_length`` tokens fit the positions of the model.

    Rotary positions go on beyond those that the model was made for, which is logged as a warning.
    Learned ones are rows of a table: where it ends, the model cannot compute.

    Args:
        model: Any causal language model, with or without weights.
        max_length: Tokens of a sample or of a window.
        may_extrapolate: Accept lengths beyond the positions where the model can compute them.

    Raises:
        InputError: The samples are too long.
    """
    limit = max_positions(model)
    if limit is None or max_length <= limit:
        return
    if not may_extrapolate or _has_table_of(model, limit):
        raise InputError(
            model.config.name_or_path or type(model).__name__,
            f"max_length={max_length} is beyond the model's {limit} positions. "
            f"Use a max_length of at most {limit}.",
        )
    logger.warning(
        "max_length=%d is beyond the %d positions this model was made for", max_length, limit
    )


def _has_table_of(model: PreTrainedModel, num_positions: int) -> bool:
    """Whether the model looks up positions in an embedding."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and 0 <= module.num_embeddings - num_positions <= TABLE_OFFSET
        for module in model.modules()
    )


def require_known_tokens(model: PreTrainedModel, input_ids: Int[Tensor, "*shape"]) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        InputError: A number beyond the embedding: the tokenizer belongs to another model.
    """
    size, largest = model.get_input_embeddings().num_embeddings, int(input_ids.max())
    if largest >= size:
        raise InputError(
            model.config.name_or_path or type(model).__name__,
            f"its tokenizer gives token {largest}, but the model's embedding ends with token "
            f"{size - 1}. The tokenizer belongs to another model. Put the model's own there.",
        )
