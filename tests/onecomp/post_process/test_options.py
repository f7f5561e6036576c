"""Processes by name: how texts of the command line become settings."""

import inspect

import pytest

import onecomp
from onecomp.errors import ConfigError
from onecomp.post_process.base import PostQuantizationProcess
from onecomp.post_process.options import PROCESSES, TextOptions, make_process

LORA = "data_files=text.txt"


def problems(name: str, *settings: str, **given: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_process(name, settings, given)
    return caught.value.problems


def test_every_process_that_is_offered_has_a_name():
    offered = {getattr(onecomp, name) for name in onecomp.__all__}
    processes = {
        kind
        for kind in offered
        if inspect.isclass(kind) and issubclass(kind, PostQuantizationProcess)
    }
    assert set(PROCESSES.values()) == processes - {PostQuantizationProcess}


@pytest.mark.parametrize("name", PROCESSES)
def test_without_settings_a_process_has_its_own_defaults(name):
    kind = PROCESSES[name]
    is_lora = name.startswith("lora")
    made = make_process(name, [LORA] if is_lora else [], {})
    assert made == (kind(data_files="text.txt") if is_lora else kind())
    assert type(made) is kind


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("global_ptq", "gptq_lr=1e-3", 1e-3),
        ("global_ptq", "epochs=7", 7),
        ("global_ptq", "use_mixed_precision=true", True),
        ("global_ptq", "use_gradient_checkpointing=false", False),
        ("global_ptq", "name=mine", "mine"),
        ("global_ptq_distributed", "lr_scheduler_type=linear", "linear"),
        ("global_ptq_distributed", 'report_to="none"', "none"),
        ("global_ptq_distributed", 'deepspeed_config={"zero_optimization": {"stage": 2}}',
         {"zero_optimization": {"stage": 2}}),
        ("global_ptq_distributed", "save_steps=null", None),
        ("blockwise_ptq", "targets=student", "student"),
        ("lora_sft", "data_files=a=b.txt", "a=b.txt"),
        ("lora_sft", 'data_files=["a.txt", "b.txt"]', ["a.txt", "b.txt"]),
        ("lora_sft", "text_column=", ""),
    ],
)  # fmt: skip
def test_values_are_json_or_plain_text(name, setting, value):
    settings = [LORA, setting] if name == "lora_sft" else [setting]
    made = make_process(name, settings, {})
    assert getattr(made, setting.partition("=")[0]) == value


def test_options_that_are_not_given_are_left_out():
    assert make_process("global_ptq", [], {"epochs": None}) == PROCESSES["global_ptq"]()
    assert make_process("blockwise_ptq", [], {"num_workers": 3}).num_workers == 3


@pytest.mark.parametrize("name", ["global_ptq", "lora_sft"])
def test_an_option_without_use_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        make_process(name, [], {"address": "head:6379"})
    assert caught.value.problems[0] == f"--address: {name} has no such setting. Leave it out."


def test_what_is_set_by_name_wins_over_an_option():
    assert make_process("global_ptq", ["epochs=2"], {"epochs": 3}).epochs == 2
    assert make_process("global_ptq", ["epochs=2", "epochs=4"], {}).epochs == 4


def test_an_unknown_process_is_refused_with_the_names_there_are():
    [problem] = problems("gptq")
    assert problem.startswith("process='gptq': must be one of blockwise_ptq, global_ptq, ")
    assert all(name in problem for name in PROCESSES)


def test_all_settings_that_are_none_are_refused_at_once():
    found = problems("blockwise_ptq", "lr=0.1", "rate=1", "epochs", "=3")
    texts = [problem.partition(":")[0] for problem in found]
    assert texts == ["--set rate=1", "--set epochs", "--set =3"]
    assert all(
        "must be FIELD=VALUE with a field of address, answering_blocks, " in p for p in found
    )
    assert "calibration_config" not in found[0]


def test_values_out_of_range_are_refused_by_the_process():
    assert problems("global_ptq", "epochs=0", "gptq_lr=-1.0") == [
        "epochs=0: must be a whole number, at least 1.",
        "gptq_lr=-1.0: must be above 0.",
    ]
    [both] = problems("global_ptq", "w_distill=0.0", "w_ntp=0.0")
    assert both.startswith("w_distill and w_ntp are both 0: nothing would be trained.")


@pytest.mark.parametrize(
    ("name", "setting", "rule"),
    [
        ("global_ptq", "use_gradient_checkpointing=False", "true or false"),
        ("global_ptq", "use_mixed_precision=0", "true or false"),
        ("global_ptq", 'use_mixed_precision="true"', "true or false"),
        ("lora_sft", "use_bf16=yes", "true or false"),
        ("global_ptq", "gptq_lr=fast", "a number"),
        ("global_ptq", "gptq_lr=true", "a number"),
        ("global_ptq", "epochs=1.5", "a whole number"),
        ("lora_sft", "target_modules=q_proj", "a list"),
        ("global_ptq_distributed", "lr_scheduler_kwargs=1", "an object"),
    ],
)
def test_values_of_another_type_are_refused(name, setting, rule):
    """Any text would count as true, and one name as a list of letters."""
    [problem] = problems(name, *([LORA] if name == "lora_sft" else []), setting)
    assert problem.startswith(f"--set {setting}: must be {rule}")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("lora_sft", 'target_modules=["q_proj", "o_proj"]', ("q_proj", "o_proj")),
        ("lora_sft", "intermediate_block_indices=[0, 1]", (0, 1)),
        ("global_ptq", "temperature=2", 2.0),
        ("global_ptq", "name=3", "3"),
    ],
)
def test_values_become_what_the_setting_is(name, setting, value):
    made = make_process(name, [*([LORA] if name == "lora_sft" else []), setting], {})
    found = getattr(made, setting.partition("=")[0])
    assert (found, type(found)) == (value, type(value))


def test_the_text_is_given_by_its_own_options():
    [problem] = problems("global_ptq", "calibration_config=c4")
    assert problem.startswith("--set calibration_config=c4: must be FIELD=VALUE with a field of ")


@pytest.mark.parametrize(
    ("dataset", "strategy"), [("c4", "drop_rand"), ("text.txt", "concat_chunk")]
)
def test_the_text_is_read_as_for_quantizing(dataset, strategy):
    text = TextOptions(dataset, "body", 9, 48, 5)
    made = make_process("global_ptq", [], {}, text)
    assert made.calibration_config == onecomp.CalibrationConfig(
        dataset, 48, 9, strategy=strategy, seed=5, text_key="body"
    )


def test_the_text_of_adapters_is_given_by_the_same_options(tmp_path):
    path = tmp_path / "text.jsonl"
    path.touch()
    made = make_process("lora_sft", [], {}, TextOptions(str(path), "body", 9, 48, 5))
    assert made == PROCESSES["lora_sft"](
        data_files=str(path), text_column="body", max_train_samples=9, max_length=48,
        shuffle_seed=5,
    )  # fmt: skip
    made = make_process("lora_sft", [], {}, TextOptions("owner/dataset"))
    assert made == PROCESSES["lora_sft"](dataset_name="owner/dataset")
