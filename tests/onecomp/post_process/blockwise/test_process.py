"""Block-wise training of live models, and what is refused before it."""

import dataclasses

import pytest
import torch
from before_after import changed, state_of
from gang_subjects import Subject, make_subject
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from onecomp import BlockWisePTQ, ModelConfig
from onecomp.errors import ConfigError, InputError
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.post_process.base import PROCESSES_KEY, records_of
from onecomp.post_process.blockwise.process import ROLLED_BACK
from onecomp.post_process.blockwise.span import Span
from onecomp.quantizer import GPTQ
from onecomp.quantizer.quant_linear import QuantLinear

SCALES = {"scales", "scaling0", "scaling2", "scaling4", "a", "b"}
IDS = torch.arange(40).unsqueeze(0)


def process_for(subject: Subject, **settings: object) -> BlockWisePTQ:
    defaults = {
        "calibration_config": subject.text,
        "epochs": 4,
        "gptq_lr": 3e-3,
        "lr": 1e-3,
        "binary_lr": 1e-4,
        "num_workers": 0,
    }
    return BlockWisePTQ(**{**defaults, **settings})


@pytest.mark.parametrize(
    ("kind", "settings", "may_change"),
    [
        ("gptq", {}, {"scales"}),
        ("gptq", {"gptq_optimize_intweight": True}, {"scales", "qweight"}),
        ("asymmetric", {}, {"scales", "qzeros"}),
        ("dbf", {"optimize_binary": False}, {"scaling0", "scaling2", "scaling4"}),
        ("dbf", {}, {"scaling0", "scaling2", "scaling4", "bp1", "bp3"}),
        ("onebit", {"optimize_binary": False}, {"a", "b"}),
        ("onebit", {"epochs": 10, "lr": 1e-4}, {"a", "b", "sign_packed"}),
    ],
)
def test_what_is_trained_makes_the_model_better_and_nothing_else_changes(
    kind, settings, may_change, subject_of, tmp_path
):
    subject = subject_of(kind)
    model = subject.load()
    before = state_of(model)
    process_for(subject, **settings).run(model, subject.model_config)

    [record] = records_of(model)
    assert record["executed"]
    assert record["held_out_after"] < record["held_out_before"]
    assert SCALES & changed(before, model) == SCALES & may_change
    assert changed(before, model) <= may_change
    assert not model.training
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    save_live_model(model, tmp_path / "saved", source_dir=subject.checkpoint)
    loaded, _ = load_quantized_model(tmp_path / "saved", device_map=None)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.quantization_config[PROCESSES_KEY] == [record]


@pytest.mark.parametrize(("kind", "epochs"), [("gptq", 10), ("dbf", 10), ("onebit", 10)])
def test_decisions_change_at_the_default_learning_rates(kind, epochs, subject_of):
    subject = subject_of(kind)
    process = BlockWisePTQ(
        calibration_config=subject.text,
        epochs=epochs,
        gptq_optimize_intweight=True,
        optimize_binary=True,
        num_workers=0,
    )
    model = subject.load()
    process.run(model, subject.model_config)
    [record] = records_of(model)
    assert record["executed"]
    assert record["details"]["changed_decisions"] > 0.002 * record["details"]["trained_decisions"]


def test_pairs_of_blocks_are_trained_behind_single_ones(subject_of):
    subject = subject_of("gptq")
    after = []
    for settings in ({}, {"cbq_enable": True, "cbq_lr": 3e-3, "cbq_epochs": 6}):
        model = subject.load()
        process_for(subject, **settings).run(model, subject.model_config)
        [record] = records_of(model)
        after.append((record["held_out_after"], record["details"]["spans"]))
    assert [spans for _, spans in after] == [3, 4]
    assert after[1][0] < after[0][0]


def test_the_documented_targets_are_those_of_the_blocks_own_error(subject_of):
    subject = subject_of("gptq")
    found = []
    for targets in ("teacher", "student"):
        model = subject.load()
        process_for(subject, targets=targets).run(model, subject.model_config)
        assert records_of(model)[0]["executed"]
        found.append(state_of(model))
    scales = [name for name in found[0] if name.endswith("scales")]
    first, second = (
        [n for n in scales if not torch.equal(found[0][n], found[1][n])],
        [n for n in scales if ".0." in n],
    )
    assert first  # the second block sees other inputs of its original
    assert not set(first) & set(second)  # in front of the first one both streams are the same


def test_a_model_that_is_not_better_on_the_whole_comes_back_as_it_was(subject_of, monkeypatch):
    subject = subject_of("gptq")
    model = subject.load()
    before = state_of(model)
    monkeypatch.setattr(
        "onecomp.post_process.blockwise.tuning.Tuning._judge_model", lambda _tuning: (1.0, 1.5)
    )
    process_for(subject).run(model, subject.model_config)
    [record] = records_of(model)
    assert not record["executed"]
    assert record["reason"] == ROLLED_BACK
    assert record["held_out_after"] == record["held_out_before"] == 1.0
    assert changed(before, model) == set()


def test_a_phase_that_is_undone_is_not_counted(subject_of, monkeypatch):
    judgements = [(1.0, 0.8), (1.0, 0.9)]
    monkeypatch.setattr(
        "onecomp.post_process.blockwise.tuning.Tuning._judge_model",
        lambda _tuning: judgements.pop(0),
    )
    subject = subject_of("gptq")
    model = subject.load()
    process_for(subject).run(model, subject.model_config)
    [record] = records_of(model)
    assert record["executed"]
    assert record["held_out_after"] == 0.8
    assert record["details"]["spans"] == record["details"]["improved_spans"] == 2
    assert record["details"]["phases_undone"] == 1


def test_pairs_that_there_are_not_are_told(subject_of, caplog):
    subject = subject_of("gptq")
    process_for(subject, cbq_enable=True, answering_blocks=2, epochs=1).run(
        subject.load(), subject.model_config
    )
    assert "cbq_enable: fewer than two blocks are trained alone" in caplog.text


def test_blocks_that_only_get_worse_stay_as_they_were(subject_of):
    subject = subject_of("gptq")
    model = subject.load()
    before = state_of(model)
    process_for(subject, gptq_lr=1e3).run(model, subject.model_config)
    [record] = records_of(model)
    assert not record["executed"]
    assert record["details"]["improved_spans"] == 0
    assert changed(before, model) == set()


def test_gradients_that_are_not_finite_are_skipped_and_in_the_end_given_up(
    subject_of, monkeypatch, caplog
):
    gradient = Span.gradient

    def broken(span: Span, *arguments: object) -> tuple[Tensor, float]:
        values, loss = gradient(span, *arguments)
        return torch.full_like(values, torch.nan), loss

    monkeypatch.setattr(Span, "gradient", broken)
    subject = subject_of("gptq")
    model = subject.load()
    before = state_of(model)
    process_for(subject).run(model, subject.model_config)
    [record] = records_of(model)
    assert not record["executed"]
    assert record["details"]["spans_given_up"] == 3
    skipped = record["details"]["skipped_steps"]
    assert skipped == 3 * 16  # two epochs of eight steps make more than ten
    assert record["reason"] == f"{ROLLED_BACK}; {skipped} steps were skipped: not finite"
    assert "block 1: 16 steps skipped: not finite; training it ended early" in caplog.text
    assert changed(before, model) == set()


def test_adapters_are_refused_before_any_work(subject_of):
    subject = subject_of("gptq")
    model = subject.load()
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    inject_adapter_in_model(config, model)
    with pytest.raises(InputError, match="has LoRA adapters, which this process does not see"):
        process_for(subject).run(model, subject.model_config)


@pytest.mark.parametrize("family", ["gemma2", "opt", "phi3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_models_and_narrow_types(family, dtype, tiny_model_dir, text, tmp_path):
    directory = tiny_model_dir(family, dtype=getattr(torch, dtype))
    subject = make_subject(directory, text, tmp_path, GPTQ(wbits=3, groupsize=32))
    subject = dataclasses.replace(
        subject, model_config=ModelConfig(path=str(directory), dtype="auto", device="cpu")
    )
    model = subject.load()
    process_for(subject, use_mixed_precision=dtype == "bfloat16").run(model, subject.model_config)
    [record] = records_of(model)
    assert record["executed"]
    assert record["held_out_after"] < record["held_out_before"]


def test_all_settings_out_of_range_are_listed():
    with pytest.raises(ConfigError) as caught:
        BlockWisePTQ(lr=0.0, epochs=0, batch_size=0, cbq_epochs=-1, k_smooth=-1.0, targets="both")
    assert len(caught.value.problems) == 6


def test_a_model_without_quantized_layers_is_refused(subject_of):
    subject = subject_of("gptq")
    with pytest.raises(InputError, match="has no quantized layers"):
        process_for(subject).run(subject.model_config.load_model(), subject.model_config)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"batch_size": 9}, "8 training samples are fewer than batch_size=9"),
        ({"num_calibration_samples": 1}, r"1 sample\(s\): one is held out"),
    ],
)
def test_too_few_samples_leave_the_model_untouched(settings, told, subject_of):
    subject = subject_of("gptq")
    model = subject.load()
    before = state_of(model)
    count = settings.pop("num_calibration_samples", 9)
    config = dataclasses.replace(subject.text, num_calibration_samples=count)
    process = process_for(subject, calibration_config=config, **settings)
    with pytest.raises(ConfigError, match=told):
        process.run(model, subject.model_config)
    assert changed(before, model) == set()
    assert records_of(model) == []


def test_a_rotated_checkpoint_needs_the_rotated_model(subject_of):
    subject = subject_of("gptq")
    model = subject.load()
    model.config.quantization_config = {**model.config.quantization_config, "rotated": True}
    with pytest.raises(ConfigError, match="Give the RotatedModelConfig"):
        process_for(subject).run(model, subject.model_config)
