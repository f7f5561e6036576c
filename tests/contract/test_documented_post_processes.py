"""The documented settings of every post-process: names, order and defaults."""

import inspect
from dataclasses import fields, is_dataclass

import pytest
from documented import REQUIRED, Parameters, default_of, differences, field_differences

import onecomp
from onecomp.runner import Runner

BASE: Parameters = {"name": None}
LORA: Parameters = {
    **BASE,
    "dataset_name": None,
    "dataset_config_name": None,
    "data_files": None,
    "train_split": "train",
    "text_column": "text",
    "max_train_samples": None,
    "max_length": 1024,
    "shuffle_seed": 42,
    "lr": 1e-4,
    "epochs": 4,
    "batch_size": 1,
    "gradient_accumulation_steps": 16,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "logging_steps": 10,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": None,
    "output_dir": None,
    "use_bf16": None,
    "sft_loss_weight": 1.0,
    "teacher_loss_weight": 0.0,
    "teacher_loss_type": "kl",
    "teacher_temperature": 1.0,
    "teacher_model_id": None,
    "teacher_model_path": None,
    "teacher_dtype": None,
    "teacher_device": None,
    "cache_teacher_outputs": False,
    "teacher_cache_dtype": None,
    "intermediate_block_loss_weight": 0.0,
    "cache_intermediate_outputs": False,
    "intermediate_block_indices": None,
    "intermediate_cache_dtype": None,
}
PROCESSES: dict[str, Parameters] = {
    "PostQuantizationProcess": BASE,
    "GlobalPTQ": {
        **BASE,
        "epochs": 5,
        "gptq_lr": 1e-5,
        "temperature": 1.0,
        "grad_clip": 1.0,
        "dbf_lr": 5e-5,
        "calibration_config": None,
        "warmup_ratio": 0.1,
        "min_lr_ratio": 0.01,
        "eval_interval": 1,
        "use_gradient_checkpointing": True,
        "early_stopping_patience": 0,
        "use_mixed_precision": False,
        "grad_accum_steps": 1,
    },
    "GlobalPTQDistributed": {
        **BASE,
        "temperature": 1.0,
        "w_distill": 1.0,
        "w_ntp": 0.0,
        "gptq_lr": 1e-5,
        "dbf_lr": 5e-5,
        "calibration_config": None,
        "epochs": 5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "use_gradient_checkpointing": True,
        "bf16": True,
        "deepspeed_config": None,
        "output_dir": None,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "save_steps": None,
        "eval_interval": 1,
    },
    "BlockWisePTQ": {
        **BASE,
        "lr": 1e-4,
        "epochs": 10,
        "cbq_enable": False,
        "gptq_lr": 1e-3,
        "gptq_optimize_intweight": False,
        "gptq_intweight_lr": 1e-4,
        "grad_clip": 1.0,
        "optimize_binary": True,
        "k_smooth": 100.0,
        "cbq_epochs": 0,
        "cbq_lr": 5e-5,
        "calibration_config": None,
    },
    "PostProcessLoraSFT": LORA,
    "PostProcessLoraTeacherSFT": {**LORA, "teacher_loss_weight": 1.0},
    "PostProcessLoraTeacherOnlySFT": {**LORA, "sft_loss_weight": 0.0, "teacher_loss_weight": 1.0},
}
RUN: Parameters = {"quantized_model": REQUIRED, "model_config": REQUIRED}
NEEDED = {"data_files": "text.txt"}
"""What the documented example gives a LoRA process."""


@pytest.mark.parametrize("name", PROCESSES)
def test_settings_come_in_the_documented_order_with_the_documented_defaults(name):
    cls = getattr(onecomp, name)
    assert is_dataclass(cls)
    assert field_differences(cls, PROCESSES[name]) == []


@pytest.mark.parametrize("name", PROCESSES)
def test_additional_settings_are_optional_and_by_keyword_only(name):
    cls = getattr(onecomp, name)
    additional = {f.name for f in fields(cls)} - PROCESSES[name].keys()
    assert additional == {f.name for f in fields(cls) if f.kw_only}
    assert [f.name for f in fields(cls) if f.kw_only and default_of(f) is REQUIRED] == []


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_is_run_with_the_model_and_its_configuration(name):
    assert differences(getattr(onecomp, name).run, RUN) == []


@pytest.mark.parametrize("name", list(PROCESSES)[1:])
def test_a_process_is_called_by_the_name_of_its_class_unless_it_has_another(name):
    cls = getattr(onecomp, name)
    needed = NEEDED if issubclass(cls, onecomp.PostProcessLoraSFT) else {}
    assert cls(**needed).name == name
    assert cls("mine", **needed).name == "mine"


def test_all_processes_share_their_base_and_the_variants_theirs():
    base = onecomp.PostQuantizationProcess
    assert all(issubclass(getattr(onecomp, name), base) for name in PROCESSES)
    for variant in (onecomp.PostProcessLoraTeacherSFT, onecomp.PostProcessLoraTeacherOnlySFT):
        assert issubclass(variant, onecomp.PostProcessLoraSFT)
    assert inspect.isabstract(base)
    assert base.__abstractmethods__ == {"run"}


def test_the_runner_takes_post_processes_by_keyword():
    parameter = inspect.signature(Runner).parameters["post_processes"]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameter.default is None
