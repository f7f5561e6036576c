"""Training by Ray Train and DeepSpeed: what is refused, and one real gang under ZeRO-3."""

import logging

import pytest
import torch
from gang_subjects import WHOLE_CONFIG, Subject, same_curve, train_here
from torch import Tensor, nn

from onecomp.errors import ConfigError, InputError
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.post_process.base import records_of
from onecomp.post_process.global_ptq_distributed import GlobalPTQDistributed

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

HALF = 0.56
"""What a rank of two holds, of everything, at most: buffers are on both."""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"w_distill": 0.0}, "w_distill and w_ntp are both 0"),
        ({"epochs": 0}, "epochs=0"),
        ({"gptq_lr": 0.0}, r"gptq_lr=0\.0"),
        ({"warmup_ratio": 2.0}, r"warmup_ratio=2\.0"),
        ({"save_strategy": "best"}, "save_strategy='best': must be one of no, epoch, steps"),
        ({"save_steps": 0, "save_strategy": "steps"}, "save_steps=0"),
        ({"teacher": "cached"}, "teacher='cached': must be one of auto, streamed, sharded"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin'"),
        ({"report_to": "nothing_known"}, "report_to='nothing_known' is unknown"),
        ({"num_workers": 0}, "num_workers=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        GlobalPTQDistributed(**settings)


def test_all_problems_are_listed():
    with pytest.raises(ConfigError) as caught:
        GlobalPTQDistributed(epochs=0, save_strategy="x", lr_scheduler_type="y", w_distill=0.0)
    assert len(caught.value.problems) == 4


def test_steps_between_checkpoints_without_the_strategy_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        GlobalPTQDistributed(save_steps=5)
    assert "save_steps=5 has no effect with save_strategy='no'" in caplog.text


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Last parts of the names of tensors that differ."""
    now = model.state_dict()
    return {n.rpartition(".")[2] for n, t in before.items() if not torch.equal(t, now[n])}


def test_a_model_without_quantized_layers_is_refused(subject: Subject):
    original = subject.model_config.load_model()
    with pytest.raises(InputError, match="has no quantized layers"):
        subject.process().run(original, subject.model_config)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"per_device_train_batch_size": 5}, r"8 training samples are fewer than the 10 of one"),
        ({"deepspeed_config": {"train_batch_size": 3}}, r"train_batch_size=3 contradicts"),
    ],
)
@pytest.mark.usefixtures("ray_executor")
def test_what_does_not_fit_the_workers_leaves_the_model_untouched(
    subject: Subject, settings, told, tmp_path
):
    model = subject.load()
    before = tensors(model)
    process = subject.process(output_dir=str(tmp_path / "out"), **settings)
    with pytest.raises(ConfigError, match=told):
        process.run(model, subject.model_config)
    assert changed(before, model) == set()
    assert records_of(model) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_executor")
def test_two_workers_hold_half_each_and_train_as_one_would(subject: Subject, tmp_path):
    """Under ZeRO-3, with real Ray Train and DeepSpeed; codes are sharded, too."""
    here = train_here(subject, tmp_path / "teacher")
    model = subject.load()
    before = tensors(model)
    process = subject.process(output_dir=str(tmp_path / "out"), deepspeed_config=WHOLE_CONFIG)
    process.run(model, subject.model_config)

    work = tmp_path / "out" / "training-0001"
    same_curve(work, here)
    [record] = records_of(model)
    assert record["executed"]
    assert record["held_out_after"] < record["held_out_before"]
    assert record["details"]["workers"] == 2
    assert record["details"]["zero_stage"] == 3
    assert record["details"]["weight_bytes_per_worker"] < HALF * here.held_bytes
    assert changed(before, model) == {"scales"}
    assert not (work / "checkpoint").exists()
    assert list(work.glob("ray-train/checkpoint_*"))
    save_live_model(model, tmp_path / "saved")
    loaded, _ = load_quantized_model(tmp_path / "saved", device_map=None)
    assert changed(tensors(model), loaded) == set()
