"""A patched checkpoint differs from the one it was made of in what was patched, and its record."""

import json
from pathlib import Path

import pytest
import torch
from before_after import files_of
from gang_subjects import Subject
from safetensors.torch import load_file
from torch import Tensor

from onecomp.errors import InputError
from onecomp.export.checkpoint import CONFIG, METADATA, read_header, write_shard
from onecomp.export.load import load_quantized_model
from onecomp.post_process.base import PATCHES, PROCESSES_KEY
from onecomp.post_process.patching import patch_checkpoint, patch_live, patches_in
from onecomp.quantizer.quant_linear import QuantLinear

FIRST = "model.layers.0.self_attn.q_proj"
LAST = "model.layers.1.mlp.down_proj"
ENTRY = {"name": "test", "executed": True}
OTHER = {"name": "other", "executed": False}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    shards = sorted(directory.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def patch(work: Path, name: str, **factors: float) -> dict[str, Tensor]:
    """Write a patch file with constant scales of some layers."""
    layers = {"first": FIRST, "last": LAST}
    shape = {"first": (2, 64), "last": (4, 64)}  # two and four groups of 32 inputs
    tensors = {
        f"{layers[key]}.scales": torch.full(shape[key], value, dtype=torch.float16)
        for key, value in factors.items()
    }
    write_shard(work / PATCHES, name, tensors)
    return tensors


def without(shard: Path, patched: set[str]) -> tuple[dict, bytes]:
    """Header of a shard, and its bytes with zeros in place of some tensors."""
    content, header = bytearray(shard.read_bytes()), read_header(shard)
    start = 8 + int.from_bytes(content[:8], "little")
    for name in patched & (header.keys() - {METADATA}):
        first, end = header[name]["data_offsets"]
        content[start + first : start + end] = bytes(end - first)
    return header, bytes(content)


def test_patched_tensors_are_replaced_and_every_other_byte_stays(subject: Subject, tmp_path):
    patched = patch(tmp_path, "a.safetensors", first=0.5, last=0.25)
    before = files_of(subject.checkpoint)
    patch_checkpoint(subject.checkpoint, tmp_path, tmp_path / "out", ENTRY)
    assert files_of(subject.checkpoint) == before

    found, original = tensors_of(tmp_path / "out"), tensors_of(subject.checkpoint)
    for name, tensor in patched.items():
        assert torch.equal(found[name], tensor)
        assert not torch.equal(original[name], tensor)
    after = files_of(tmp_path / "out")
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]} - {CONFIG}
    assert changed == {f"model-0000{number}-of-00003.safetensors" for number in (2, 3)}
    for name in changed:
        was = without(subject.checkpoint / name, set(patched))
        assert without(tmp_path / "out" / name, set(patched)) == was


def test_without_patches_only_the_record_is_added(subject: Subject, tmp_path):
    patch_checkpoint(subject.checkpoint, tmp_path, tmp_path / "out", ENTRY)
    before, after = files_of(subject.checkpoint), files_of(tmp_path / "out")
    old, new = json.loads(before.pop(CONFIG)), json.loads(after.pop(CONFIG))
    assert after == before
    assert new["quantization_config"].pop(PROCESSES_KEY) == [ENTRY]
    assert new == old


def test_later_patches_replace_earlier_ones_tensor_by_tensor(subject: Subject, tmp_path):
    patch(tmp_path, "phase1-00000.safetensors", first=0.75)
    earlier = patch(tmp_path, "phase0-00001.safetensors", first=0.5, last=0.25)
    assert [path.name[:6] for path in patches_in(tmp_path)] == ["phase0", "phase1"]
    patch_checkpoint(subject.checkpoint, tmp_path, tmp_path / "out", ENTRY)
    found = tensors_of(tmp_path / "out")
    assert found[f"{FIRST}.scales"].unique().tolist() == [0.75]
    assert torch.equal(found[f"{LAST}.scales"], earlier[f"{LAST}.scales"])


def test_a_live_model_is_patched_as_its_checkpoint_is(subject: Subject, tmp_path):
    patch(tmp_path, "a.safetensors", first=0.5, last=0.25)
    patch(tmp_path, "b.safetensors", first=0.75)
    patch_checkpoint(subject.checkpoint, tmp_path, tmp_path / "out", ENTRY)
    expected, _ = load_quantized_model(tmp_path / "out", device_map=None)
    live = subject.load()
    layers = {name: m for name, m in live.named_modules() if isinstance(m, QuantLinear)}
    place = layers[FIRST].state_dict()["scales"].data_ptr()
    patch_live(layers, tmp_path)
    assert layers[FIRST].state_dict()["scales"].data_ptr() == place
    state = live.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_records_are_kept_in_order(subject: Subject, tmp_path):
    patch_checkpoint(subject.checkpoint, tmp_path, tmp_path / "once", ENTRY)
    patch_checkpoint(tmp_path / "once", tmp_path, tmp_path / "twice", OTHER)
    config = json.loads((tmp_path / "twice" / CONFIG).read_text())
    assert config["quantization_config"][PROCESSES_KEY] == [ENTRY, OTHER]


def test_the_configuration_without_which_it_is_no_checkpoint_comes_last(
    subject: Subject, tmp_path, monkeypatch
):
    """Cut off in front of every file in turn, it leaves none."""
    rename, left = Path.replace, 0

    def cut_off(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", cut_off)
    names = [path.name for path in subject.checkpoint.iterdir() if path.is_file()]
    for count in range(len(names)):
        left, output = count, tmp_path / f"out{count}"
        with pytest.raises(KeyboardInterrupt):
            patch_checkpoint(subject.checkpoint, tmp_path, output, ENTRY)
        assert not (output / CONFIG).exists()
        assert len(list(output.glob("[!.]*"))) == count


def test_a_model_that_is_not_quantized_is_refused_before_anything_is_written(
    subject: Subject, tmp_path
):
    model = subject.model_config.source.directory
    with pytest.raises(InputError, match="is not a quantized checkpoint"):
        patch_checkpoint(model, tmp_path, tmp_path / "out", ENTRY)
    assert not (tmp_path / "out").exists()
