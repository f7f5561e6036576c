"""DeepSpeed's configuration: what is refused, with which key, and what the engine gets."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from onecomp.errors import ConfigError
from onecomp.post_process.deepspeed_config import (
    ADAM_AS_IT_IS,
    COUNTS,
    OFFLOAD_KEYS,
    SECTIONS,
    SWITCHES,
    StepSettings,
    batch_problems,
    engine_config,
)
from onecomp.post_process.global_ptq_distributed import GlobalPTQDistributed

SHIPPED = Path(__file__).parents[3] / "deploy" / "deepspeed"
SETTINGS = StepSettings(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=3,
    max_grad_norm=1.0,
    gptq_lr=1e-5,
    bf16=True,
)
WITHOUT_TENSORS = {
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "elastic_checkpoint",
    "legacy_stage1",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "save_muon_momentum_buffer_in_memory",
    "zenflow",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
}
"""Fields that are deprecated, or would change what is trained."""


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation is unknown"),
        ({"zero_optimization": {"stages": 2}}, r"zero_optimization\.stages is unknown"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage=4: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, r"zero_optimization\.stage='2'"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage=True"),
        ({"zero_optimization": 2}, "zero_optimization=2: must be an object"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size='big'"),
        ({"zero_optimization": {"overlap_comm": 1}}, r"overlap_comm=1: must be true or false"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param='cpu': must be an object"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled=True: scales are trained in float32"),
        ({"bf16": {"enabled": False}}, r"bf16\.enabled=False contradicts bf16=True"),
        ({"bf16": True}, "bf16=True: must be an object"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type='Lamb': must be AdamW"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer\.type='Adam': must be AdamW"),
        ({"optimizer": {"params": {"lr": 0.1}}}, r"optimizer\.params\.lr=0\.1 contradicts gptq_lr"),
        ({"optimizer": {"params": {"beta": 0.1}}}, r"optimizer\.params\.beta is unknown"),
        ({"optimizer": {"params": {"betas": [0.9]}}}, r"params\.betas=\[0\.9\]: must be two"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler has no place.*lr_scheduler_type"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu=4 contradicts per_device_train_batch_size=1",
        ),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps=4 contradicts gradient_accumulation_steps=1",
        ),
        ({"gradient_clipping": 0.5}, r"gradient_clipping=0\.5 contradicts max_grad_norm=1\.0"),
    ],
)
def test_a_wrong_key_is_named_where_the_process_is_made(config, told):
    with pytest.raises(ConfigError, match=f"deepspeed_config: .*{told}"):
        GlobalPTQDistributed(deepspeed_config=config)


@pytest.mark.parametrize("key", ADAM_AS_IT_IS)
def test_the_optimizer_is_not_another_than_the_file_says(key):
    wanted = ADAM_AS_IT_IS[key]
    told = rf"optimizer\.params\.{key}={not wanted}: must be {str(wanted).lower()}, as scales are "
    with pytest.raises(ConfigError, match=told):
        GlobalPTQDistributed(deepspeed_config={"optimizer": {"params": {key: not wanted}}})
    for value in (wanted, "auto"):
        GlobalPTQDistributed(deepspeed_config={"optimizer": {"params": {key: value}}})


@pytest.mark.parametrize("section", OFFLOAD_KEYS)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"device": "nvmee"}, r"\.device='nvmee': must be none, cpu or nvme\."),
        ({"device": None}, r"\.device=None: must be none, cpu or nvme\."),
        ({"devic": "cpu"}, r"\.devic is unknown\."),
        ({"device": "nvme"}, r"\.nvme_path='auto': must be a directory, as device is nvme\."),
        ({"device": "nvme", "nvme_path": None}, r"\.nvme_path=None: must be a directory"),
    ],
)
def test_a_wrong_key_of_an_offload_section_is_named(section, given, told):
    config = {"zero_optimization": {"stage": 3, section: given}}
    with pytest.raises(ConfigError, match=rf"zero_optimization\.{section}{told}") as caught:
        GlobalPTQDistributed(deepspeed_config=config)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("section", "device", "least_stage"),
    [
        ("offload_optimizer", "none", 0),
        ("offload_optimizer", "cpu", 0),
        ("offload_optimizer", "nvme", 3),
        ("offload_param", "none", 0),
        ("offload_param", "cpu", 3),
        ("offload_param", "nvme", 3),
    ],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_stage_would_not_offload_is_refused(section, device, least_stage, stage):
    given = {"device": device, "nvme_path": "/fast"}
    config = {"zero_optimization": {"stage": stage, section: given}}
    if stage >= least_stage:
        GlobalPTQDistributed(deepspeed_config=config)
        return
    told = rf"{section}\.device='{device}': must be none below stage 3 \(stage={stage}\)"
    with pytest.raises(ConfigError, match=told):
        GlobalPTQDistributed(deepspeed_config=config)


def test_every_problem_is_listed():
    with pytest.raises(ConfigError) as caught:
        GlobalPTQDistributed(deepspeed_config={"zero_optimization": {"stage": 9, "x": 1}, "y": 2})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "no such file"), ("{", "is not valid JSON"), ("[1]", "holds no JSON object")],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, text, told):
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        GlobalPTQDistributed(deepspeed_config=str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_files_that_ship_are_valid_for_any_settings(stage):
    path = SHIPPED / f"zero{stage}.json"
    GlobalPTQDistributed(
        deepspeed_config=str(path), per_device_train_batch_size=2, bf16=False, max_grad_norm=0.5
    )
    config = engine_config(json.loads(path.read_text()), SETTINGS)
    assert config.stage == stage
    assert config.deepspeed["train_micro_batch_size_per_gpu"] == 2
    assert config.deepspeed["gradient_accumulation_steps"] == 3
    assert "bf16" not in config.deepspeed
    assert "optimizer" not in config.deepspeed


def test_keys_of_the_sharding_are_those_of_deepspeed():
    fields = DeepSpeedZeroConfig.model_fields.items()
    known = {name for name, _ in fields} | {f.alias for _, f in fields if f.alias is not None}
    ours = SWITCHES | COUNTS | SECTIONS
    assert ours <= known
    aliased = {name for name, field in fields if field.alias is not None}
    assert known - ours - WITHOUT_TENSORS - aliased == set()


@pytest.mark.parametrize("section", OFFLOAD_KEYS)
def test_keys_of_an_offload_section_are_those_of_deepspeed(section):
    made = DeepSpeedZeroConfig(**{section: {}})
    assert OFFLOAD_KEYS[section] == type(getattr(made, section)).model_fields.keys()


@pytest.mark.parametrize("value", ["auto", None])
def test_what_is_left_open_is_left_to_deepspeed(value):
    given = dict.fromkeys((SWITCHES | COUNTS | SECTIONS) - {"stage"}, value)
    GlobalPTQDistributed(deepspeed_config={"zero_optimization": given})
    made = engine_config({"zero_optimization": given}, SETTINGS).deepspeed["zero_optimization"]
    assert DeepSpeedZeroConfig(**made).stage == 1


def test_stage_0_has_the_numbers_of_stage_1():
    assert engine_config({"zero_optimization": {"stage": 0}}, SETTINGS).stage == 1
    assert engine_config({}, SETTINGS).stage == 1


def test_adam_takes_what_the_file_says():
    params = {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.01, "lr": "auto"}
    config = engine_config({"optimizer": {"type": "AdamW", "params": params}}, SETTINGS)
    assert (config.betas, config.eps, config.weight_decay) == ((0.8, 0.9), 1e-6, 0.01)


def test_the_whole_batch_follows_from_the_number_of_workers():
    assert batch_problems({"train_batch_size": 12}, SETTINGS, num_workers=2) == []
    assert batch_problems({"train_batch_size": "auto"}, SETTINGS, num_workers=2) == []
    [problem] = batch_problems({"train_batch_size": 8}, SETTINGS, num_workers=2)
    assert "train_batch_size=8 contradicts" in problem
    assert "2 worker(s) = 12" in problem
