"""Calibration text sampled from the model itself, for where no text can be had."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecomp.calibration.samples import CalibrationSamples
from onecomp.errors import InputError
from onecomp.models.checks import require_positions

SAMPLES_PER_BATCH = 16
GREEDY_TOKENS = 3
"""Tokens after the random first one that are the model's best guess: they make it a start."""


def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    length: int,
    seed: int,
) -> CalibrationSamples:
    """Text that the model writes itself, as calibration samples.

    Each sample starts with the tokenizer's BOS token, if it has one, and a random token of the
    vocabulary; three greedy tokens follow, then tokens drawn at temperature 1, up to exactly
    ``length``. Special tokens, the end of text among them, are never drawn, so no sample ends
    early. Follows LLM-QAT (arXiv:2305.17888), section 2.1. The same seed gives the same samples
    on the same kind of device; the global random state is neither read nor changed.

    Args:
        model: Causal language model, on the device to sample on. Its mode is restored.
        tokenizer: Tokenizer of the model.
        num_samples: Rows.
        length: Tokens per row; at most what the model's positions allow.
        seed: Seed of our generator.

    Raises:
        InputError: ``length`` is beyond the model's positions, or its logits are not finite.
    """
    require_positions(model, length, may_extrapolate=False)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with _evaluation_mode(model), torch.inference_mode():
        rows = [
            _sample_batch(
                model, tokenizer, (min(SAMPLES_PER_BATCH, num_samples - done), length), generator
            )
            for done in range(0, num_samples, SAMPLES_PER_BATCH)
        ]
    input_ids = torch.cat(rows).cpu()
    return CalibrationSamples(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shape: tuple[int, int],
    generator: torch.Generator,
) -> Int64[Tensor, "samples length"]:
    num_samples, length = shape
    allowed = _ordinary_tokens(model, tokenizer)
    tokens = _first_tokens(tokenizer, allowed, num_samples, generator)[:, :length]
    num_first, fresh, cache = tokens.shape[1], tokens, None
    while tokens.shape[1] < length:
        output = model(input_ids=fresh, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        _check_finite(logits, model, tokens.shape[1])
        logits = logits.masked_fill(~allowed, -torch.inf)
        if tokens.shape[1] < num_first + GREEDY_TOKENS:
            fresh = logits.argmax(-1, keepdim=True)
        else:
            fresh = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, fresh], dim=1)
    return tokens


def _ordinary_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Bool[Tensor, " vocabulary"]:
    """True for ids that the tokenizer knows and that are not special."""
    size = model.get_input_embeddings().num_embeddings
    allowed = torch.arange(size) < len(tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index in added if added[index].special)}
    allowed[[index for index in special if index < size]] = False
    return allowed.to(model.device)


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase,
    allowed: Bool[Tensor, " vocabulary"],
    num_samples: int,
    generator: torch.Generator,
) -> Int64[Tensor, "samples first"]:
    ids = allowed.nonzero().flatten()
    picks = torch.randint(len(ids), (num_samples, 1), generator=generator, device=ids.device)
    first = ids[picks]
    if tokenizer.bos_token_id is None:
        return first
    return torch.cat([torch.full_like(first, tokenizer.bos_token_id), first], dim=1)


def _check_finite(
    logits: Float[Tensor, "samples vocabulary"], model: PreTrainedModel, position: int
) -> None:
    if not logits.isfinite().all():
        raise InputError(
            model.config.name_or_path or type(model).__name__,
            f"the logits after {position} sampled tokens are not finite in {model.dtype}. "
            "Load the model in bfloat16 or float32, or calibrate on a text file.",
        )
