"""The teacher's answers: the live model's, kept in files, of one block in memory at a time."""

import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from onecomp.models import ModelConfig, Skeleton
from onecomp.post_process import teacher as teacher_module
from onecomp.post_process.distillation import TopTokens, WholeDistribution
from onecomp.post_process.teacher import (
    BYTES_OF_REST,
    BYTES_PER_TOKEN,
    KEPT_TOKENS,
    cache_bytes,
    cache_is_smaller,
    cache_teacher,
    teacher_logits,
)

CPU = torch.device("cpu")
FAMILIES = ["llama", "gemma2", "gemma3", "opt", "qwen3", "phi3"]


def config_of(directory: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(path=str(directory), dtype=dtype, device="cpu")


def draw_ids(num_samples: int = 5, length: int = 12) -> Tensor:
    return torch.randint(256, (num_samples, length), generator=torch.Generator().manual_seed(0))


def live_logits(config: ModelConfig, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return config.load_model()(input_ids=ids, use_cache=False).logits


def files_of(directory: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and time of the last change."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()
    }


@pytest.fixture
def llama(tiny_model_dir) -> ModelConfig:
    return config_of(tiny_model_dir())


@pytest.fixture
def few_kept(monkeypatch) -> int:
    """Keep so few tokens that most of a tiny vocabulary is left out."""
    monkeypatch.setattr(teacher_module, "KEPT_TOKENS", 8)
    return 8


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_live_model_says(family, tie, tiny_model_dir, few_kept, tmp_path):
    config, ids = config_of(tiny_model_dir(family, tie=tie)), draw_ids()
    logits = live_logits(config, ids)
    kept = cache_teacher(config, ids, tmp_path, device=CPU).distribution(range(len(ids)))
    expected = TopTokens.of(logits, few_kept, 1.0)
    assert torch.equal(kept.ids, expected.ids)
    torch.testing.assert_close(kept.log_probs, expected.log_probs, rtol=0, atol=4e-3)
    assert kept.log_probs.dtype == torch.float16
    assert (kept.rest > 0.01).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_computes_in_the_models_type(dtype, tiny_model_dir, tmp_path):
    config, ids = config_of(tiny_model_dir(), dtype), draw_ids()
    [found] = teacher_logits(config, ids, [[0, 1, 2, 3, 4]], CPU)
    assert found.dtype == config.torch_dtype
    assert torch.equal(found, live_logits(config, ids))


def test_every_vocabulary_is_kept_whole_if_it_is_small(llama, tmp_path):
    kept = cache_teacher(llama, draw_ids(1), tmp_path, device=CPU).distribution([0])
    assert kept.ids.shape == (1, 12, KEPT_TOKENS)
    assert (kept.rest < 0.01).all()


def test_both_forms_of_the_teacher_judge_a_student_alike(llama, tmp_path):
    ids = draw_ids()
    student = torch.randn(2, 12, 258, generator=torch.Generator().manual_seed(1))
    kept = cache_teacher(llama, ids, tmp_path, device=CPU)
    live = WholeDistribution(live_logits(llama, ids[[3, 1]]))
    found, expected = (told.divergence(student, 1.0) for told in (kept.distribution([3, 1]), live))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    swapped = kept.distribution([1, 3]).divergence(student, 1.0)
    assert not torch.allclose(swapped, expected, rtol=1e-2)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_probabilities_are_kept_at_their_temperature(temperature, llama, few_kept, tmp_path):
    ids = draw_ids()
    teacher = cache_teacher(llama, ids, tmp_path, device=CPU, temperature=temperature)
    kept = teacher.distribution(range(len(ids)))
    expected = TopTokens.of(live_logits(llama, ids), few_kept, temperature)
    assert torch.equal(kept.ids, expected.ids)
    torch.testing.assert_close(kept.log_probs, expected.log_probs, rtol=0, atol=8e-3)
    other = TopTokens.of(live_logits(llama, ids), few_kept, 1.0)
    assert not torch.allclose(kept.log_probs, other.log_probs, rtol=0, atol=8e-3)


def test_batches_do_not_change_what_is_kept(llama, few_kept, tmp_path, monkeypatch):
    ids = draw_ids()
    whole = cache_teacher(llama, ids, tmp_path / "whole", device=CPU).distribution(range(5))
    monkeypatch.setattr(teacher_module, "MICRO_BATCH_TOKENS", 24)
    batched = cache_teacher(llama, ids, tmp_path / "batched", device=CPU).distribution(range(5))
    assert torch.equal(batched.ids, whole.ids)
    torch.testing.assert_close(batched.log_probs, whole.log_probs, rtol=0, atol=4e-3)


def test_only_samples_without_a_file_are_asked_about(llama, few_kept, tmp_path):
    ids = draw_ids()
    cache_teacher(llama, ids, tmp_path, device=CPU)
    before = files_of(tmp_path)
    assert len(before) == 5
    lost = tmp_path / "000002.safetensors"
    kept = load_file(lost)
    lost.unlink()
    cache_teacher(llama, ids, tmp_path, device=CPU)
    after = files_of(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {lost.name}
    found = load_file(lost)
    assert torch.equal(found["ids"], kept["ids"])
    torch.testing.assert_close(found["log_probs"], kept["log_probs"], rtol=0, atol=4e-3)


def test_where_every_sample_has_its_file_the_model_is_not_read(tiny_model_dir, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), directory)
    config, ids = config_of(directory), draw_ids()
    _ = config.source
    cache_teacher(config, ids, tmp_path / "kept", device=CPU)
    before = files_of(tmp_path / "kept")
    for path in directory.glob("*.safetensors"):
        path.unlink()
    teacher = cache_teacher(config, ids, tmp_path / "kept", device=CPU)
    assert files_of(tmp_path / "kept") == before
    assert len(teacher.distribution([4, 0]).ids) == 2


def test_a_share_of_the_samples_can_be_asked_about(llama, few_kept, tmp_path):
    ids = draw_ids()
    shared = tmp_path / "shared"
    for samples in (range(0, 5, 2), range(1, 5, 2)):
        cache_teacher(llama, ids, shared, device=CPU, samples=samples)
        assert {f"{number:06d}.safetensors" for number in samples} <= files_of(shared).keys()
        if samples.start == 0:
            assert len(files_of(shared)) == 3
    teacher = cache_teacher(llama, ids, tmp_path / "whole", device=CPU)
    found = teacher_module.CachedTeacher(shared, CPU).distribution(range(5))
    assert torch.equal(found.ids, teacher.distribution(range(5)).ids)


def test_the_log_says_how_much_is_left_out(llama, few_kept, tmp_path, caplog):
    caplog.set_level("INFO")
    ids = draw_ids()
    teacher = cache_teacher(llama, ids, tmp_path, device=CPU)
    rest = 100 * float(teacher.distribution(range(5)).rest.mean())
    [message] = [m for m in caplog.messages if m.startswith("teacher:")]
    assert "5 samples" in message
    told = float(message.split("have ")[1].split(" %")[0])
    assert told == pytest.approx(rest, abs=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_answers_are_kept_where_they_are_smaller_than_the_model(dtype, tiny_model_dir):
    config = config_of(tiny_model_dir(), dtype)
    [path] = tiny_model_dir().glob("*.safetensors")
    num_weights = sum(tensor.numel() for tensor in load_file(path).values())
    itemsize = {"float32": 4, "float16": 2}[dtype]
    most = math.floor(num_weights * itemsize / (KEPT_TOKENS * BYTES_PER_TOKEN + BYTES_OF_REST))
    assert cache_is_smaller(config, most)
    assert not cache_is_smaller(config, most + 1)


def test_answers_take_the_bytes_that_they_are_counted_with(llama, tmp_path):
    cache_teacher(llama, draw_ids(1, 64), tmp_path, device=CPU)
    size = (tmp_path / "000000.safetensors").stat().st_size
    assert 0 <= size - cache_bytes(64) < 512


def test_one_block_of_the_model_is_held_at_a_time(tiny_model_dir, tmp_path, monkeypatch):
    load, blocks, num_alive = Skeleton.load_block, [], []

    def watched(skeleton: Skeleton, index: int, device: torch.device) -> nn.Module:
        num_alive.append(sum(block() is not None for block in blocks))
        block = load(skeleton, index, device)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(Skeleton, "load_block", watched)
    monkeypatch.setattr(ModelConfig, "load_model", None)
    config = config_of(tiny_model_dir(num_layers=4))
    cache_teacher(config, draw_ids(), tmp_path, device=CPU)
    assert num_alive == [0, 0, 0, 0]
