"""A checkpoint, a process and a new checkpoint: what is made, what is refused, what goes on."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from before_after import files_of, weights_of
from gang_subjects import Subject
from safetensors.torch import load_file

from onecomp.errors import ConfigError, InputError, UserError
from onecomp.export.load import load_quantized_model
from onecomp.models import ModelConfig
from onecomp.post_process.base import PATCHES, PostQuantizationProcess, records_of
from onecomp.post_process.blockwise.process import BlockWisePTQ
from onecomp.post_process.checkpoint_job import JOB_FILE, STAGING, PostProcessJob, original_model
from onecomp.post_process.global_ptq import GlobalPTQ
from onecomp.post_process.lora.process import PostProcessLoraSFT
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.store import RUN_FILE, RunDirectory


@pytest.fixture
def blockwise(subject: Subject, tmp_path: Path) -> PostProcessJob:
    """A job that works on files, and goes on where it ended."""
    process = BlockWisePTQ(epochs=1, num_workers=0, calibration_config=subject.text)
    return PostProcessJob(subject.checkpoint, tmp_path / "out", process, subject.model_config)


@pytest.fixture
def live(blockwise: PostProcessJob, subject: Subject) -> PostProcessJob:
    """A job that trains a live model."""
    process = GlobalPTQ(epochs=1, gptq_lr=1e-4, calibration_config=subject.text)
    return replace(blockwise, process=process)


@pytest.fixture(params=["blockwise", "live"])
def job(request: pytest.FixtureRequest) -> PostProcessJob:
    """One job of each kind."""
    return request.getfixturevalue(request.param)


def patches_of(job: PostProcessJob) -> dict[str, int]:
    """Files of finished spans, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (job.work / PATCHES).iterdir()}


def copy_with(checkpoint: Path, target: Path, **values: object) -> Path:
    """A copy of a checkpoint with other values in its ``quantization_config``."""
    shutil.copytree(checkpoint, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= values
    (target / "config.json").write_text(json.dumps(config))
    return target


def refusal(job: PostProcessJob) -> str:
    """What a job that is refused says; it leaves everything as it was."""
    root = job.work.parent
    before, checkpoint = files_of(root), files_of(job.checkpoint)
    with pytest.raises(UserError) as caught:
        job.run()
    assert files_of(root) == before
    assert files_of(job.checkpoint) == checkpoint
    return str(caught.value)


# What is made


def test_the_new_checkpoint_is_better_and_says_what_was_done(job: PostProcessJob, subject: Subject):
    before = files_of(subject.checkpoint)
    entry = job.run()
    assert files_of(subject.checkpoint) == before
    assert entry["executed"]
    assert entry["held_out_after"] < entry["held_out_before"]
    assert entry["config"]["epochs"] == 1
    assert entry["config"]["calibration_config"]["max_length"] == 48

    model, tokenizer = load_quantized_model(job.output, device_map=None)
    assert records_of(model) == [entry]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert tokenizer is not None
    [event] = RunDirectory(job.work).events("post_process")
    assert {key: event[key] for key in entry} == entry
    assert files_of(job.output).keys() == before.keys()
    assert weights_of(job.output) != weights_of(subject.checkpoint)
    assert not (job.work / STAGING).exists()


def test_only_what_can_be_trained_differs(job: PostProcessJob, subject: Subject):
    job.run()
    changed = set()
    for shard in subject.checkpoint.glob("*.safetensors"):
        old, new = load_file(shard), load_file(job.output / shard.name)
        assert list(old) == list(new)
        changed |= {name for name in old if not torch.equal(old[name], new[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"scales"}


def test_a_process_that_does_not_help_leaves_the_weights(live: PostProcessJob, subject: Subject):
    entry = replace(live, process=replace(live.process, gptq_lr=10.0)).run()
    assert not entry["executed"]
    assert "no state was better on held-out samples" in entry["reason"]
    assert weights_of(live.output) == weights_of(subject.checkpoint)


def test_blocks_that_do_not_help_as_a_whole_are_rolled_back(
    blockwise: PostProcessJob, subject: Subject, monkeypatch
):
    monkeypatch.setattr(
        "onecomp.post_process.blockwise.tuning.Tuning._judge_model", lambda _: (1.0, 2.0)
    )
    entry = blockwise.run()
    assert (entry["executed"], entry["held_out_before"], entry["held_out_after"]) == (False, 1, 1)
    assert "no better on held-out samples; rolled back" in entry["reason"]
    assert patches_of(blockwise)
    assert weights_of(blockwise.output) == weights_of(subject.checkpoint)


def test_processes_follow_each_other_and_are_all_recorded(
    blockwise: PostProcessJob, live: PostProcessJob, tmp_path
):
    first = blockwise.run()
    second = replace(live, checkpoint=blockwise.output, output=tmp_path / "second").run()
    model, _ = load_quantized_model(tmp_path / "second", device_map=None)
    assert records_of(model) == [first, second]
    assert second["held_out_before"] == pytest.approx(first["held_out_after"], rel=1e-4)


def test_adapters_come_with_the_new_checkpoint(blockwise: PostProcessJob, text: Path, subject):
    process = PostProcessLoraSFT(
        data_files=str(text), max_length=32, max_train_samples=12, epochs=1, lr=3e-3, lora_r=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    entry = replace(blockwise, process=process).run()
    assert entry["executed"]
    adapter = {path.name for path in (blockwise.output / "adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors"}
    before = weights_of(subject.checkpoint)
    assert {name: weights_of(blockwise.output)[name] for name in before} == before


@dataclass
class Doubling(PostQuantizationProcess):
    """A user's own process, which does not record itself."""

    factor: float = 2.0

    def run(self, quantized_model, model_config):
        for module in quantized_model.modules():
            if isinstance(module, QuantLinear):
                module.scales.mul_(self.factor)


def test_a_process_of_the_users_own_is_recorded(blockwise: PostProcessJob, subject: Subject):
    entry = replace(blockwise, process=Doubling()).run()
    assert (entry["class"], entry["executed"], entry["config"]) == ("Doubling", True, {"factor": 2})
    name = "model.layers.0.self_attn.q_proj.scales"
    shard = "model-00002-of-00003.safetensors"
    old, new = load_file(subject.checkpoint / shard), load_file(blockwise.output / shard)
    assert torch.equal(new[name], old[name] * 2)


# What goes on


def test_finished_spans_stay_and_give_the_same_checkpoint(blockwise: PostProcessJob):
    blockwise.run()
    patches, weights = patches_of(blockwise), weights_of(blockwise.output)
    assert len(patches) == 6  # tensors and notes of two blocks, verdicts on two phases
    shutil.rmtree(blockwise.output)
    blockwise.run()
    assert patches_of(blockwise) == patches
    assert weights_of(blockwise.output) == weights


def test_only_spans_that_are_not_finished_are_trained(blockwise: PostProcessJob):
    blockwise.run()
    patches, weights = patches_of(blockwise), weights_of(blockwise.output)
    first, last = sorted(name for name in patches if name.endswith(".safetensors"))
    shutil.rmtree(blockwise.output)
    for name in (last, "verdict-phase2.json"):
        (blockwise.work / PATCHES / name).unlink()
    blockwise.run()
    found = patches_of(blockwise)
    assert found[first] == patches[first]
    assert found[last] != patches[last]
    assert weights_of(blockwise.output) == weights


def test_where_the_work_is_done_may_change(blockwise: PostProcessJob):
    """Its result does not depend on how many workers there are, or where."""
    blockwise.run()
    patches = patches_of(blockwise)
    shutil.rmtree(blockwise.output)
    replace(blockwise, process=replace(blockwise.process, num_workers=None)).run()
    assert patches_of(blockwise) == patches


def test_a_live_model_is_trained_again_to_the_same_bits(live: PostProcessJob):
    live.run()
    weights = weights_of(live.output)
    shutil.rmtree(live.output)
    live.run()
    assert weights_of(live.output) == weights


def test_what_was_half_written_is_written_again(job: PostProcessJob):
    """Cut off while the new checkpoint was written beside its place."""
    job.run()
    weights = weights_of(job.output)
    job.output.rename(job.work / STAGING)
    (job.work / STAGING / "config.json").unlink()
    (job.work / STAGING / "model-00002-of-00003.safetensors").write_bytes(b"half")
    job.run()
    assert weights_of(job.output) == weights


def test_what_was_half_installed_is_installed_again(job: PostProcessJob):
    """Cut off while the new checkpoint was moved to its place."""
    job.run()
    files = files_of(job.output)
    (job.work / STAGING).mkdir()
    for name in ("config.json", "model-00003-of-00003.safetensors"):
        (job.output / name).rename(job.work / STAGING / name)
    job.run()
    found = files_of(job.output)
    assert found.keys() == files.keys()
    assert weights_of(job.output) == {name: files[name] for name in weights_of(job.output)}


def test_overwrite_begins_anew(blockwise: PostProcessJob):
    blockwise.run()
    patches, weights = patches_of(blockwise), weights_of(blockwise.output)
    (blockwise.work / "left").mkdir()
    (blockwise.work / "left" / "over").touch()
    other = replace(blockwise.process, gptq_lr=5e-4)
    entry = replace(blockwise, process=other, overwrite=True).run()
    assert entry["config"]["gptq_lr"] == 5e-4
    assert all(patches_of(blockwise)[name] != patches[name] for name in patches)
    assert not (blockwise.work / "left").exists()
    assert weights_of(blockwise.output) != weights
    assert len(RunDirectory(blockwise.work).events("post_process")) == 1
    replace(blockwise, overwrite=True).run()
    assert weights_of(blockwise.output) == weights


# What is refused


def test_an_output_that_is_there_is_kept(job: PostProcessJob):
    job.run()
    said = refusal(job)
    assert f"{job.output}: already holds a checkpoint. Give another directory" in said
    assert "quantize" not in said


@pytest.mark.parametrize("change", ["process", "checkpoint", "model"])
def test_a_run_directory_of_another_job_is_not_continued(
    blockwise: PostProcessJob, tmp_path, change
):
    blockwise.run()
    shutil.rmtree(blockwise.output)
    copied = copy_with(blockwise.checkpoint, tmp_path / "copy", note="another")
    others = {
        "process": {"process": replace(blockwise.process, gptq_lr=5e-4)},
        "checkpoint": {"checkpoint": copied},
        "model": {"model_config": replace(blockwise.model_config, dtype="bfloat16")},
    }
    said = refusal(replace(blockwise, **others[change]))
    assert f"{blockwise.work}: belongs to another post-process" in said
    assert "Give another --output, or --overwrite to begin anew." in said


def test_a_run_directory_of_quantizing_is_not_used(job: PostProcessJob):
    job.work.mkdir()
    (job.work / RUN_FILE).write_text("{}")
    said = refusal(job)
    assert f"{job.work}: belongs to" in said
    assert "Give another --output" in said


def test_a_directory_without_a_configuration_is_refused(job: PostProcessJob, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal(replace(job, checkpoint=tmp_path / "empty"))
    assert said == f"{tmp_path / 'empty'}: holds no config.json: it is no checkpoint."


def test_a_model_that_is_not_quantized_is_refused(job: PostProcessJob):
    model = job.model_config.source.directory
    said = refusal(replace(job, checkpoint=model))
    assert f"{model}: is not quantized: it has no layers" in said
    assert "Give the directory that `onecomp quantize` wrote." in said


def test_a_rotated_checkpoint_with_a_plain_model_is_refused(job: PostProcessJob, tmp_path):
    rotated = copy_with(job.checkpoint, tmp_path / "rotated", rotated=True)
    assert "rotated" in refusal(replace(job, checkpoint=rotated))


def test_a_checkpoint_with_adapters_is_refused(job: PostProcessJob, tmp_path):
    """They would be lost: what is trained here does not see them."""
    adapted = copy_with(job.checkpoint, tmp_path / "adapted")
    (adapted / "adapter").mkdir()
    (adapted / "adapter" / "adapter_config.json").write_text("{}")
    said = refusal(replace(job, checkpoint=adapted))
    assert f"{adapted}: has LoRA adapters" in said


@pytest.mark.parametrize("sizes", [{"hidden_size": 128}, {"num_layers": 3}])
def test_another_model_than_the_original_is_refused(
    job: PostProcessJob, tiny_model_dir, tmp_path, sizes
):
    other = ModelConfig(path=str(tiny_model_dir("llama", **sizes)), dtype="float32", device="cpu")
    said = refusal(replace(job, model_config=other))
    assert f"{other.source.directory}: is not the model that {job.checkpoint} was made of" in said


@pytest.mark.parametrize("overwrite", [False, True])
def test_neither_model_nor_checkpoint_can_be_the_output(job: PostProcessJob, tmp_path, overwrite):
    model = tmp_path / "model"
    shutil.copytree(job.model_config.source.directory, model)
    original = ModelConfig(path=str(model), dtype="float32", device="cpu")
    job = replace(job, model_config=original, overwrite=overwrite)
    for output in (model, job.checkpoint, model / "inside", job.checkpoint / "inside"):
        said = refusal(replace(job, output=output))
        assert said.startswith(f"{output}")
        assert "would lie in the model's own directory" in said


def test_an_output_that_cannot_be_a_directory_is_refused_before_any_work(
    job: PostProcessJob, tmp_path
):
    job.output.write_text("a file")
    assert f"{job.output}: cannot be a directory" in refusal(job)


def test_too_few_samples_are_refused_and_the_corrected_job_runs(job: PostProcessJob, subject):
    few = replace(subject.text, num_calibration_samples=1)
    said = refusal(replace(job, process=replace(job.process, calibration_config=few)))
    assert "1 sample(s): one is held out, so that at least 2 are needed. Raise " in said
    assert job.run()["executed"]


# The original model


def test_the_original_is_what_the_run_directory_says(subject: Subject, tmp_path):
    made = copy_with(subject.checkpoint, tmp_path / "made")
    model = str(subject.model_config.source.directory)
    for name in (JOB_FILE, RUN_FILE):
        work = tmp_path / "made.run"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (work / name).write_text(json.dumps({"model": {"id": model}}))
        found = original_model(made, None, "bfloat16", trust_remote_code=False)
        assert (found.source.directory, found.dtype) == (Path(model), "bfloat16")


def test_the_original_is_known_of_what_a_job_made(job: PostProcessJob):
    job.run()
    found = original_model(job.output, None, "auto", trust_remote_code=False)
    assert found.source.directory == job.model_config.source.directory.resolve()


def test_the_original_that_is_named_wins(subject: Subject, tiny_model_dir, tmp_path):
    other = tiny_model_dir("llama", hidden_size=128)
    found = original_model(subject.checkpoint, str(other), "auto", trust_remote_code=False)
    assert found.source.directory == other


def test_an_unknown_original_has_to_be_named(subject: Subject):
    with pytest.raises(InputError) as caught:
        original_model(subject.checkpoint, None, "auto", trust_remote_code=False)
    work = subject.checkpoint.with_name("model.run")
    assert str(caught.value) == (
        f"{subject.checkpoint}: the original model is not known: there is no run directory {work}. "
        "Name it with --model."
    )


def test_a_model_of_an_unknown_dtype_is_refused(subject: Subject):
    model = str(subject.model_config.source.directory)
    with pytest.raises(ConfigError, match="dtype='float8': must be one of"):
        original_model(subject.checkpoint, model, "float8", trust_remote_code=False)
