"""Training of scales and zero points of the whole model in this process."""

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
from before_after import changed, state_of
from gang_subjects import Subject
from torch import Tensor
from transformers import PreTrainedModel

from onecomp.errors import ConfigError, InputError, OneCompError
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.models import ModelConfig
from onecomp.post_process import distillation
from onecomp.post_process import global_ptq as global_ptq_module
from onecomp.post_process import teacher as teacher_module
from onecomp.post_process.base import records_of
from onecomp.post_process.distillation import LossWeights, training_loss
from onecomp.post_process.global_ptq import GlobalPTQ, distillation_task
from onecomp.post_process.samples import training_samples
from onecomp.post_process.student import StudentRates, student_of
from onecomp.post_process.teacher import KEPT_TOKENS, cache_is_smaller
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.quantizer.trainable import TrainableLinear

IDS = torch.arange(24).unsqueeze(0)
MANY_LAYERS = 4
"""So many that the teacher's answers take less room than the teacher."""


def process_of(subject: Subject, **settings: object) -> GlobalPTQ:
    defaults = {
        "calibration_config": subject.text,
        "epochs": 2,
        "gptq_lr": 1e-3,
        "dbf_lr": 1e-3,
    }
    return GlobalPTQ(**{**defaults, **settings})


def train(subject: Subject, **settings: object) -> tuple[PreTrainedModel, dict]:
    """A trained model, and what it says of that."""
    model = subject.load()
    process_of(subject, **settings).run(model, subject.model_config)
    [entry] = records_of(model)
    return model, entry


def flags_of(model: PreTrainedModel) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def logits_of(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def held_out_loss(
    subject: Subject, model: PreTrainedModel, weights: LossWeights, kept: int | None = KEPT_TOKENS
) -> float:
    """The loss of a model as it is stored, against the live original model's tokens."""
    ids = training_samples("test", subject.text, subject.model_config).held_out
    said = logits_of(subject.model_config.load_model(), ids)
    whole = distillation.WholeDistribution(said)
    teacher = whole if kept is None else distillation.TopTokens.of(said, kept, weights.temperature)
    return float(training_loss(logits_of(model, ids), ids, teacher, weights))


def same_bits(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return not changed(state_of(one), other)


@pytest.fixture(scope="module")
def deep(subject_of) -> Subject:
    """One whose teacher's answers are kept in files."""
    subject = subject_of(num_layers=MANY_LAYERS)
    samples = training_samples("test", subject.text, subject.model_config)
    assert cache_is_smaller(subject.model_config, samples.all.numel())
    return subject


# What it changes


@pytest.mark.parametrize(
    ("family", "dtype", "sizes"),
    [
        ("llama", "float32", {}),
        ("llama", "float32", {"tie": True}),
        ("llama", "float32", {"num_layers": MANY_LAYERS}),
        ("llama", "bfloat16", {}),
        ("llama", "float16", {}),
        ("gemma2", "float32", {}),
        ("gemma2", "bfloat16", {"tie": True}),
        ("opt", "float32", {}),
        ("opt", "float16", {"tie": True}),
        ("qwen3", "float32", {}),
    ],
)
def test_scales_learn_and_nothing_else_changes(family, dtype, sizes, subject_of, tmp_path):
    subject = subject_of(family, dtype=dtype, **sizes)
    model = subject.load()
    before, modules = state_of(model), dict(model.named_modules())
    process_of(subject).run(model, subject.model_config)

    [entry] = records_of(model)
    assert entry["executed"]
    assert entry["held_out_after"] < entry["held_out_before"]
    assert changed(before, model) == {"scales"}
    assert {p.dtype for p in model.parameters()} == {
        torch.float16,
        subject.model_config.torch_dtype,
    }
    assert dict(model.named_modules()) == modules
    assert not any(isinstance(module, TrainableLinear) for module in model.modules())

    save_live_model(model, tmp_path / "model", source_dir=subject.checkpoint)
    loaded, _ = load_quantized_model(tmp_path / "model", device_map=None)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert records_of(loaded) == [entry]


def test_asymmetric_grids_keep_their_codes(subject_of, tmp_path):
    subject = subject_of(quantizer="asymmetric")
    model = subject.load()
    before = state_of(model)
    process_of(subject, epochs=5).run(model, subject.model_config)
    [entry] = records_of(model)
    assert entry["held_out_after"] < entry["held_out_before"]
    assert {"scales"} <= changed(before, model) <= {"scales", "qzeros"}
    found = held_out_loss(subject, model, LossWeights())
    assert entry["held_out_after"] == pytest.approx(found, abs=1e-6)
    save_live_model(model, tmp_path / "model", source_dir=subject.checkpoint)
    loaded, _ = load_quantized_model(tmp_path / "model", device_map=None)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    ("quantizer", "scales"),
    [("dbf", {"scaling0", "scaling2", "scaling4"}), ("onebit", {"a", "b"})],
)
def test_scales_of_signs_learn_and_signs_stay(quantizer, scales, subject_of, tmp_path):
    subject = subject_of(quantizer=quantizer)
    model = subject.load()
    before = state_of(model)
    process_of(subject).run(model, subject.model_config)
    [entry] = records_of(model)
    assert entry["held_out_after"] < entry["held_out_before"]
    assert changed(before, model) == scales
    save_live_model(model, tmp_path / "model", source_dir=subject.checkpoint)
    loaded, _ = load_quantized_model(tmp_path / "model", device_map=None)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_each_kind_of_scale_has_a_rate_of_its_own(subject, subject_of):
    tiny = 1e-12
    _, entry = train(subject, gptq_lr=tiny, dbf_lr=1e-3)
    assert not entry["executed"]
    _, entry = train(subject_of(quantizer="onebit"), gptq_lr=1e-3, dbf_lr=tiny)
    assert not entry["executed"]


def test_the_model_is_as_it_was_but_for_its_scales(subject):
    model = subject.load().train()
    flags, layers = flags_of(model), [m for m in model.modules() if isinstance(m, QuantLinear)]
    process_of(subject).run(model, subject.model_config)
    assert not any(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert [m for m in model.modules() if isinstance(m, QuantLinear)] == layers
    assert flags_of(model) == flags
    assert all(parameter.grad is None for parameter in model.parameters())


# What it records


@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights(temperature=2.0), LossWeights(0.5, 0.25), LossWeights(0.0, 1.0)],
)
def test_losses_in_the_record_are_those_of_the_stored_models(weights, subject):
    model, entry = train(
        subject,
        w_distill=weights.distill,
        w_ntp=weights.next_token,
        temperature=weights.temperature,
    )
    before = held_out_loss(subject, subject.load(), weights)
    after = held_out_loss(subject, model, weights)
    assert entry["held_out_before"] == pytest.approx(before, abs=1e-6)
    assert entry["held_out_after"] == pytest.approx(after, abs=1e-6)
    assert after < before


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_against_kept_tokens_are_nearly_those_against_all(temperature, deep):
    model, entry = train(deep, temperature=temperature)
    weights = LossWeights(temperature=temperature)
    before, after = (held_out_loss(deep, given, weights, None) for given in (deep.load(), model))
    assert entry["held_out_before"] == pytest.approx(before, rel=2e-2)
    assert entry["held_out_after"] == pytest.approx(after, rel=2e-2)


def test_the_record_says_what_was_done(subject):
    model, entry = train(subject, name="second", grad_accum_steps=2)
    assert (entry["name"], entry["class"], entry["executed"]) == ("second", "GlobalPTQ", True)
    assert "reason" not in entry
    assert entry["config"]["grad_accum_steps"] == 2
    assert entry["config"]["calibration_config"]["num_calibration_samples"] == 9
    assert GlobalPTQ("second", **{**entry["config"], "calibration_config": subject.text}) == (
        process_of(subject, name="second", grad_accum_steps=2)
    )
    details = entry["details"]
    assert (details["updates"], details["epochs"]) == (8, 2)  # 8 training samples, 2 of a step
    assert (details["skipped_steps"], details["stopped_early"]) == (0, False)
    assert 1 <= details["best_epoch"] <= 2
    assert json.loads(json.dumps(entry)) == entry
    assert model.config.quantization_config["bits"] == 3


def test_a_second_training_goes_on_from_the_first(subject):
    model = subject.load()
    for name in ("first", "second"):
        process_of(subject, name=name).run(model, subject.model_config)
    first, second = records_of(model)
    assert (first["name"], second["name"]) == ("first", "second")
    assert second["held_out_before"] == first["held_out_after"]
    assert second["held_out_after"] <= first["held_out_after"]


def test_early_stopping_and_rarer_evaluations_are_passed_on(subject):
    _, entry = train(subject, epochs=6, gptq_lr=1e3, early_stopping_patience=1)
    assert (entry["details"]["epochs"], entry["details"]["stopped_early"]) == (1, True)
    _, entry = train(subject, epochs=3, gptq_lr=1e3, early_stopping_patience=1, eval_interval=2)
    assert entry["details"]["epochs"] == 2


# What makes no difference


def test_gradient_checkpointing_and_torchs_random_state_change_no_bit(subject):
    models = []
    for seed, checkpointing in ((0, True), (1, True), (1, False)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            models.append(train(subject, use_gradient_checkpointing=checkpointing)[0])
            assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(models[0], models[1])
    assert same_bits(models[0], models[2])
    other, _ = train(subject, calibration_config=dataclasses.replace(subject.text, seed=1))
    assert not same_bits(models[0], other)  # another order of the samples


def test_blocks_are_run_again_on_the_way_back_where_that_is_asked_for(subject):
    calls = {}
    for checkpointing in (False, True):
        model, calls[checkpointing] = subject.load(), []
        mine = calls[checkpointing]
        model.model.layers[1].register_forward_pre_hook(lambda *_args, mine=mine: mine.append(1))
        process_of(subject, use_gradient_checkpointing=checkpointing).run(
            model, subject.model_config
        )
    assert len(calls[False]) == 16 + 3  # steps and evaluations
    assert len(calls[True]) == 2 * 16 + 3


def test_mixed_precision_computes_in_bfloat16_and_stores_as_ever(subject):
    model, entry = train(subject, use_mixed_precision=True)
    _, exact = train(subject)
    assert entry["executed"]
    assert entry["held_out_before"] != exact["held_out_before"]
    assert entry["held_out_before"] == pytest.approx(exact["held_out_before"], rel=0.3)
    before = subject.load().state_dict()
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert changed(dict(before), model) == {"scales"}


def test_ranks_share_the_held_out_samples(subject, monkeypatch):
    config = dataclasses.replace(subject.text, num_calibration_samples=24)
    samples = training_samples("test", config, subject.model_config)
    assert len(samples.held_out) == 3
    model = subject.load()
    with student_of(
        model, subject.model_config, uses_bf16=False, gradient_checkpointing=False
    ) as student:
        engine = global_ptq_module.LocalEngine(
            student.groups(StudentRates(codes_scale=1.0, signs_scale=1.0), 1),
            1.0,
            student.parameters(),
        )
        parts = {}
        for world_size in (1, 2, 5):
            engine.world_size, parts[world_size] = world_size, []
            for engine.rank in range(world_size):
                task = distillation_task(student, samples, None, LossWeights(0.0, 1.0), engine)
                parts[world_size].append(task.held_out())
    sums = {world: sum(total for total, _ in found) for world, found in parts.items()}
    assert [count for _, count in parts[5]] == [1, 1, 1, 0, 0]
    assert [count for _, count in parts[2]] == [2, 1]
    assert sums[2] == pytest.approx(sums[1], rel=1e-6)
    assert sums[5] == pytest.approx(sums[1], rel=1e-6)


# What it holds


def test_a_teacher_is_asked_beforehand_and_never_loaded_whole(deep, monkeypatch):
    monkeypatch.setattr(ModelConfig, "load_model", None)
    _, entry = train(deep)
    assert entry["executed"]


def test_the_original_model_is_never_loaded_whole(subject, deep, monkeypatch):
    monkeypatch.setattr(ModelConfig, "load_model", None)
    for given in (subject, deep):
        _, entry = train(given)
        assert entry["executed"]


def test_a_disk_without_room_for_the_answers_is_refused_before_work(subject, monkeypatch):
    monkeypatch.setattr(teacher_module, "free_disk", lambda _path: 1000)
    model = subject.load()
    before = state_of(model)
    with pytest.raises(InputError, match=r"answers to 432 tokens take 0\.0 GB, but .* Set TMPDIR"):
        process_of(subject).run(model, subject.model_config)
    assert changed(before, model) == set()


def test_no_teacher_is_asked_where_the_divergence_has_no_weight(subject, deep, monkeypatch):
    monkeypatch.setattr(ModelConfig, "load_model", None)
    monkeypatch.setattr(global_ptq_module, "cache_teacher", None)
    for given in (subject, deep):
        _, entry = train(given, epochs=1, w_distill=0.0, w_ntp=1.0)
        assert entry["held_out_after"] < entry["held_out_before"]


# What goes wrong


def test_a_training_that_makes_it_worse_is_rolled_back_to_the_bit(subject, subject_of):
    for given in (subject, subject_of(quantizer="asymmetric"), subject_of(quantizer="dbf")):
        model, entry = train(given, gptq_lr=1e3, dbf_lr=1e3)
        assert not entry["executed"]
        assert entry["reason"].startswith("no state was better on held-out samples than the begin")
        assert entry["held_out_after"] == entry["held_out_before"]
        assert same_bits(model, given.load())


def test_losses_that_stay_nan_are_given_up_and_rolled_back(subject, monkeypatch):
    def broken(*args: object) -> Tensor:
        loss = training_loss(*args)
        return loss * torch.nan if loss.requires_grad else loss

    monkeypatch.setattr(global_ptq_module, "training_loss", broken)
    model, entry = train(subject)
    assert not entry["executed"]
    assert "the loss was not finite in 10 steps in a row; rolled back" in entry["reason"]
    assert (entry["details"]["skipped_steps"], entry["details"]["updates"]) == (10, 0)
    assert same_bits(model, subject.load())


def is_untouched(model: PreTrainedModel, subject: Subject) -> bool:
    fresh = subject.load()
    return (
        same_bits(fresh, model)
        and flags_of(model) == flags_of(fresh)
        and not any(isinstance(module, TrainableLinear) for module in model.modules())
        and {p.device.type for p in model.parameters()} == {"cpu"}
        and records_of(model) == []
    )


def test_a_loss_that_is_nan_at_first_leaves_the_model_as_it_was(subject, monkeypatch):
    monkeypatch.setattr(
        global_ptq_module, "training_loss", lambda *args: training_loss(*args) * torch.nan
    )
    model = subject.load()
    with pytest.raises(OneCompError, match="the held-out loss is nan before the first step"):
        process_of(subject).run(model, subject.model_config)
    assert is_untouched(model, subject)


@pytest.mark.parametrize("step", [0, 5])
def test_an_error_in_training_leaves_the_model_as_it_was(step, subject, monkeypatch):
    calls = []

    def broken(*args: object) -> Tensor:
        loss = training_loss(*args)
        calls.extend([loss] * loss.requires_grad)
        if len(calls) > step:
            raise OneCompError("lost")
        return loss

    monkeypatch.setattr(global_ptq_module, "training_loss", broken)
    model = subject.load()
    with pytest.raises(OneCompError, match="lost"):
        process_of(subject).run(model, subject.model_config)
    assert is_untouched(model, subject)


@pytest.mark.parametrize(
    ("change", "samples", "message"),
    [
        ({"grad_accum_steps": 9}, 9, "8 training samples are fewer than the 9 of one step"),
        ({"name": "mine"}, 1, "mine: 1 sample(s): one is held out"),
    ],
)
def test_too_little_text_is_found_before_any_work(change, samples, message, subject, monkeypatch):
    monkeypatch.setattr(ModelConfig, "load_model", None)
    text = dataclasses.replace(subject.text, num_calibration_samples=samples)
    model = subject.load().train()
    with pytest.raises(ConfigError) as caught:
        process_of(subject, calibration_config=text, **change).run(model, subject.model_config)
    assert message in str(caught.value)
    assert model.training
    assert is_untouched(model, subject)


def test_a_rotated_model_needs_its_own_configuration(subject):
    model = subject.load()
    model.config.quantization_config["rotated"] = True
    with pytest.raises(ConfigError, match="Give the RotatedModelConfig that it was quantized with"):
        process_of(subject).run(model, subject.model_config)
    assert is_untouched(model, subject)


def test_a_model_without_quantized_layers_is_refused(subject):
    model = subject.model_config.load_model()
    before, flags = state_of(model), flags_of(model)
    with pytest.raises(InputError, match="GlobalPTQ: the model has no quantized layers"):
        process_of(subject).run(model, subject.model_config)
    assert changed(before, model) == set()
    assert flags_of(model) == flags


# Settings


def problems_of(build: Callable[[], GlobalPTQ]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.subject == "GlobalPTQ"
    return caught.value.problems


def test_all_settings_out_of_range_are_listed_at_once():
    found = problems_of(
        lambda: GlobalPTQ(
            epochs=0,
            eval_interval=0,
            grad_accum_steps=0,
            early_stopping_patience=-1,
            gptq_lr=0.0,
            dbf_lr=-1.0,
            temperature=0.0,
            grad_clip=math.inf,
            warmup_ratio=1.5,
            min_lr_ratio=-0.1,
            w_distill=-1.0,
        )
    )
    names = [problem.partition("=")[0] for problem in found]
    assert names == [
        "epochs", "eval_interval", "grad_accum_steps", "early_stopping_patience", "gptq_lr",
        "dbf_lr", "temperature", "grad_clip", "warmup_ratio", "min_lr_ratio", "w_distill",
    ]  # fmt: skip


def test_weights_must_be_numbers_and_one_above_zero():
    [problem] = problems_of(lambda: GlobalPTQ(w_distill=0.0))
    assert problem == (
        "w_distill and w_ntp are both 0: nothing would be trained. Raise one of them."
    )
    for value in (-1.0, math.nan, math.inf):
        [problem] = problems_of(lambda value=value: GlobalPTQ(w_ntp=value))
        assert problem.startswith(f"w_distill=1.0, w_ntp={value}: ")
    assert GlobalPTQ(w_distill=0.0, w_ntp=0.5).w_ntp == 0.5


def test_a_copy_of_the_settings_is_equal():
    process = GlobalPTQ(epochs=3, w_ntp=0.5)
    assert dataclasses.replace(process) == process
    assert process.name == "GlobalPTQ"
