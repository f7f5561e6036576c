"""What the settings of a LoRA process may be."""

from collections.abc import Mapping
from typing import Any

from onecomp.models.config import DTYPES
from onecomp.post_process.lora.answers import KL, MSE
from onecomp.quantizer.checks import as_number, is_whole, positive_problems, whole_problems

COUNTS = ("epochs", "batch_size", "gradient_accumulation_steps", "lora_r")
WEIGHTS = ("sft_loss_weight", "teacher_loss_weight", "intermediate_block_loss_weight")
POSITIVE = ("lr", "lora_alpha", "teacher_temperature", "max_grad_norm")
TYPES = ("teacher_dtype", "teacher_cache_dtype", "intermediate_cache_dtype")


def problems_of(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings of a LoRA process, one sentence each.

    Args:
        settings: The fields of :class:`PostProcessLoraSFT` by name.
    """

    def chosen(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: settings[name] for name in names}

    def given(name: str) -> dict[str, Any]:
        return {} if settings[name] is None else chosen((name,))

    return [
        *_text_problems(settings),
        *whole_problems(chosen(("max_length",)), 2),
        *whole_problems(chosen((*COUNTS, "logging_steps")), 1),
        *whole_problems(given("max_train_samples"), 1),
        *whole_problems(given("num_workers"), 0),
        *positive_problems(chosen(POSITIVE)),
        *_range_problems(settings),
        *_weight_problems(chosen(WEIGHTS)),
        *_teacher_problems(settings),
    ]


def _text_problems(settings: Mapping[str, Any]) -> list[str]:
    if not settings["dataset_name"] and not settings["data_files"]:
        return ["neither dataset_name nor data_files is given: there is no text. Give one of them."]
    return []


def _range_problems(settings: Mapping[str, Any]) -> list[str]:
    problems = []
    if not 0 <= as_number(settings["lora_dropout"]) < 1:
        problems.append(
            f"lora_dropout={settings['lora_dropout']!r}: must be 0 or more, and below 1."
        )
    if not 0 <= as_number(settings["warmup_ratio"]) <= 1:
        problems.append(f"warmup_ratio={settings['warmup_ratio']!r}: must be from 0 to 1.")
    if not 0 < as_number(settings["held_out_ratio"]) < 1:
        problems.append(
            f"held_out_ratio={settings['held_out_ratio']!r}: must be above 0 and below 1."
        )
    if not as_number(settings["weight_decay"]) >= 0:
        problems.append(f"weight_decay={settings['weight_decay']!r}: must be 0 or more.")
    if settings["target_modules"] is not None and not settings["target_modules"]:
        problems.append("target_modules is empty: no layer would be trained. Name some, or None.")
    return problems


def _weight_problems(weights: Mapping[str, Any]) -> list[str]:
    if negative := [name for name, value in weights.items() if not as_number(value) >= 0]:
        return [f"{name}={weights[name]!r}: must be 0 or more." for name in negative]
    if not any(weights.values()):
        return [f"{', '.join(weights)} are all 0: nothing would be trained. Raise one of them."]
    return []


def _teacher_problems(settings: Mapping[str, Any]) -> list[str]:
    problems = []
    if settings["teacher_loss_type"] not in {KL, MSE}:
        problems.append(
            f"teacher_loss_type={settings['teacher_loss_type']!r}: must be {KL!r} or {MSE!r}."
        )
    for name in TYPES:
        if settings[name] is not None and settings[name] not in DTYPES:
            problems.append(f"{name}={settings[name]!r}: must be one of {', '.join(DTYPES)}.")
    indices = settings["intermediate_block_indices"]
    if indices is not None and not (indices and all(is_whole(index, 0) for index in indices)):
        problems.append(
            f"intermediate_block_indices={indices!r}: must be numbers of blocks from 0 on, at "
            "least one; None for all."
        )
    return problems
