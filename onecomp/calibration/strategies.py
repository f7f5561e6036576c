"""From documents to calibration samples: five ways to cut text into equal windows."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from onecomp.calibration.config import C4, WIKITEXT2, CalibrationConfig
from onecomp.calibration.samples import CalibrationSamples
from onecomp.errors import InputError

logger = logging.getLogger(__name__)

DOCUMENTS_PER_CALL = 128
CANDIDATES_PER_SAMPLE = 4
"""drop_rand chooses its samples among this many times as many long documents."""
CHARACTERS_PER_TOKEN = 5
"""Generous for prose, so that one portion of text usually holds the tokens wanted."""
SEPARATOR = "\n\n"


def make_samples(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, config: CalibrationConfig
) -> CalibrationSamples:
    """Cut documents into samples of ``config.max_length`` tokens; every token is tokenised once.

    With L = ``max_length``, N = ``num_calibration_samples`` and T tokens of joined text:

    - ``drop_head``: the first L tokens of the first N documents of at least L tokens.
    - ``drop_rand``: a random window of each of N documents, drawn by the seed among the first
      4 N documents of at least L tokens.
    - ``concat_chunk``: the documents joined by blank lines (of C4 the first N), cut into
      consecutive chunks; the first min(N, floor(T / L)) of them.
    - ``concat_chunk_align``: the same, reading as many documents as N chunks need.
    - ``concat_rand``: N windows at random places of the joined text; they may overlap.

    Where fewer than N documents are long enough, ``drop_head`` continues as ``concat_chunk``
    and ``drop_rand`` as ``concat_rand`` on the tokenised documents, end to end, with a warning.
    WikiText-2 has hardly any long row, so there ``drop_*`` means ``concat_rand``. Special tokens
    are added as the tokenizer does by default: to each document of ``drop_*``, once to a
    joined text. Random numbers come from a generator of our own, seeded with ``config.seed``.

    Args:
        texts: Documents in dataset order; read only as far as needed.
        tokenizer: Tokenizer of the model.
        config: Strategy and sizes.

    Raises:
        InputError: The text is shorter than one sample, or too short for the strategy.
    """
    strategy = _effective_strategy(config)
    if strategy.startswith("drop"):
        windows = _document_windows(texts, tokenizer, config, is_random=strategy == "drop_rand")
    elif strategy == "concat_rand":
        enough = _wanted_tokens(config) if config.dataset_name == C4 else None
        windows = _random_windows(_joined_tokens(texts, tokenizer, enough), config)
    else:
        if strategy == "concat_chunk" and config.dataset_name == C4:
            texts = islice(texts, config.num_calibration_samples)
        windows = _chunks(_joined_tokens(texts, tokenizer, _wanted_tokens(config)), config)
    return CalibrationSamples(input_ids=windows, attention_mask=torch.ones_like(windows))


def _effective_strategy(config: CalibrationConfig) -> str:
    if config.dataset_name == WIKITEXT2 and config.strategy.startswith("drop"):
        logger.warning(
            "strategy=%s needs long documents, which wikitext2 does not have: using concat_rand",
            config.strategy,
        )
        return "concat_rand"
    return config.strategy


def _wanted_tokens(config: CalibrationConfig) -> int:
    return config.num_calibration_samples * config.max_length


@dataclass(frozen=True, kw_only=True)
class _Documents:
    """What reading the documents once leaves behind."""

    candidates: list[Tensor]
    """One window of each long document."""
    spare: list[Tensor]
    """Whole documents, no more than are needed to join them instead."""
    num_documents: int
    num_tokens: int


def _document_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    config: CalibrationConfig,
    *,
    is_random: bool,
) -> Int64[Tensor, "samples length"]:
    """One window of each of N long documents; the joined documents where there are fewer."""
    generator = torch.Generator().manual_seed(config.seed)
    documents = _read_documents(
        _tokenised_documents(texts, tokenizer), config, generator if is_random else None
    )
    wanted = config.num_calibration_samples
    if len(documents.candidates) < wanted:
        return _join_instead(documents, config, is_random=is_random)
    if not is_random:
        return torch.stack(documents.candidates)
    chosen = torch.randperm(len(documents.candidates), generator=generator)[:wanted]
    return torch.stack([documents.candidates[index] for index in chosen.tolist()])


def _read_documents(
    tokenised: Iterable[Tensor], config: CalibrationConfig, generator: torch.Generator | None
) -> _Documents:
    """Read until there are candidates enough; a generator asks for more of them, at random."""
    length = config.max_length
    num_candidates = config.num_calibration_samples * (CANDIDATES_PER_SAMPLE if generator else 1)
    candidates: list[Tensor] = []
    spare: list[Tensor] = []
    num_documents = num_tokens = 0
    for tokens in tokenised:
        if num_tokens < _wanted_tokens(config):
            spare.append(tokens)
        num_documents += 1
        num_tokens += len(tokens)
        if len(tokens) >= length:
            start = _random_start(len(tokens), length, generator) if generator else 0
            candidates.append(tokens[start : start + length].clone())
        if len(candidates) == num_candidates:
            break
    return _Documents(
        candidates=candidates, spare=spare, num_documents=num_documents, num_tokens=num_tokens
    )


def _join_instead(
    documents: _Documents, config: CalibrationConfig, *, is_random: bool
) -> Int64[Tensor, "samples length"]:
    _check_enough_to_join(documents.num_tokens, config)
    logger.warning(
        "%d of %d documents have max_length=%d tokens, fewer than num_calibration_samples=%d: "
        "the documents are joined, as strategy=%s does",
        len(documents.candidates),
        documents.num_documents,
        config.max_length,
        config.num_calibration_samples,
        "concat_rand" if is_random else "concat_chunk",
    )
    joined = torch.cat(documents.spare)
    return _random_windows(joined, config) if is_random else _chunks(joined, config)


def _tokenised_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Int64[Tensor, " tokens"]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, DOCUMENTS_PER_CALL)):
        # verbose=False: documents longer than the model's limit are expected here, they get cut.
        for ids in tokenizer(batch, verbose=False, return_attention_mask=False)["input_ids"]:
            yield torch.tensor(ids, dtype=torch.int64)


def _joined_tokens(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, enough: int | None
) -> Int64[Tensor, " tokens"]:
    """Tokens of the documents joined by blank lines.

    Args:
        texts: Documents.
        tokenizer: Tokenizer of the model.
        enough: Stop reading once there are this many tokens; None reads all documents.
    """
    pieces: list[Tensor] = []
    for portion in _portions(texts, None if enough is None else enough * CHARACTERS_PER_TOKEN):
        is_first = not pieces
        text = portion if is_first else SEPARATOR + portion
        ids = tokenizer(text, add_special_tokens=is_first, verbose=False)["input_ids"]
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        if enough is not None and sum(map(len, pieces)) >= enough:
            break
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _portions(texts: Iterable[str], num_characters: int | None) -> Iterator[str]:
    """Joined documents of at least ``num_characters`` (the last may be shorter); None: all."""
    documents: list[str] = []
    size = 0
    for text in texts:
        documents.append(text.strip())
        size += len(documents[-1])
        if num_characters is not None and size >= num_characters:
            yield SEPARATOR.join(documents)
            documents, size = [], 0
    if documents:
        yield SEPARATOR.join(documents)


def _random_start(num_tokens: int, length: int, generator: torch.Generator) -> int:
    return int(torch.randint(num_tokens - length + 1, (1,), generator=generator))


def _random_windows(
    tokens: Int64[Tensor, " tokens"], config: CalibrationConfig
) -> Int64[Tensor, "samples length"]:
    _check_one_sample(len(tokens), config)
    generator = torch.Generator().manual_seed(config.seed)
    places = (config.num_calibration_samples, 1)
    starts = torch.randint(len(tokens) - config.max_length + 1, places, generator=generator)
    return tokens[starts + torch.arange(config.max_length)]


def _chunks(
    tokens: Int64[Tensor, " tokens"], config: CalibrationConfig
) -> Int64[Tensor, "samples length"]:
    _check_one_sample(len(tokens), config)
    length, wanted = config.max_length, config.num_calibration_samples
    num_chunks = min(wanted, len(tokens) // length)
    if num_chunks < wanted:
        logger.warning(
            "the text yields %d samples of max_length=%d tokens; num_calibration_samples=%d",
            num_chunks,
            length,
            wanted,
        )
    return tokens[: num_chunks * length].reshape(num_chunks, length).clone()


def _check_one_sample(num_tokens: int, config: CalibrationConfig) -> None:
    if num_tokens < config.max_length:
        raise InputError(
            config.dataset_name,
            f"the text has {num_tokens} tokens, fewer than one sample of "
            f"max_length={config.max_length}. Use a max_length of at most {num_tokens}, "
            "or more text.",
        )


def _check_enough_to_join(num_tokens: int, config: CalibrationConfig) -> None:
    _check_one_sample(num_tokens, config)
    num_samples = num_tokens // config.max_length
    if num_samples < config.num_calibration_samples:
        raise InputError(
            config.dataset_name,
            f"the text has {num_tokens} tokens and yields {num_samples} samples of "
            f"max_length={config.max_length}, fewer than "
            f"num_calibration_samples={config.num_calibration_samples}. Use at most "
            f"{num_samples} samples, a smaller max_length, or more text.",
        )
