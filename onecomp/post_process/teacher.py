"""What the teacher says of the training text, kept in files.

The teacher is never held: samples are carried through its blocks one after the other, and of
the last logits the most probable tokens are written to files, which are read when they are needed.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from onecomp.calibration.shards import MICRO_BATCH_TOKENS
from onecomp.errors import InputError
from onecomp.export.checkpoint import write_shard
from onecomp.models import ModelConfig, Skeleton
from onecomp.models.calls import (
    BlockCall,
    CallInterner,
    logits_behind,
    record_calls,
)
from onecomp.models.layout import blocks_return_tuples
from onecomp.models.skeleton import fill_outside
from onecomp.post_process.distillation import TeacherDistribution, TopTokens
from onecomp.resources import free_disk

logger = logging.getLogger(__name__)

KEPT_TOKENS = 256
"""Most probable tokens that are kept of a position."""
BYTES_PER_TOKEN = 6
"""Of a kept token: its number in four bytes, the logarithm of its probability in two."""
BYTES_OF_REST = 4
"""Of a position: the mass of all others."""


class Teacher(ABC):
    """Tells what the original model says of numbered samples."""

    @abstractmethod
    def distribution(self, samples: Sequence[int]) -> TeacherDistribution:
        """Of the samples, in their order, on the student's device."""


class CachedTeacher(Teacher):
    """Reads the most probable tokens of each sample from a file of its own.

    Args:
        directory: Written by :func:`cache_teacher`.
        device: The student's.
    """

    def __init__(self, directory: Path, device: torch.device):
        self.directory, self.device = directory, device

    def distribution(self, samples: Sequence[int]) -> TopTokens:
        """The kept tokens."""
        kept = [load_file(self.directory / answer_file(sample)) for sample in samples]
        return TopTokens(
            torch.stack([tensors["ids"] for tensors in kept]),
            torch.stack([tensors["log_probs"] for tensors in kept]),
            torch.stack([tensors["rest"] for tensors in kept]),
        ).to(self.device)


def answer_file(sample: int) -> str:
    """Name of the file with the teacher's answer to a sample."""
    return f"{sample:06d}.safetensors"


def unanswered(directory: Path, count: int, samples: Sequence[int] | None) -> list[int]:
    """Those of ``samples`` (None: of all ``count``) whose answers are not there yet."""
    wanted = range(count) if samples is None else samples
    return [number for number in wanted if not (directory / answer_file(number)).exists()]


def cache_is_smaller(model_config: ModelConfig, num_tokens: int) -> bool:
    """Whether files of kept tokens take less room than the teacher itself.

    A teacher whose answers are kept is asked once for all epochs and evaluations, which is always
    cheaper in time.
    """
    headers = model_config.source.headers()
    weights = sum(math.prod(stored.shape) for stored in headers.values())
    return cache_bytes(num_tokens) <= weights * model_config.torch_dtype.itemsize


def cache_bytes(num_tokens: int) -> int:
    """What the files of kept tokens take at most, without their headers."""
    return num_tokens * (KEPT_TOKENS * BYTES_PER_TOKEN + BYTES_OF_REST)


def require_room(
    process: str, answers: str, num_bytes: int, directory: Path, *, remedy: str
) -> None:
    """Check that a disk has room for the teacher's answers.

    Args:
        process: Name for the message.
        answers: What they are called, with the verb: ``the teacher's answers take``.
        num_bytes: Of the files.
        directory: Where they will be.
        remedy: What else helps than a larger disk.

    Raises:
        InputError: It has not.
    """
    free = free_disk(directory)
    logger.info("teacher: its answers take %.1f MB, %.1f MB are free", num_bytes / 1e6, free / 1e6)
    if num_bytes > free:
        raise InputError(
            process,
            f"{answers} {num_bytes / 1e9:.1f} GB, but {directory} has {free / 1e9:.1f} GB free. "
            f"Set TMPDIR to a larger disk, {remedy}.",
        )


def cache_teacher(
    model_config: ModelConfig,
    input_ids: Int[Tensor, "all length"],
    directory: Path,
    *,
    device: torch.device,
    temperature: float = 1.0,
    samples: Sequence[int] | None = None,
) -> CachedTeacher:
    """Carry samples through the original model block by block, and keep what it says of them.

    Samples whose file is there already are not asked about again.

    Args:
        model_config: The original model; one block of it is held at a time.
        input_ids: All samples, none of them padded.
        directory: Gets a file for each sample.
        device: Where blocks compute; hidden states wait on the CPU.
        temperature: Divides the logits.
        samples: Numbers of the samples to ask about; None for all.
    """
    missing = unanswered(directory, len(input_ids), samples)
    if not missing:
        return CachedTeacher(directory, device)
    size = max(1, MICRO_BATCH_TOKENS // input_ids.shape[1])
    batches = [missing[i : i + size] for i in range(0, len(missing), size)]
    rest = 0.0
    for batch, logits in zip(
        batches, teacher_logits(model_config, input_ids, batches, device), strict=True
    ):
        top = TopTokens.of(logits, KEPT_TOKENS, temperature)
        rest += float(top.rest.mean(-1).sum())
        for row, number in enumerate(batch):
            tensors = {
                "ids": top.ids[row], "log_probs": top.log_probs[row], "rest": top.rest[row],
            }  # fmt: skip
            write_shard(directory, answer_file(number), tensors)
    logger.info(
        "teacher: the %d most probable tokens of each position kept for %d samples; all others "
        "have %.2f %% of the mass", KEPT_TOKENS, len(missing), 100 * rest / len(missing),
    )  # fmt: skip
    return CachedTeacher(directory, device)


def teacher_logits(
    model_config: ModelConfig,
    input_ids: Int[Tensor, "all length"],
    batches: Sequence[Sequence[int]],
    device: torch.device,
) -> Iterator[Float[Tensor, "samples length vocabulary"]]:
    """Logits of the original model for batches of samples, one block in memory at a time."""
    skeleton = Skeleton.build(model_config.source, model_config.torch_dtype)
    returns_tuple = blocks_return_tuples(skeleton)
    fill_outside(skeleton, device)
    interner, hidden, calls = CallInterner(), [], []
    with torch.inference_mode():
        for batch in batches:
            ids = input_ids[list(batch)].to(device)
            states, of_blocks = record_calls(skeleton, ids, None, returns_tuple=returns_tuple)
            hidden.append(states.cpu())
            calls.append([interner.intern(call) for call in of_blocks])
        for index in range(len(skeleton.blocks)):
            calls_here = [of_blocks[index] for of_blocks in calls]
            _advance(skeleton.load_block(index, device), hidden, calls_here, device)
    for batch, states in zip(batches, hidden, strict=True):
        ids = input_ids[list(batch)].to(device)
        with torch.inference_mode():
            yield logits_behind(skeleton, states.to(device), ids, None, returns_tuple=returns_tuple)


def _advance(
    block: torch.nn.Module, hidden: list[Tensor], calls: list[BlockCall], device: torch.device
) -> None:
    for number, call in enumerate(calls):
        hidden[number] = call.run(block, hidden[number].to(device)).cpu()
