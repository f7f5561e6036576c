"""DeepSpeed's configuration: what may be in it, what is filled in, and what contradicts us.

Checked without importing DeepSpeed, so that a wrong key is found where the process is made.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTO = "auto"
STAGES = (0, 1, 2, 3)
DEFAULT_CONFIG: Mapping[str, Any] = {"zero_optimization": {"stage": 1}}
"""Where none is given: gradients are averaged, and the optimizer's state is shared out."""

PASSED_ON = frozenset(
    {
        "communication_data_type",
        "comms_logger",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
"""Top-level keys that DeepSpeed gets as they are."""
READ_HERE = frozenset(
    {
        "bf16",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_optimization",
    }
)
"""Those that have to agree with the process's own settings."""
NO_PLACE: Mapping[str, str] = {
    "scheduler": "the learning rate follows lr_scheduler_type and warmup_ratio",
    "amp": "mixed precision is the setting bf16",
    "torch_autocast": "mixed precision is the setting bf16",
    "managed_gradient_accumulation": "the training loop says where a step ends",
    "tensorboard": "set report_to instead",
    "wandb": "set report_to instead",
}
"""Keys that DeepSpeed knows, and why they are refused."""

SWITCHES = frozenset(
    {
        "allgather_partitions",
        "compute_grad_norm",
        "contiguous_gradients",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "overlap_comm",
        "parameter_alignment",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
    }
)
COUNTS = frozenset(
    {
        "allgather_bucket_size",
        "max_live_parameters",
        "max_reuse_distance",
        "model_persistence_threshold",
        "param_persistence_threshold",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "stage",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    }
)
OFFLOAD_KEYS: Mapping[str, frozenset[str]] = {
    "offload_optimizer": frozenset(
        {
            "buffer_count",
            "cpuadam_cores_perc",
            "device",
            "fast_init",
            "nvme_path",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "ratio",
            "super_offload",
        }
    ),
    "offload_param": frozenset(
        {"buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"}
    ),
}
CPU, NVME = "cpu", "nvme"
OFFLOAD_DEVICES = ("none", CPU, NVME)
SECTIONS = frozenset({"leaf_module", *OFFLOAD_KEYS})
ADAM_KEYS = frozenset(
    {
        "adam_w_mode",
        "amsgrad",
        "betas",
        "bias_correction",
        "eps",
        "lr",
        "torch_adam",
        "weight_decay",
    }
)
ADAM_AS_IT_IS: Mapping[str, bool] = {
    "adam_w_mode": True,
    "amsgrad": False,
    "bias_correction": True,
    "torch_adam": True,
}
"""What a file may say of the optimizer, but not change: it is ``torch.optim.AdamW``."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The process's own settings that a DeepSpeed file may repeat."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float | int
    gptq_lr: float | int
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine is made from, checked."""

    stage: int
    deepspeed: Mapping[str, Any]
    """For ``deepspeed.initialize``."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | int = 0.0


def read_config(given: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """The configuration that was given, and what is wrong with its file."""
    if given is None:
        return dict(DEFAULT_CONFIG), []
    if isinstance(given, Mapping):
        return dict(given), []
    path = Path(given).expanduser()
    if not path.is_file():
        return {}, [f"deepspeed_config={str(given)!r}: no such file. Name a JSON file, or a dict."]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, [f"deepspeed_config={str(given)!r}: is not valid JSON ({error})."]
    if not isinstance(found, dict):
        return {}, [f"deepspeed_config={str(given)!r}: holds no JSON object."]
    return found, []


def config_problems(config: Mapping[str, Any], settings: StepSettings) -> list[str]:
    """What is wrong with a configuration, each with its key."""
    problems = [
        f"{key} has no place in a DeepSpeed configuration here: {NO_PLACE[key]}. Remove it."
        for key in sorted(config.keys() & NO_PLACE.keys())
    ]
    known = PASSED_ON | READ_HERE | NO_PLACE.keys()
    problems += [
        f"{key} is unknown, or for features that are not used here. Known: "
        f"{', '.join(sorted(PASSED_ON | READ_HERE))}."
        for key in sorted(map(str, config.keys() - known))
    ]
    problems += _zero_problems(config.get("zero_optimization", {}))
    problems += _optimizer_problems(config.get("optimizer", {}), settings)
    problems += _precision_problems(config, settings)
    problems += _contradictions(
        config,
        {
            "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
            "gradient_accumulation_steps": "gradient_accumulation_steps",
            "gradient_clipping": "max_grad_norm",
        },
        settings,
    )
    return [f"deepspeed_config: {problem}" for problem in problems]


def _zero_problems(section: object) -> list[str]:
    if not isinstance(section, Mapping):
        return [f"zero_optimization={section!r}: must be an object with a stage."]
    problems = []
    for key, value in section.items():
        name, is_number = f"zero_optimization.{key}", isinstance(value, int | float)
        if key not in SWITCHES | COUNTS | SECTIONS:
            problems.append(f"{name} is unknown, or for features that are not used here.")
        elif key == "stage" and (value not in STAGES or isinstance(value, bool)):
            problems.append(f"{name}={value!r}: must be 0, 1, 2 or 3.")
        elif value in (AUTO, None):
            continue
        elif key in SWITCHES and not isinstance(value, bool):
            problems.append(f"{name}={value!r}: must be true or false.")
        elif key in COUNTS and not (is_number and value >= 0 and not isinstance(value, bool)):
            problems.append(f"{name}={value!r}: must be a number, at least 0.")
        elif key in SECTIONS and not isinstance(value, Mapping):
            problems.append(f"{name}={value!r}: must be an object.")
    for key in OFFLOAD_KEYS:
        problems += _offload_problems(key, section.get(key), section.get("stage", 0))
    return problems


def _offload_problems(key: str, given: object, stage: object) -> list[str]:
    """What is wrong with a section that says where the optimizer or the parameters wait."""
    if not isinstance(given, Mapping):
        return []
    name = f"zero_optimization.{key}"
    problems = [f"{name}.{inner} is unknown." for inner in given.keys() - OFFLOAD_KEYS[key]]
    device, path = given.get("device", AUTO), given.get("nvme_path", AUTO)
    if device not in (AUTO, *OFFLOAD_DEVICES):
        problems.append(f"{name}.device={device!r}: must be none, cpu or nvme.")
    if device == NVME and (path == AUTO or not isinstance(path, str | Path)):
        problems.append(f"{name}.nvme_path={path!r}: must be a directory, as device is nvme.")
    is_for_stage_3 = device == NVME or (device == CPU and key == "offload_param")
    if is_for_stage_3 and stage != 3:
        problems.append(f"{name}.device={device!r}: must be none below stage 3 (stage={stage!r}).")
    return problems


def _optimizer_problems(section: object, settings: StepSettings) -> list[str]:
    if not isinstance(section, Mapping):
        return [f"optimizer={section!r}: must be an object with type and params."]
    problems = [f"optimizer.{key} is unknown." for key in section.keys() - {"type", "params"}]
    if str(section.get("type", "AdamW")).lower() != "adamw":
        problems.append(f"optimizer.type={section['type']!r}: must be AdamW.")
    params = section.get("params", {})
    if not isinstance(params, Mapping):
        return [*problems, f"optimizer.params={params!r}: must be an object."]
    problems += [f"optimizer.params.{key} is unknown." for key in params.keys() - ADAM_KEYS]
    problems += _contradictions(params, {"lr": "gptq_lr"}, settings, "optimizer.params.")
    problems += [
        f"optimizer.params.{key}={params[key]!r}: must be {str(value).lower()}, as scales are "
        "trained with torch.optim.AdamW."
        for key, value in ADAM_AS_IT_IS.items()
        if params.get(key, AUTO) not in (AUTO, value)
    ]
    for key in ("eps", "weight_decay"):
        value = params.get(key, AUTO)
        if value != AUTO and not (isinstance(value, int | float) and value >= 0):
            problems.append(f"optimizer.params.{key}={value!r}: must be a number, at least 0.")
    betas = params.get("betas", AUTO)
    if betas != AUTO and not _are_betas(betas):
        problems.append(f"optimizer.params.betas={betas!r}: must be two numbers from 0 to 1.")
    return problems


def _are_betas(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)


def _precision_problems(config: Mapping[str, Any], settings: StepSettings) -> list[str]:
    enabled = {}
    for key in ("fp16", "bf16"):
        section = config.get(key, {})
        if not isinstance(section, Mapping):
            return [f"{key}={section!r}: must be an object with enabled."]
        enabled[key] = section.get("enabled", AUTO)
    if enabled["fp16"] not in (False, AUTO):
        return [
            f"fp16.enabled={enabled['fp16']!r}: scales are trained in float32, and CPUs do not "
            "compute in float16. Use the setting bf16, or float32."
        ]
    if enabled["bf16"] not in (AUTO, settings.bf16):
        return [
            f"bf16.enabled={enabled['bf16']!r} contradicts bf16={settings.bf16}. Write auto, or "
            "the same in both. (What is trained stays float32 either way.)"
        ]
    return []


def _contradictions(
    section: Mapping[str, Any],
    twins: Mapping[str, str],
    settings: StepSettings,
    prefix: str = "",
) -> list[str]:
    """Keys with another value than the setting of the same meaning."""
    return [
        f"{prefix}{key}={section[key]!r} contradicts {name}={getattr(settings, name)!r}. Write "
        "auto, or the same in both."
        for key, name in twins.items()
        if section.get(key, AUTO) not in (AUTO, getattr(settings, name))
    ]


def batch_problems(
    config: Mapping[str, Any], settings: StepSettings, num_workers: int
) -> list[str]:
    """What is wrong with ``train_batch_size``, once the number of workers is known."""
    whole = (
        settings.per_device_train_batch_size * settings.gradient_accumulation_steps * num_workers
    )
    if config.get("train_batch_size", AUTO) in (AUTO, whole):
        return []
    return [
        f"deepspeed_config: train_batch_size={config['train_batch_size']!r} contradicts "
        f"per_device_train_batch_size={settings.per_device_train_batch_size} x "
        f"gradient_accumulation_steps={settings.gradient_accumulation_steps} x {num_workers} "
        f"worker(s) = {whole}. Write auto, or change one of them."
    ]


def engine_config(config: Mapping[str, Any], settings: StepSettings) -> EngineConfig:
    """A checked configuration, completed.

    Stage 0 shards nothing and has the same numbers as stage 1, which takes its place. The forward
    pass computes in bfloat16 by autocast, so that ``bf16`` goes no further than here.
    """
    zero = {k: v for k, v in config.get("zero_optimization", {}).items() if v not in (AUTO, None)}
    zero["stage"] = max(1, zero.get("stage", 0))
    zero.setdefault("memory_efficient_linear", False)
    if zero["stage"] == 1:
        zero["overlap_comm"] = False  # there is nothing to overlap where the loop ends a step
    passed = {key: value for key, value in config.items() if key in PASSED_ON}
    passed.setdefault("zero_force_ds_cpu_optimizer", False)
    deepspeed = passed | {
        "train_micro_batch_size_per_gpu": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": float(settings.max_grad_norm),
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
    }
    adam = {
        key: value
        for key, value in config.get("optimizer", {}).get("params", {}).items()
        if key in ("betas", "eps", "weight_decay") and value != AUTO
    }
    if "betas" in adam:
        adam["betas"] = (float(adam["betas"][0]), float(adam["betas"][1]))
    return EngineConfig(stage=zero["stage"], deepspeed=deepspeed, **adam)
