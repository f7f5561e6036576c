"""What the teacher says of samples of different lengths: asked when needed, or kept in files.

Kept, each sample has a safetensors file of its own, which is read when a batch needs it; the
teacher is held while the files are written, one sample at a time, and no longer.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from onecomp.export.checkpoint import write_shard
from onecomp.models import ModelConfig
from onecomp.post_process.distillation import TeacherDistribution, TopTokens, WholeDistribution
from onecomp.post_process.lora.outputs import Outputs, blocks_of, outputs_of
from onecomp.post_process.lora.tokens import Batch, TokenFile
from onecomp.post_process.teacher import BYTES_OF_REST, KEPT_TOKENS, answer_file, unanswered

logger = logging.getLogger(__name__)

KL, MSE = "kl", "mse"
ID_BYTES = 4
"""Of the number of a kept token."""


@dataclass(frozen=True)
class Question:
    """What the teacher is asked about every sample."""

    loss_type: str | None = None
    """``KL`` or ``MSE``: which loss its logits are for; None where they are not wanted."""
    blocks: tuple[int, ...] = ()
    """Blocks whose hidden states are wanted."""

    def __bool__(self) -> bool:
        return self.loss_type is not None or bool(self.blocks)


@dataclass(frozen=True)
class Kept:
    """How answers are kept."""

    logits_dtype: torch.dtype = torch.float16
    hidden_dtype: torch.dtype = torch.float16
    temperature: float = 1.0
    """At which probabilities of tokens are kept."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What the teacher says of a batch, in the order of its targets and tokens."""

    distribution: TeacherDistribution | None = None
    """Of the targets, as one sample."""
    hidden: Mapping[int, Float[Tensor, "tokens hidden"]] = field(default_factory=dict)


class Answers(ABC):
    """Tells what the teacher says of samples."""

    @abstractmethod
    def of(self, numbers: Sequence[int], batch: Batch) -> Answer:
        """Of a batch, on the batch's device.

        Args:
            numbers: The samples of the batch.
            batch: Their tokens.
        """


class LiveAnswers(Answers):
    """Holds the teacher and asks it.

    Args:
        model_config: The teacher; loaded whole.
        question: What is asked.
    """

    def __init__(self, model_config: ModelConfig, question: Question):
        self.device = model_config.get_device()
        self.model = model_config.load_model(device_map="cpu").to(self.device)
        self.model.requires_grad_(requires_grad=False)
        self.blocks = blocks_of(self.model, model_config)
        self.question = question

    def of(self, numbers: Sequence[int], batch: Batch) -> Answer:
        """Everything that is asked, from one forward pass."""
        del numbers
        home = batch.input_ids.device
        said = self.outputs(batch)
        whole = WholeDistribution(said.predictions.unsqueeze(0).to(home))
        return Answer(
            whole if self.question.loss_type else None,
            {index: states.to(home) for index, states in said.hidden.items()},
        )

    def outputs(self, batch: Batch) -> Outputs:
        """The teacher's outputs, on its own device."""
        with torch.no_grad():
            return outputs_of(self.model, self.blocks, batch.to(self.device), self.question.blocks)


class KeptAnswers(Answers):
    """Reads each sample's answer from its file.

    Args:
        directory: Written by :func:`keep_answers`.
        question: What was asked.
    """

    def __init__(self, directory: Path, question: Question):
        self.directory, self.question = directory, question

    def of(self, numbers: Sequence[int], batch: Batch) -> Answer:
        """The samples' files, one behind the other."""
        device = batch.input_ids.device
        files = [load_file(self.directory / answer_file(number)) for number in numbers]
        joined = {key: torch.cat([file[key] for file in files]).to(device) for key in files[0]}
        hidden = {index: joined[_block_key(index)] for index in self.question.blocks}
        if self.question.loss_type == KL:
            top = (joined[key].unsqueeze(0) for key in ("ids", "log_probs", "rest"))
            return Answer(TopTokens(*top), hidden)
        if self.question.loss_type == MSE:
            return Answer(WholeDistribution(joined["logits"].unsqueeze(0)), hidden)
        return Answer(None, hidden)


class BothAnswers(Answers):
    """Joins what is kept and what is asked again.

    Args:
        kept: Read from files.
        live: Asked in every step.
    """

    def __init__(self, kept: KeptAnswers, live: LiveAnswers):
        self.kept, self.live = kept, live

    def of(self, numbers: Sequence[int], batch: Batch) -> Answer:
        """Both parts."""
        kept, live = self.kept.of(numbers, batch), self.live.of(numbers, batch)
        return Answer(kept.distribution or live.distribution, {**kept.hidden, **live.hidden})


def keep_answers(
    model_config: ModelConfig,
    question: Question,
    kept: Kept,
    tokens: TokenFile,
    directory: Path,
    samples: Sequence[int] | None = None,
) -> KeptAnswers:
    """Ask the teacher about samples and write what it says; files that are there are kept.

    Args:
        model_config: The teacher; held until this returns.
        question: What is asked.
        kept: How answers are kept.
        tokens: All samples.
        directory: Gets a file for each sample.
        samples: Numbers of the samples to ask about; None for all.
    """
    missing = unanswered(directory, len(tokens), samples)
    if not missing:
        return KeptAnswers(directory, question)
    teacher = LiveAnswers(model_config, question)
    written = 0
    for number in missing:
        said = teacher.outputs(tokens.batch([number]))
        tensors = _kept_tensors(said, question, kept)
        write_shard(directory, answer_file(number), tensors)
        written += sum(tensor.nbytes for tensor in tensors.values())
    logger.info(
        "teacher: answers to %d samples kept, %.1f MB in %s", len(missing), written / 1e6, directory
    )
    return KeptAnswers(directory, question)


def _kept_tensors(said: Outputs, question: Question, kept: Kept) -> dict[str, Tensor]:
    tensors = {
        _block_key(index): states.to(kept.hidden_dtype) for index, states in said.hidden.items()
    }
    if question.loss_type == KL:
        logits, dtype = said.predictions.unsqueeze(0), kept.logits_dtype
        top = TopTokens.of(logits, KEPT_TOKENS, kept.temperature, dtype=dtype)
        tensors |= {"ids": top.ids[0], "log_probs": top.log_probs[0], "rest": top.rest[0]}
    elif question.loss_type == MSE:
        tensors["logits"] = said.predictions.to(kept.logits_dtype)
    return tensors


def kept_bytes(
    question: Question, kept: Kept, lengths: Sequence[int], vocabulary: int, hidden_size: int
) -> int:
    """What the files of answers to samples take.

    Args:
        question: What is asked.
        kept: How it is kept.
        lengths: Tokens of each sample.
        vocabulary: Tokens that logits are of.
        hidden_size: Width of hidden states.
    """
    of_target = 0
    if question.loss_type == KL:
        of_entry = ID_BYTES + kept.logits_dtype.itemsize
        of_target = min(KEPT_TOKENS, vocabulary) * of_entry + BYTES_OF_REST
    elif question.loss_type == MSE:
        of_target = vocabulary * kept.logits_dtype.itemsize
    of_token = len(question.blocks) * hidden_size * kept.hidden_dtype.itemsize
    return sum((length - 1) * of_target + length * of_token for length in lengths)


def split_question(
    question: Question, *, keeps_logits: bool, keeps_hidden: bool
) -> tuple[Question, Question]:
    """What is kept in files, and what is asked in every step."""
    kept = Question(
        question.loss_type if keeps_logits else None, question.blocks if keeps_hidden else ()
    )
    live = Question(
        None if keeps_logits else question.loss_type, () if keeps_hidden else question.blocks
    )
    return kept, live


def _block_key(index: int) -> str:
    return f"block.{index}"
