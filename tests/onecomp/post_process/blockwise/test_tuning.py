"""Spans of blocks over any number of workers, and after the loss of one."""

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gang_subjects import Subject
from sabotage import SabotagedExecutor, Traps
from safetensors.torch import load_file
from shared_cluster import FirstWorkers

from onecomp import BlockWisePTQ
from onecomp.executor import Executor, LocalExecutor
from onecomp.post_process.base import PATCHES
from onecomp.post_process.blockwise import process as process_module
from onecomp.post_process.blockwise.span import Rates
from onecomp.post_process.blockwise.student_blocks import Patches
from onecomp.post_process.blockwise.tuner import sample_positions, shards_of
from onecomp.post_process.blockwise.tuning import Phase, SpanReport, Tuning
from onecomp.post_process.latents import LatentRates

DEFAULT = BlockWisePTQ()


def process_for(subject: Subject, **settings: object) -> BlockWisePTQ:
    defaults = {
        "calibration_config": subject.text,
        "epochs": 2,
        "gptq_lr": 3e-3,
        "gptq_optimize_intweight": True,
        "cbq_enable": True,
        "num_workers": 0,
    }
    return BlockWisePTQ(**{**defaults, **settings})


def tuning_of(subject: Subject, executor: Executor, work: Path, **settings: object) -> Tuning:
    process = process_for(subject, **settings)
    samples = process._samples(subject.model_config)
    patches = Patches(work / PATCHES)
    return process._tuning(executor, subject.checkpoint, patches, subject.model_config, samples)


def files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work / PATCHES).glob("*.safetensors")}


@pytest.fixture(scope="module")
def by_one(subject_of, tmp_path_factory) -> tuple[dict[str, bytes], tuple[float, float]]:
    """Patches and judgement of one worker."""
    work = tmp_path_factory.mktemp("one")
    judgement = tuning_of(subject_of("gptq"), LocalExecutor(1), work).run()
    assert len(files(work)) == 4
    return files(work), judgement


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_any_number_of_workers_gives_the_same_bytes(num_workers, by_one, subject_of, tmp_path):
    judgement = tuning_of(subject_of("gptq"), LocalExecutor(num_workers), tmp_path).run()
    assert (files(tmp_path), judgement) == by_one


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 3])
def test_ray_workers_give_the_same_bytes(num_workers, by_one, ray_executor, subject_of, tmp_path):
    executor = FirstWorkers(ray_executor, num_workers)
    judgement = tuning_of(subject_of("gptq"), executor, tmp_path).run()
    assert (files(tmp_path), judgement) == by_one


def test_finished_spans_are_not_trained_again(by_one, subject_of, tmp_path):
    tuning = tuning_of(subject_of("gptq"), LocalExecutor(1), tmp_path)
    tuning.run()
    told = [dataclasses.replace(report, seconds=0.0) for report in tuning.reports]
    kept, *others = sorted((tmp_path / PATCHES).glob("*.safetensors"))
    stamp = kept.stat().st_mtime_ns
    for path in [*others, *(tmp_path / PATCHES).glob("verdict-*")]:
        path.unlink()
    again = tuning_of(subject_of("gptq"), LocalExecutor(2), tmp_path)
    judgement = again.run()
    assert (files(tmp_path), judgement) == by_one
    assert kept.stat().st_mtime_ns == stamp
    assert [dataclasses.replace(report, seconds=0.0) for report in again.reports] == told


@pytest.fixture
def trapping(ray_executor, tmp_path) -> Iterator[SabotagedExecutor]:
    del ray_executor  # the cluster
    executor = SabotagedExecutor(2)
    executor.traps = Traps(tmp_path / "traps")
    yield executor
    executor.end()


@pytest.mark.ray
@pytest.mark.parametrize("calls", [3, 70, 100])
def test_a_killed_worker_changes_nothing(calls, trapping, by_one, subject_of, tmp_path):
    """In each of the three phases: a span takes 32 calls."""
    trapping.traps.set("gradients", signal.SIGKILL, calls=calls)
    judgement = tuning_of(subject_of("gptq"), trapping, tmp_path).run()
    assert trapping.traps.left == []
    assert (files(tmp_path), judgement) == by_one


def test_workers_are_let_go_after_an_error(subject_of, monkeypatch):
    stopped = []

    class Broken(LocalExecutor):
        def start(self, make_worker: Callable[..., object], *arguments: object) -> None:
            raise RuntimeError("broken")

        def stop(self) -> None:
            stopped.append(True)

    monkeypatch.setattr(process_module, "default_executor", lambda *_, **__: Broken(1))
    subject = subject_of("gptq")
    with pytest.raises(RuntimeError, match="broken"):
        process_for(subject).run(subject.load(), subject.model_config)
    assert stopped == [True]


def decisions_only(kind: str) -> Rates:
    """The default learning rates of codes and signs; nothing else is trained."""
    return Rates(
        codes_scale=0.0,
        signs_scale=0.0,
        latents=LatentRates(
            codes=DEFAULT.gptq_intweight_lr if kind == "gptq" else 0.0,
            signs=DEFAULT.lr,
            smoothing=DEFAULT.k_smooth,
        ),
        zero_points=0.0,
    )


@pytest.mark.parametrize(("kind", "epochs"), [("gptq", 10), ("dbf", 10), ("onebit", 10)])
def test_the_loss_falls_because_decisions_change(kind, epochs, subject_of, tmp_path):
    subject = subject_of(kind)
    tuning = tuning_of(subject, LocalExecutor(1), tmp_path)
    tuning.phases = [
        Phase(number=0, span=1, starts=range(2), epochs=epochs, rates=decisions_only(kind))
    ]
    tuning.run()

    reports: list[SpanReport] = tuning.reports
    assert len(reports) == 2
    for report in reports:
        assert report.after < 0.98 * report.before
        assert 0.001 * report.decisions < report.changed < 0.5 * report.decisions
    original = load_file(next(subject.checkpoint.glob("model*00001*.safetensors")))
    for path in (tmp_path / PATCHES).glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            kept = name.endswith(("scales", "qzeros", "g_idx", ".a", ".b")) or "scaling" in name
            if name in original:
                assert torch.equal(tensor, original[name]) == kept


@pytest.mark.parametrize(("answering_blocks", "spans"), [(1, [0, 1, 2]), (2, [0, 1]), (9, [0])])
def test_the_last_blocks_are_trained_for_the_answers_of_the_model(
    answering_blocks, spans, subject_of, tmp_path
):
    settings = {"epochs": 4, "cbq_enable": False, "answering_blocks": answering_blocks}
    tuning = tuning_of(subject_of("gptq"), LocalExecutor(2), tmp_path, **settings)
    before, after = tuning.run()

    assert [report.first for report in tuning.reports] == spans
    last = tuning.reports[-1]
    assert last.after < 0.98 * last.before
    assert last.decisions == 0
    assert last.after == pytest.approx(after, rel=1e-3)
    if spans == [0]:
        assert last.before == pytest.approx(before, rel=1e-3)


def test_a_phase_that_helps_nothing_is_undone_and_stays_so(subject_of, tmp_path, monkeypatch):
    judgements = [(1.0, 0.8), (1.0, 0.9), (1.0, 0.8)]
    monkeypatch.setattr(Tuning, "_judge_model", lambda _tuning: judgements.pop(0))
    subject = subject_of("gptq")
    tuning = tuning_of(subject, LocalExecutor(1), tmp_path)
    assert tuning.run() == (1.0, 0.8)
    assert sorted(files(tmp_path)) == ["phase0-00000.safetensors", "phase0-00001.safetensors"]

    taken_back = tmp_path / PATCHES / "phase2-00002.safetensors"
    taken_back.write_bytes(b"left by an interruption between verdict and removal")
    again = tuning_of(subject, LocalExecutor(1), tmp_path)
    assert again.run() == (1.0, 0.8)
    assert not taken_back.exists()
    assert again.undone == {1, 2}
    assert {report.phase for report in again.reports} == {0, 1, 2}


def test_a_finished_tuning_stays_as_it_is(by_one, subject_of, tmp_path):
    subject = subject_of("gptq")
    first = tuning_of(subject, LocalExecutor(1), tmp_path)
    assert (first.run(), first.undone) == (by_one[1], set())
    again = tuning_of(subject, LocalExecutor(1), tmp_path)
    again.executor = None  # nothing is left to do
    assert (again.run(), again.undone) == (by_one[1], set())
    assert files(tmp_path) == by_one[0]


@pytest.mark.parametrize("phase", [0, 2])
def test_an_interruption_before_a_judgement_changes_nothing(
    phase, by_one, subject_of, tmp_path, monkeypatch
):
    subject = subject_of("gptq")
    judge = Tuning._judge_model

    def interrupted(tuning: Tuning) -> tuple[float, float]:
        if tuning.reports[-1].phase == phase:
            raise KeyboardInterrupt
        return judge(tuning)

    with monkeypatch.context() as patched:
        patched.setattr(Tuning, "_judge_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuning_of(subject, LocalExecutor(1), tmp_path).run()
    again = tuning_of(subject, LocalExecutor(1), tmp_path)
    assert (again.run(), again.undone) == (by_one[1], set())
    assert files(tmp_path) == by_one[0]


@pytest.mark.parametrize(("answering_blocks", "spans"), [(1, [0, 1]), (2, [0, 1]), (9, [0])])
def test_blocks_without_quantized_layers_stay_and_all_others_are_trained(
    answering_blocks, spans, subject_of, tmp_path
):
    settings = {"cbq_enable": False, "answering_blocks": answering_blocks}
    tuning = tuning_of(subject_of("gptq"), LocalExecutor(1), tmp_path, **settings)
    tuning.trainable = [0, 1]
    tuning.run()
    assert [report.first for report in tuning.reports] == spans


def test_every_sample_is_seen_once_an_epoch():
    shards = shards_of(torch.zeros(10, 4).long(), torch.zeros(2, 4).long(), 4)
    assert [len(shard.train) for shard in shards] == [3, 3, 2, 2]
    steps = sample_positions(shards, seed=0, epoch=1)
    seen = [(shard, position) for step in steps for shard, position in step.items()]
    assert sorted(seen) == [(s.index, p) for s in shards for p in range(len(s.train))]
    assert steps != sample_positions(shards, seed=0, epoch=2)
    assert steps == sample_positions(shards, seed=0, epoch=1)
