"""Whether a run fits: one sentence with numbers where it does not, settings that really would."""

import re
from dataclasses import replace

import pytest

from onecomp.calibration import CalibrationConfig
from onecomp.errors import InputError
from onecomp.job import QuantizationJob
from onecomp.models import ModelConfig
from onecomp.planning.fit import (
    remedies,
    require_fit,
    resources_of_kind,
    shortages,
)
from onecomp.planning.hardware import load_table
from onecomp.planning.request import Place, estimate_job
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ
from onecomp.resources import Resources, WorkerResources, resources_here
from onecomp.session import Session

GIB = 2**30
ROOMY = Resources((WorkerResources("worker 0", 1000 * GIB, 1000 * GIB),), 1000 * GIB, 1000 * GIB)


@pytest.fixture
def large(llama_405b, estimate_of):
    return estimate_of(llama_405b, gpu="H100", num_workers=8)


def test_a_run_that_fits_passes(large):
    require_fit(large, ROOMY)
    assert remedies(large, ROOMY) == []


def test_what_is_not_known_is_not_checked(large):
    require_fit(large, Resources((WorkerResources("worker 0", None, None),)))


def test_too_little_gpu_memory_is_refused_in_one_sentence(large):
    small = WorkerResources("worker 5 on node 10.0.0.7", 80 * GIB, 1000 * GIB)
    with pytest.raises(InputError) as caught:
        require_fit(large, replace(ROOMY, workers=(*ROOMY.workers, small)), load_table())
    message = str(caught.value)
    needed = large.memory.device_bytes / GIB
    assert f"needs {needed:.1f} GiB of GPU memory per worker, the smallest GPU " in message
    assert "(worker 5 on node 10.0.0.7) has 80.0 GiB; use " in message
    assert message.count(". ") == 0
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("field", "what"), [("run_disk", "run directory"), ("object_store", "object store")]
)
def test_disk_and_object_store_are_checked(large, field, what):
    with pytest.raises(InputError, match=rf"of {what}, the smallest \w+ has 1\.0 GiB"):
        require_fit(large, replace(ROOMY, **{field: GIB}))


def test_every_shortage_is_named_at_once(large):
    poor = Resources((WorkerResources("w", GIB, GIB),), GIB, GIB)
    assert len(shortages(large, poor)) == 4


def test_remedies_really_fit(llama_405b, estimate_of):
    estimate = estimate_of(llama_405b, gpu="H200", num_workers=2, samples=512)
    limited = Resources((WorkerResources("w", 141 * GIB, None),))
    found = remedies(estimate, limited)
    changed = {
        name: int(number)
        for text in found
        for name, number in re.findall(r"--([\w-]+) (\d+)", text)
    }
    assert changed
    if "num-calibration-samples" in changed:
        again = estimate_of(
            llama_405b, gpu="H200", num_workers=2, samples=changed["num-calibration-samples"]
        )
        assert shortages(again, limited) == []
    more = estimate_of(llama_405b, gpu="H200", num_workers=changed["num-workers"], samples=512)
    assert shortages(more, limited) == []
    half = estimate_of(llama_405b, gpu="H200", num_workers=changed["num-workers"] // 2, samples=512)
    assert shortages(half, limited) != []  # the least change that helps


def test_without_a_remedy_the_message_still_says_what_is_missing(large):
    with pytest.raises(InputError, match="use a smaller model or more memory"):
        require_fit(large, replace(ROOMY, run_disk=GIB))


def test_this_process_knows_its_memory_and_disk(tmp_path):
    here = resources_here(tmp_path / "not" / "there" / "yet")
    [process] = here.workers
    assert process.host_memory > GIB / 4
    assert here.run_disk > 0


@pytest.mark.parametrize("qep", [QEPConfig(), None])
def test_a_job_that_passed_its_checks_is_estimated_as_by_plan(
    tiny_model_dir, estimate_of, text, tmp_path, qep
):
    directory, method = tiny_model_dir("llama"), GPTQ(groupsize=32, static_groups=True)
    calibration = CalibrationConfig(str(text), 64, 8, strategy="concat_chunk")
    job = QuantizationJob(ModelConfig(str(directory), dtype="auto"), method, calibration, qep)
    session = Session.open(job, tmp_path / "run")
    estimate = estimate_job(job, session.skeleton, session.samples, Place(2, gpu="CPU"))
    planned = estimate_of(
        directory, gpu="CPU", num_workers=2, samples=8, length=64, quantizer=method, qep=bool(qep)
    )
    assert estimate.memory == planned.memory
    assert estimate.work_s == planned.work_s
    require_fit(estimate, resources_here(tmp_path))


def test_a_kind_of_gpu_promises_its_memory(large):
    [worker] = resources_of_kind(large).workers
    assert (worker.device_memory, worker.host_memory) == (80 * GIB, None)
