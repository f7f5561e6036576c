"""Training of codes and signs of the whole model, beside scales."""

import pytest
import torch
from before_after import changed, state_of
from gang_subjects import Subject, same_curve, train_here

from onecomp.errors import ConfigError
from onecomp.models import Skeleton
from onecomp.post_process.base import records_of
from onecomp.post_process.global_ptq import GlobalPTQ
from onecomp.post_process.latents import LatentRates
from onecomp.post_process.student import StudentRates, student_of

UNMOVED = 1e-12
"""A rate of scales at which none of them changes."""
CODES = {"gptq_optimize_intweight": True, "gptq_intweight_lr": 1e-4}
SIGNS = {"optimize_binary": True, "binary_lr": 3e-5}
PLAIN = {"uses_bf16": False, "gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("quantizer", "settings", "tensors"),
    [
        ("symmetric", {**CODES, "epochs": 3}, {"qweight"}),
        ("dbf", {**SIGNS, "epochs": 8}, {"bp1", "bp3"}),
        ("onebit", {**SIGNS, "epochs": 8}, {"sign_packed"}),
    ],
)
def test_the_loss_falls_because_of_codes_or_signs(quantizer, settings, tensors, subject_of):
    subject = subject_of(quantizer=quantizer)
    model = subject.load()
    before = state_of(model)
    process = GlobalPTQ(
        calibration_config=subject.text, gptq_lr=UNMOVED, dbf_lr=UNMOVED, **settings
    )
    process.run(model, subject.model_config)
    [entry] = records_of(model)
    assert entry["held_out_after"] < entry["held_out_before"]
    assert changed(before, model) == tensors


def test_codes_of_one_kind_stay_when_the_other_is_asked_for(subject):
    model = subject.load()
    before = state_of(model)
    process = GlobalPTQ(calibration_config=subject.text, epochs=1, gptq_lr=1e-3, **SIGNS)
    process.run(model, subject.model_config)
    assert changed(before, model) == {"scales"}


def test_latents_have_their_rate_and_lean_towards_the_original(subject):
    rates = StudentRates(codes_scale=0.1, signs_scale=0.2, latents=LatentRates(codes=1e-4))
    name = "model.layers.1.mlp.up_proj"
    original = Skeleton.build(subject.model_config.source, torch.float32)
    weight = original.source.read([f"{name}.weight"])[f"{name}.weight"]
    with student_of(
        subject.load(), subject.model_config, latents=rates.latents, **PLAIN
    ) as student:
        layer = student.layers[name]
        error = weight - layer.weight().detach()
        lean = layer.latent.detach() - layer.codes().detach()
        assert (lean * error >= 0).all()
        assert lean.abs().max() > 0.4
        assert [group.lr for group in student.groups(rates, 8)] == [0.1, pytest.approx(5e-3)]


def test_rates_out_of_range_are_refused():
    with pytest.raises(ConfigError) as caught:
        GlobalPTQ(gptq_intweight_lr=0.0, binary_lr=-1.0)
    assert "gptq_intweight_lr" in str(caught.value)
    assert "binary_lr" in str(caught.value)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_executor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
@pytest.mark.parametrize(
    ("quantizer", "settings"),
    [
        ("symmetric", {**CODES, "gptq_intweight_lr": 3e-4}),
        ("onebit", {**SIGNS, "binary_lr": 3e-4}),
    ],
)
def test_a_gang_trains_them_as_one_process_would(quantizer, settings, subject_of, tmp_path):
    """At rates so high that some change in the few steps that there are."""
    subject: Subject = subject_of(quantizer=quantizer)
    config = {"zero_optimization": {"stage": 3}}
    process = subject.process(output_dir=str(tmp_path / "out"), deepspeed_config=config, **settings)
    here = train_here(subject, tmp_path / "teacher", process.latents)
    scales_alone = train_here(subject, tmp_path / "teacher")
    assert here.trained.keys() > scales_alone.trained.keys()
    assert here.progress.losses != scales_alone.progress.losses
    process.run(subject.load(), subject.model_config)
    same_curve(tmp_path / "out" / "training-0001", here)
