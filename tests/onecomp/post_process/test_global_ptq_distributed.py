"""Training by Ray Train and DeepSpeed: what is refused, and one real gang under ZeRO-3."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from before_after import changed, state_of
from gang_subjects import WHOLE_CONFIG, Subject, same_curve, train_here

from onecomp.errors import ConfigError, InputError, OneCompError
from onecomp.export.checkpoint import write_json, write_shard
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.post_process import global_ptq_distributed
from onecomp.post_process.base import PATCHES, records_of
from onecomp.post_process.checkpoint_job import PostProcessJob
from onecomp.post_process.gang import Gang
from onecomp.post_process.gang_job import (
    PROGRESS_FILE,
    SAMPLES_FILE,
    TEACHER_FOLDER,
    TRAINED_FILE,
    GangJob,
)
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
        ({"num_workers": -1}, "num_workers=-1: must be a whole number, at least 1"),
        ({"num_workers": 0}, r"num_workers=0: .* use GlobalPTQ \(on the command line global_ptq\)"),
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


# A gang whose workers are this process


@dataclass(frozen=True, eq=False)
class LoneGang(Gang):
    """Trains as a gang does, or fails as one does."""

    subject: Subject
    error: Exception | None = None
    num_workers = 2
    has_gpus = False
    is_one_machine = True

    def run(self, loop: str, argument: object, directory: Path) -> None:
        assert isinstance(argument, GangJob)
        assert (argument.checkpoint / "config.json").exists()
        if self.error is not None:
            raise self.error
        here = train_here(self.subject, directory / TEACHER_FOLDER)
        write_shard(directory, TRAINED_FILE, here.trained)
        found = {**asdict(here.progress), "held_bytes": here.held_bytes, "num_workers": 2}
        write_json(directory / PROGRESS_FILE, found)

    def __exit__(self, *_error: object) -> None:
        pass


def use_gang(monkeypatch: pytest.MonkeyPatch, gang: Gang) -> None:
    monkeypatch.setattr(global_ptq_distributed, "default_gang", lambda _request: gang)


def test_after_an_error_the_copy_of_the_model_is_gone_and_nothing_else(
    subject: Subject, tmp_path, monkeypatch
):
    use_gang(monkeypatch, LoneGang(subject, OneCompError("training failed")))
    (tmp_path / "mine").write_text("stays")
    model = subject.load()
    with pytest.raises(OneCompError, match="training failed"):
        subject.process(output_dir=str(tmp_path)).run(model, subject.model_config)
    assert (tmp_path / "mine").read_text() == "stays"
    left = [path.name for path in (tmp_path / "training-0001").iterdir()]
    assert left == [SAMPLES_FILE]
    assert records_of(model) == []


@pytest.fixture
def silent_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling of the curves fails, as without a connection."""

    def report(*_arguments: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(global_ptq_distributed, "report_history", report)


@pytest.mark.usefixtures("silent_integration")
def test_an_error_of_an_integration_costs_no_live_model(
    subject: Subject, tmp_path, monkeypatch, caplog
):
    use_gang(monkeypatch, LoneGang(subject))
    model = subject.load()
    before = state_of(model)
    subject.process(output_dir=str(tmp_path)).run(model, subject.model_config)
    assert "report_to='none' did not get the curves (RuntimeError: no API key)" in caplog.text
    assert changed(before, model) == {"scales"}
    [record] = records_of(model)
    assert record["held_out_after"] < record["held_out_before"]
    assert not (tmp_path / "training-0001" / "checkpoint").exists()


@pytest.mark.usefixtures("silent_integration")
def test_an_error_of_an_integration_costs_no_checkpoint(
    subject: Subject, tmp_path, monkeypatch, caplog
):
    use_gang(monkeypatch, LoneGang(subject))
    outcome = subject.process().improve(subject.checkpoint, tmp_path, subject.model_config)
    assert "report_to='none' did not get the curves (RuntimeError: no API key)" in caplog.text
    assert outcome.executed
    assert len(list((tmp_path / PATCHES).iterdir())) == 2


# From a checkpoint to a checkpoint


def test_a_checkpoint_has_its_own_directory(subject: Subject, tmp_path):
    process = subject.process(output_dir=str(tmp_path / "mine"))
    job = PostProcessJob(subject.checkpoint, tmp_path / "out", process, subject.model_config)
    with pytest.raises(ConfigError, match="in the run directory beside --output") as caught:
        job.run()
    assert f"output_dir='{tmp_path / 'mine'}'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "is_same"),
    [
        ({"address": "head:6379"}, True),
        ({"logging_steps": 7}, True),
        ({"max_failures": 0}, True),
        ({"report_to": "none", "output_dir": "shared"}, True),
        ({"save_strategy": "steps", "save_steps": 5}, True),
        ({"num_workers": 1}, False),
        ({"teacher": "sharded"}, False),
        ({"epochs": 3}, False),
    ],
)
def test_what_the_result_depends_on_makes_another_job(
    subject: Subject, tmp_path, settings, is_same
):
    jobs = [
        PostProcessJob(subject.checkpoint, tmp_path / "out", process, subject.model_config)
        for process in (subject.process(report_to=[]), subject.process(**settings))
    ]
    assert (jobs[0].record() == jobs[1].record()) is is_same


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
    before = state_of(model)
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
    before = state_of(model)
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
    assert changed(state_of(model), loaded) == set()
