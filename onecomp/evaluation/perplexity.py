"""Perplexity over sliding windows, in batches whose memory follows from the configuration."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from onecomp.errors import ConfigError
from onecomp.evaluation.texts import load_texts, tokenize_texts
from onecomp.models import ModelConfig, max_positions, require_known_tokens, require_positions

logger = logging.getLogger(__name__)

LOSS_SLICE_TOKENS = 256
"""Rows of logits that are held in float32 at a time: 131 MB at a vocabulary of 128,000."""


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Perplexity of one model on one text."""

    perplexity: float
    num_tokens: int
    """Predictions in the mean: the sum of the windows' weights."""
    num_windows: int
    max_length: int
    stride: int
    bos: bool
    """Whether the text starts with the model's beginning-of-sequence token."""
    mean_nll: float
    """Mean negative log-likelihood per prediction, in nats."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens ``begin`` to ``end`` of a text, of which the last ``num_new`` are new."""

    begin: int
    end: int
    num_new: int
    """Tokens that no earlier window held; the others are context."""

    @property
    def length(self) -> int:
        """Tokens in the window."""
        return self.end - self.begin

    @property
    def num_scored(self) -> int:
        """Next-token predictions in the window's loss: nothing predicts a window's first token."""
        return min(self.num_new, self.length - 1)

    @property
    def weight(self) -> int:
        """Weight of the window's mean loss in the total: new tokens less one.

        Without overlap this is ``num_scored``. With overlap it is one less; published perplexities
        with overlapping windows, and the guide of Transformers, are computed that way.
        """
        return self.num_new - 1


def sliding_windows(num_tokens: int, *, max_length: int, stride: int) -> list[Window]:
    """Windows that start at 0, ``stride``, 2 ``stride``, ... and end with the text.

    Args:
        num_tokens: Tokens of the text, at least 2.
        max_length: Tokens of a window, at least 2; the last window may be shorter.
        stride: Tokens between starts, 1 to ``max_length``.

    Raises:
        ConfigError: A setting out of range.
    """
    problems = []
    if num_tokens < 2:
        problems.append(
            f"num_tokens={num_tokens}: a prediction needs at least 2. Use a longer text."
        )
    if max_length < 2:
        problems.append(f"max_length={max_length}: must be at least 2.")
    elif not 1 <= stride <= max_length:
        problems.append(
            f"stride={stride}: must be between 1 and max_length={max_length}, "
            "or tokens between windows would be left out."
        )
    if problems:
        raise ConfigError("perplexity", problems)
    windows, covered = [], 0
    while covered < num_tokens:
        begin = len(windows) * stride
        end = min(begin + max_length, num_tokens)
        windows.append(Window(begin=begin, end=end, num_new=end - covered))
        covered = end
    return windows


def perplexity_of_tokens(
    model: nn.Module,
    input_ids: Int[Tensor, "tokens"],
    *,
    max_length: int = 2048,
    stride: int = 2048,
    batch_tokens: int = 4096,
) -> PerplexityResult:
    """Perplexity of a causal language model on one tokenized text.

    ``exp(sum(weight * loss) / sum(weight))`` over :func:`sliding_windows`, in float64, where a
    window's loss is the mean over its scored predictions. Windows of equal length are computed
    together. The logits of one batch are held in the model's dtype, ``LOSS_SLICE_TOKENS`` rows of
    them in float32.

    Args:
        model: Hugging Face causal language model, on any device; its mode is left as it was.
        input_ids: The text as the tokenizer gives it, on any device.
        max_length: Tokens of a window.
        stride: Tokens between the starts of windows.
        batch_tokens: Tokens of a batch; a batch has at least one window.

    Returns:
        A perplexity that is not finite (``inf``, ``nan``) is returned, with a warning in the log.

    Raises:
        ConfigError: Fewer than two tokens, or a setting out of range.
        InputError: Tokens that the model does not know, or a window that is longer than it can
            compute.
    """
    windows = sliding_windows(len(input_ids), max_length=max_length, stride=stride)
    require_known_tokens(cast(PreTrainedModel, model), input_ids)
    require_positions(cast(PreTrainedModel, model), windows[0].length)
    num_tokens = sum(window.weight for window in windows)
    total = 0.0
    with torch.no_grad(), _evaluation_mode(model):
        for batch in _equal_length_batches(windows, batch_tokens):
            losses = _window_losses(model, input_ids, batch)
            total += math.fsum(w.weight * loss for w, loss in zip(batch, losses, strict=True))
    mean_nll = total / num_tokens
    if not math.isfinite(mean_nll):
        logger.warning("the mean negative log-likelihood of %d tokens is %s", num_tokens, mean_nll)
    return PerplexityResult(
        perplexity=_exp(mean_nll),
        num_tokens=num_tokens,
        num_windows=len(windows),
        max_length=max_length,
        stride=stride,
        bos=int(input_ids[0]) == getattr(_config(model), "bos_token_id", None),
        mean_nll=mean_nll,
    )


def calculate_perplexity(  # noqa: PLR0913 - the documented signature
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_config: ModelConfig | None = None,
    dataset_name: str = "Salesforce/wikitext",
    dataset_config: str | None = "wikitext-2-raw-v1",
    split: str = "test",
    max_samples: int | None = None,
    max_length: int | None = 2048,
    stride: int | None = 2048,
) -> float:
    """Perplexity on a dataset whose rows are joined by blank lines and tokenized in one call.

    Args:
        model: Causal language model; None loads the one of ``model_config``.
        tokenizer: Its tokenizer; None loads the one of ``model_config``.
        model_config: Where model and tokenizer come from if they are not given.
        dataset_name: Hub dataset, local file, or ``wikitext2`` or ``c4``.
        dataset_config: The dataset's configuration; for ``allenai/c4`` the file to read.
        split: Split of the dataset.
        max_samples: Rows to read; None reads all.
        max_length: Tokens of a window; None means the model's ``max_position_embeddings``.
        stride: Tokens between the starts of windows; None means ``max_length``.

    Raises:
        ConfigError: Neither a model nor a ``model_config``, or a setting out of range.
        InputError: The text is missing, cannot be had, or is too short.

    Example:
        >>> calculate_perplexity(model, tokenizer, dataset_name="valid.txt")  # doctest: +SKIP
        12.34
    """
    texts = load_texts(dataset_name, dataset_config, split=split, max_samples=max_samples)
    if tokenizer is None:
        tokenizer = _require(model_config, "tokenizer").load_tokenizer()
    input_ids = tokenize_texts(tokenizer, texts, source=dataset_name)
    if model is None:
        model = _require(model_config, "model").load_model()
    max_length = _window_length(model, max_length)
    result = perplexity_of_tokens(
        model,
        input_ids,
        max_length=max_length,
        stride=max_length if stride is None else stride,
    )
    return result.perplexity


def _require(model_config: ModelConfig | None, missing: str) -> ModelConfig:
    if model_config is None:
        raise ConfigError(
            "calculate_perplexity",
            [f"{missing} is None and there is no model_config. Give one of them."],
        )
    return model_config


def _window_length(model: nn.Module, max_length: int | None) -> int:
    """``max_length``, or the positions of the model."""
    if max_length is None:
        max_length = max_positions(cast(PreTrainedModel, model))
    if max_length is None:
        raise ConfigError(
            "calculate_perplexity",
            ["max_length=None, but the model names no max_position_embeddings. Give max_length."],
        )
    return max_length


def _config(model: nn.Module) -> PretrainedConfig:
    """The configuration of the language model, also inside a model for images and text."""
    return cast(PreTrainedModel, model).config.get_text_config()


def _equal_length_batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Consecutive windows of equal length that count, ``batch_tokens`` tokens at a time."""
    counted = [window for window in windows if window.weight > 0]
    for length, group in groupby(counted, key=lambda window: window.length):
        members = list(group)
        size = max(1, batch_tokens // length)
        for begin in range(0, len(members), size):
            yield members[begin : begin + size]


def _window_losses(
    model: nn.Module, input_ids: Int[Tensor, "tokens"], batch: list[Window]
) -> list[float]:
    stacked = torch.stack([input_ids[window.begin : window.end] for window in batch])
    stacked = stacked.to(next(model.parameters()).device)
    logits = model(input_ids=stacked, use_cache=False).logits
    return [
        _mean_loss(logits[row], stacked[row].to(logits.device), window.num_scored)
        for row, window in enumerate(batch)
    ]


def _mean_loss(
    logits: Float[Tensor, "length vocab"], input_ids: Int[Tensor, "length"], num_scored: int
) -> float:
    """Mean negative log-likelihood of the last ``num_scored`` tokens, computed slice by slice."""
    length, total = len(input_ids), 0.0
    for begin in range(length - num_scored, length, LOSS_SLICE_TOKENS):
        end = min(begin + LOSS_SLICE_TOKENS, length)
        rows = logits[begin - 1 : end - 1].float()
        losses = functional.cross_entropy(rows, input_ids[begin:end], reduction="none")
        total += losses.cpu().double().sum().item()  # not every device has float64
    return total / num_scored


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _exp(exponent: float) -> float:
    """``math.exp`` that overflows to infinity."""
    return torch.tensor(exponent, dtype=torch.float64).exp().item()
