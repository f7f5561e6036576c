"""What the loop computes, checked against whole models and formulas written out."""

import gc
import io
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from worker_settings import worker_settings

from onecomp.calibration import CalibrationSamples
from onecomp.calibration.shards import cut_shards
from onecomp.errors import ConfigError, InputError, LayerError
from onecomp.executor import LocalExecutor
from onecomp.export.load import load_quantized_model
from onecomp.job import find_layers
from onecomp.models import ModelSource, Skeleton
from onecomp.pipeline import quantize_model
from onecomp.progress import Progress
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, QuantizationResult, Quantizer
from onecomp.quantizer.quant_linear import dense_layers
from onecomp.store import RunDirectory, StoredResults
from onecomp.worker import Worker

NUM_SHARDS = 3
PLAIN = GPTQ(wbits=4, groupsize=32)


def samples(count: int = 6, length: int = 48, seed: int = 0) -> CalibrationSamples:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (count, length), generator=generator)
    return CalibrationSamples(ids, torch.ones_like(ids))


def quantize(
    model: Path,
    run: Path,
    quantizer: Quantizer = PLAIN,
    qep: QEPConfig | None = None,
    text: CalibrationSamples | None = None,
    *,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> StoredResults:
    """Results of a run over a model directory; its checkpoint is in ``run / "checkpoint"``."""
    skeleton = Skeleton.build(ModelSource.open(model), torch.float32)
    text = samples() if text is None else text
    shards = cut_shards(text, NUM_SHARDS) if quantizer.flag_calibration else []
    settings = worker_settings(skeleton, quantizer, qep, len(shards), run)
    executor = LocalExecutor(num_workers)
    try:
        with progress or Progress(len(settings.layout.blocks), silent=True) as reported:
            quantize_model(settings, shards, executor, reported)
    finally:
        executor.stop()
    settings.writer.finish(skeleton, settings.layout.layer_names)
    return settings.run.results()


def load(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def inputs_of(model: PreTrainedModel, names: list[str], text: CalibrationSamples) -> dict:
    """Input rows of each layer, padding left out, from whole-model forward passes."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen[name].append(args[0])
        )
        for name in names
    ]
    with torch.inference_mode():
        for ids, mask in zip(text.input_ids, text.attention_mask, strict=True):
            model(input_ids=ids[None], attention_mask=mask[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    valid = text.attention_mask.bool().reshape(-1)
    return {n: torch.cat([x[0] for x in xs])[valid].float() for n, xs in seen.items()}


def codes(result: QuantizationResult) -> Tensor:
    return result.qweight


def assert_nearly_all_codes_equal(found: Mapping, expected: Mapping) -> None:
    """Sums over tokens in another order move a handful of codes that lie between two values."""
    assert list(found) == list(expected)
    for name, result in expected.items():
        differing = (codes(found[name]) != codes(result)).float().mean().item()
        assert differing < 0.005, f"{name}: {differing:.2%} of the codes"


def quantized_alone(weight: Tensor, hessian: Tensor, quantizer: GPTQ) -> QuantizationResult:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return replace(quantizer, results={}, module_to_name={}).quantize_layer(layer, None, hessian)


# Full-precision inputs


@pytest.fixture(scope="module")
def llama(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama", num_layers=3)


def test_each_layer_is_quantized_on_its_inputs_in_the_original_model(llama, tmp_path):
    found = quantize(llama, tmp_path / "run")
    model, text = load(llama), samples()
    expected = {}
    for name, rows in inputs_of(model, list(found), text).items():
        weight = model.get_submodule(name).weight.data
        expected[name] = quantized_alone(weight, 2 / len(rows) * rows.T @ rows, PLAIN)
    assert len(found) == 3 * 7
    assert_nearly_all_codes_equal(found, expected)


def test_padding_does_not_count(llama, tmp_path):
    text = samples(count=3)
    ids = torch.cat([text.input_ids, torch.full((3, 20), 7)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, 48:] = 0
    plain = quantize(llama, tmp_path / "plain", text=text)
    padded = quantize(llama, tmp_path / "padded", text=CalibrationSamples(ids, mask))
    assert_nearly_all_codes_equal(padded, plain)
    as_text = CalibrationSamples(ids, torch.ones_like(ids))
    counted = quantize(llama, tmp_path / "counted", text=as_text)
    name = "model.layers.2.mlp.down_proj"
    assert (codes(counted[name]) != codes(plain[name])).float().mean() > 0.01


# Error propagation


def reference(
    model: Path, quantizer: GPTQ, qep: QEPConfig, text: CalibrationSamples
) -> dict[str, QuantizationResult]:
    """Error propagation as its paper has it: group after group, everything computed anew."""
    original, changed = load(model), load(model)
    skeleton = Skeleton.build(ModelSource.open(model), torch.float32)
    results = {}
    for block in find_layers(quantizer, skeleton).blocks:
        for group in block.groups:
            first = group.layer_names[0]
            X = inputs_of(original, [first], text)[first].double()
            X_hat = inputs_of(changed, [first], text)[first].double()
            H = 2 / len(X) * X_hat.T @ X_hat
            C = 2 / len(X) * (X - X_hat).T @ X_hat
            damped = H + qep.percdamp * H.diagonal().mean() * torch.eye(len(H))
            for name in group.layer_names:
                W = original.get_submodule(name).weight.data.double()
                if not any(key in name for key in qep.exclude_layer_keywords):
                    W = W + qep.perccorr * torch.linalg.solve(damped, W @ C, left=False)
                results[name] = quantized_alone(W.float(), H.float(), quantizer)
            for name in group.layer_names:
                changed.get_submodule(name).weight.data = results[name].dequantize()
    return results


@pytest.mark.parametrize("perccorr", [0.5, 1.0])
def test_error_propagation_follows_its_formula(llama, tmp_path, perccorr):
    qep, text = QEPConfig(perccorr=perccorr), samples()
    found = quantize(llama, tmp_path / "run", qep=qep, text=text)
    # Each code that tips over moves everything behind it: the first blocks are compared.
    expected = reference(llama, replace(PLAIN, num_layers=7, results={}), qep, text)
    assert len(expected) == 7
    assert_nearly_all_codes_equal({name: found[name] for name in expected}, expected)


def test_without_correction_layers_are_quantized_on_what_quantized_layers_produce(llama, tmp_path):
    qep, text = QEPConfig(perccorr=0.0), samples()
    found = quantize(llama, tmp_path / "run", qep=qep, text=text)
    original, changed = load(llama), load(llama)
    names = list(found)
    for name in names:
        changed.get_submodule(name).weight.data = found[name].dequantize()
    rows = inputs_of(changed, names, text)  # of any layer: nothing behind it changes its inputs
    expected = {
        name: quantized_alone(original.get_submodule(name).weight.data, 2 / len(x) * x.T @ x, PLAIN)
        for name, x in rows.items()
    }
    assert_nearly_all_codes_equal(found, expected)


def test_error_propagation_brings_the_model_closer_to_the_original(llama, tmp_path):
    text, unseen = samples(count=48), samples(count=4, seed=9)
    quantizer = GPTQ(wbits=3, groupsize=32)
    model = load(llama)
    with torch.inference_mode():
        wanted = model(input_ids=unseen.input_ids).logits
    errors = {}
    for name, qep in (("plain", None), ("propagated", QEPConfig(perccorr=1.0))):
        results = quantize(llama, tmp_path / name, quantizer, qep, text)
        for layer in results:
            model.get_submodule(layer).weight.data = results[layer].dequantize()
        with torch.inference_mode():
            errors[name] = (model(input_ids=unseen.input_ids).logits - wanted).square().mean()
    assert errors["propagated"] < 0.95 * errors["plain"]


# Other methods, other selections


def test_round_to_nearest_needs_no_text(llama, tmp_path):
    quantizer = RTN(wbits=4, groupsize=32)
    found = quantize(llama, tmp_path / "run", quantizer)
    model = load(llama)
    for name in found:
        layer = model.get_submodule(name)
        expected = quantizer.quantize_layer(layer)
        assert torch.equal(found[name].dequantize(), expected.dequantize()), name
    assert len(found) == 21


@dataclass
class Halving(Quantizer):
    """A user's own method: every weight to a multiple of 1/8, with ``quantize_layer`` alone."""

    def quantize_layer(self, module, input=None, hessian=None):  # noqa: A002
        return (module.weight.data * 8).round() / 8


@dataclass
class ByHessian(Quantizer):
    """A user's method that wants the Hessian: keeps the columns with the largest inputs."""

    flag_calibration: bool = True
    flag_hessian: bool = True

    def quantize_layer(self, module, input=None, hessian=None):  # noqa: A002
        diagonal = hessian.diagonal()
        return module.weight.data * (diagonal >= diagonal.median())


def test_a_method_of_the_user_runs_and_is_exported_dequantized(llama, tmp_path):
    found = quantize(llama, tmp_path / "run", Halving())
    original = load(llama)
    loaded, _ = load_quantized_model(tmp_path / "run" / "checkpoint")
    for name in found:
        weight = original.get_submodule(name).weight
        assert torch.equal(loaded.get_submodule(name).weight, (weight * 8).round() / 8)
    assert len(found) == 21


def test_a_method_of_the_user_gets_the_hessian(llama, tmp_path):
    found = quantize(llama, tmp_path / "run", ByHessian())
    name = "model.layers.1.mlp.down_proj"
    rows = inputs_of(load(llama), [name], samples())[name]
    energies = rows.square().sum(dim=0)
    kept = found[name].dequantize().abs().sum(dim=0) > 0
    assert torch.equal(kept, energies >= energies.median())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_and_loads_with_the_same_logits(tiny_model_dir, tmp_path, family):
    directory = tiny_model_dir(family)
    found = quantize(directory, tmp_path / "run", qep=QEPConfig(), num_workers=2)
    model, ids = load(directory), samples(count=2, seed=3).input_ids
    assert len(found) == sum(type(m) is nn.Linear for m in model.modules()) - 1
    for name in found:
        model.get_submodule(name).weight.data = found[name].dequantize()
    loaded, _ = load_quantized_model(tmp_path / "run" / "checkpoint")
    with torch.inference_mode(), dense_layers(loaded, torch.float32):
        logits = loaded(input_ids=ids).logits
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_num_layers_takes_the_first(llama, tmp_path):
    found = quantize(llama, tmp_path / "run", GPTQ(groupsize=32, num_layers=9))
    assert len(found) == 9
    assert all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in found)
    config = load_quantized_model(tmp_path / "run" / "checkpoint")[0].config
    assert config.num_hidden_layers == 3


@pytest.mark.parametrize("qep", [None, QEPConfig()])
def test_blocks_without_targets_are_passed_and_kept(llama, tmp_path, qep):
    quantizer = GPTQ(groupsize=32, include_layer_keywords=["layers.1.mlp"])
    found = quantize(llama, tmp_path / "run", quantizer, qep)
    assert {name.rsplit(".", 1)[1] for name in found} == {"gate_proj", "up_proj", "down_proj"}
    loaded, _ = load_quantized_model(tmp_path / "run" / "checkpoint")
    original = load(llama)
    for block in (0, 2):
        name = f"model.layers.{block}.mlp.down_proj.weight"
        assert torch.equal(loaded.get_parameter(name), original.get_parameter(name))


@pytest.mark.parametrize("qep", [None, QEPConfig()])
def test_several_blocks_without_targets_are_stored_one_after_the_other(llama, tmp_path, qep):
    quantizer = GPTQ(groupsize=32, include_layer_keywords=["layers.2.mlp"])
    assert len(quantize(llama, tmp_path / "run", quantizer, qep)) == 3
    events = RunDirectory(tmp_path / "run").events("block")
    assert [event["block"] for event in events] == [0, 1, 2]


def test_a_named_layer_outside_the_blocks_is_refused(llama, tmp_path):
    quantizer = GPTQ(groupsize=32, include_layer_names=["lm_head"], exclude_layer_names=[])
    with pytest.raises(ConfigError, match="lm_head lies outside the decoder blocks"):
        quantize(llama, tmp_path / "run", quantizer)


# Blocks that are finished already


def test_the_pace_is_that_of_new_blocks_whatever_is_replayed_between_them(
    tiny_model_dir, tmp_path, monkeypatch, caplog
):
    """Blocks 0 and 2 of 5 are there. Replaying takes 6000 s, quantizing one of 4 groups 15 s."""
    model, run = tiny_model_dir("llama", num_layers=5), tmp_path / "run"
    expected = dict(quantize(model, run, qep=QEPConfig()))
    for block in (1, 3, 4):
        RunDirectory(run).block_path(block).unlink()
    seconds = []

    def taking(method: str, duration: float) -> None:
        original = getattr(Worker, method)

        def slow(self: Worker, *arguments: object) -> object:
            seconds.append(duration)
            return original(self, *arguments)

        monkeypatch.setattr(Worker, method, slow)

    taking("replay_block", 6000.0)
    taking("quantize", 15.0)
    with caplog.at_level("INFO", "onecomp.progress"):
        progress = Progress(5, 2, stream=io.StringIO(), clock=lambda: sum(seconds))
        found = quantize(model, run, qep=QEPConfig(), progress=progress)
    lines = [record.message for record in caplog.records if record.name == "onecomp.progress"]
    etas = [float(re.search(r"eta +([\d.]+) min", line)[1]) for line in lines]
    assert etas == pytest.approx([2.0, 1.0, 0.0], abs=0.6)  # the next block has begun by then
    assert sum(seconds) == 2 * 6000 + 12 * 15
    for name, result in expected.items():
        assert torch.equal(codes(found[name]), codes(result)), name


# Errors and memory


def with_weight(model: Path, target: Path, name: str, change: Callable[[Tensor], None]) -> Path:
    """A copy of a model directory with one tensor changed."""
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("qep", [None, QEPConfig()])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_weight_that_is_not_finite_stops_the_run_with_its_name(llama, tmp_path, qep, num_workers):
    name = "model.layers.1.self_attn.k_proj"
    broken = with_weight(
        llama, tmp_path / "model", f"{name}.weight", lambda t: t[0, :3].fill_(torch.nan)
    )
    with pytest.raises(LayerError, match=f"{name}: its weight holds 3 NaN") as caught:
        quantize(broken, tmp_path / "run", qep=qep, num_workers=num_workers)
    assert caught.value.layer_name == name


def test_inputs_that_are_not_finite_stop_the_run_with_the_first_layer_that_saw_them(
    llama, tmp_path
):
    norm = "model.layers.1.post_attention_layernorm.weight"
    broken = with_weight(llama, tmp_path / "model", norm, lambda t: t[5].fill_(torch.inf))
    with pytest.raises(LayerError, match="its calibration inputs hold NaN or infinite") as caught:
        quantize(broken, tmp_path / "run")
    assert caught.value.layer_name == "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize("qep", [None, QEPConfig()])
def test_the_caller_learns_the_cause_and_not_what_followed(llama, tmp_path, qep, monkeypatch):
    def load_block(self: Skeleton, index: int, device: torch.device) -> nn.Module:
        if index == 1:
            raise InputError("weights", "went away")
        return original(self, index, device)

    original = Skeleton.load_block
    monkeypatch.setattr(Skeleton, "load_block", load_block)
    with pytest.raises(InputError, match=re.escape("weights: went away")):
        quantize(llama, tmp_path / "run", qep=qep)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Only what nothing refers to is freed, at once: no cycle may keep a block in memory."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(("qep", "most"), [(None, 2), (QEPConfig(), 3)])
def test_a_worker_holds_the_block_in_work_and_the_one_read_ahead(
    tiny_model_dir, tmp_path, monkeypatch, qep, most
):
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    counts = []

    def load_block(self: Skeleton, index: int, device: torch.device) -> nn.Module:
        block = original(self, index, device)
        alive.add(block)
        counts.append(len(alive))
        return block

    original = Skeleton.load_block
    monkeypatch.setattr(Skeleton, "load_block", load_block)
    with without_garbage_collection():
        quantize(tiny_model_dir("llama", num_layers=6), tmp_path / "run", qep=qep)
        assert max(counts) <= most
        assert len(alive) == 0
