"""Who teaches, what is asked of the teacher, and which of its answers are kept in files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from onecomp.errors import ConfigError
from onecomp.models import ModelConfig
from onecomp.post_process.lora.answers import (
    Answers,
    BothAnswers,
    Kept,
    LiveAnswers,
    Question,
    keep_answers,
    kept_bytes,
    split_question,
)
from onecomp.post_process.lora.outputs import blocks_of
from onecomp.post_process.lora.tokens import TokenFile
from onecomp.post_process.teacher import require_room


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What a process wants of its teacher."""

    process: str
    """Name for messages."""
    teacher: ModelConfig
    """Its device may be ``auto``, which each process settles for itself."""
    float32_on_cpu: bool
    """Whether it computes in float32 where its device is a CPU."""
    question: Question
    keeps_logits: bool
    keeps_hidden: bool
    kept: Kept

    def check(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Check that the teacher can teach a model, before any work.

        Raises:
            ConfigError: Vocabularies, widths or numbers of blocks do not fit.
        """
        if not self.question:
            return
        student, teacher = text_config(model.config), text_config(self.teacher.load_config())
        problems = []
        if self.question.loss_type and student.vocab_size != teacher.vocab_size:
            problems.append(
                f"the teacher's vocabulary has {teacher.vocab_size} tokens, the model's "
                f"{student.vocab_size}. Use a teacher with the same tokenizer."
            )
        if self.question.blocks:
            num_blocks = len(blocks_of(model, model_config))
            problems += _block_problems(self.question.blocks, num_blocks, student, teacher)
        if problems:
            raise ConfigError(self.process, problems)

    def check_room(self, tokens: TokenFile, directory: Path) -> None:
        """Check that what is kept fits the disk.

        Raises:
            InputError: It does not.
        """
        kept, _ = self._parts()
        if kept:
            config = text_config(self.teacher.load_config())
            sizes = (config.vocab_size, config.hidden_size)
            require_room(
                self.process,
                "the teacher's answers would take",
                kept_bytes(kept, self.kept, tokens.lengths, *sizes),
                directory,
                remedy="use fewer samples or blocks, or set cache_teacher_outputs and "
                "cache_intermediate_outputs to False",
            )

    def answers(
        self, tokens: TokenFile, directory: Path, samples: Sequence[int] | None = None
    ) -> Answers | None:
        """The teacher's answers in the form that is wanted; None where nothing is asked.

        Args:
            tokens: All samples.
            directory: For what is kept.
            samples: Numbers of the samples whose answers are written here; None for all.
        """
        kept, live = self._parts()
        if not kept:
            return LiveAnswers(self.teacher_here(), live) if live else None
        read = keep_answers(self.teacher_here(), kept, self.kept, tokens, directory, samples)
        return BothAnswers(read, LiveAnswers(self.teacher_here(), live)) if live else read

    def teacher_here(self) -> ModelConfig:
        """The teacher in the precision for the device that it has in this process."""
        if self.float32_on_cpu and self.teacher.get_device().type == "cpu":
            return replace(self.teacher, dtype="float32")
        return self.teacher

    def _parts(self) -> tuple[Question, Question]:
        return split_question(
            self.question, keeps_logits=self.keeps_logits, keeps_hidden=self.keeps_hidden
        )


def _block_problems(
    blocks: Sequence[int], num_blocks: int, student: PretrainedConfig, teacher: PretrainedConfig
) -> list[str]:
    problems = []
    if outside := [index for index in blocks if index >= num_blocks]:
        problems.append(
            f"intermediate_block_indices has {', '.join(map(str, outside))}, but the model has "
            f"{num_blocks} blocks, numbered from 0."
        )
    sizes = [(c.num_hidden_layers, c.hidden_size) for c in (student, teacher)]
    if sizes[0] != sizes[1]:
        problems.append(
            "hidden states can be compared only with a teacher of the same shape: the model has "
            f"{sizes[0][0]} blocks of width {sizes[0][1]}, the teacher {sizes[1][0]} of width "
            f"{sizes[1][1]}. Set intermediate_block_loss_weight to 0."
        )
    return problems


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the language model."""
    return config.get_text_config(decoder=True)


def teacher_config(
    original: ModelConfig,
    *,
    model_id: str | None,
    path: str | None,
    dtype: str | None,
    device: str | None,
) -> ModelConfig:
    """The teacher: the original model, unless another is named.

    Args:
        original: The model before it was quantized.
        model_id: Another one on the Hub.
        path: Another one in a directory.
        dtype: Its precision; None for the original's.
        device: Where it computes; None for the original's.
    """
    place, precision = device or original.device, dtype or original.dtype
    if model_id is None and path is None:
        return replace(original, dtype=precision, device=place)
    return ModelConfig(
        model_id, path, precision, place, trust_remote_code=original.trust_remote_code
    )
