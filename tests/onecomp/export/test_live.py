"""A live quantized model, written and read back: the same model, in the files of a checkpoint."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from before_after import files_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from onecomp.calibration import CalibrationConfig
from onecomp.errors import InputError
from onecomp.executor import LocalExecutor
from onecomp.export.checkpoint import ADAPTER_FOLDER, CONFIG, INDEX, TOKENIZER_CONFIG
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.models import ModelConfig
from onecomp.post_process.lora.process import PostProcessLoraSFT
from onecomp.quantizer import DBF, GPTQ, Onebit, Quantizer
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.runner import Runner

IDS = torch.arange(24)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"
METHODS: dict[str, Callable[[], Quantizer]] = {
    "gptq": lambda: GPTQ(wbits=3, groupsize=32),
    "gptq in order of activation": lambda: GPTQ(wbits=3, groupsize=32, actorder=True),
    "gptq asymmetric": lambda: GPTQ(wbits=3, groupsize=32, sym=False),
    "dbf": lambda: DBF(target_bits=1.2, iters=4),
    "onebit": lambda: Onebit(iters=2),
}
MODELS: dict[str, dict[str, object]] = {
    "llama": {"family": "llama"},
    "tied": {"family": "llama", "tie": True},
    "biased": {"family": "qwen2", "tie": True, "dtype": torch.bfloat16},
}
CASES = [
    ("gptq", "llama"),
    ("gptq", "biased"),
    ("gptq in order of activation", "tied"),
    ("gptq asymmetric", "llama"),
    ("dbf", "tied"),
    ("onebit", "biased"),
]


@dataclass(frozen=True, eq=False)
class Saved:
    """A live model that was written; and the checkpoint that its quantizer writes."""

    model: PreTrainedModel
    directory: Path
    by_the_quantizer: Path
    source: Path


@pytest.fixture(scope="module")
def save(tiny_model_dir, text: Path, tmp_path_factory) -> Callable[[str, str], Saved]:
    made: dict[tuple[str, str], Saved] = {}

    def make(method: str, model: str) -> Saved:
        if (method, model) not in made:
            source = tiny_model_dir(**MODELS[model])
            made[method, model] = quantized(METHODS[method](), source, text, root)
        return made[method, model]

    def quantized(quantizer: Quantizer, source: Path, text: Path, root: Path) -> Saved:
        place = root / str(len(made))
        config = ModelConfig(path=str(source), dtype="auto", device="cpu")
        calibration = CalibrationConfig(str(text), 48, 4, strategy="concat_chunk")
        runner = Runner(
            config, quantizer, calibration_config=calibration, run_dir=place / "run",
            executor=LocalExecutor(),
        )  # fmt: skip
        runner.run()
        live, _ = runner.create_quantized_model()
        save_live_model(live, place / "live", source_dir=source)
        return Saved(live, place / "live", runner.save_quantized_model(place / "model"), source)

    root = tmp_path_factory.mktemp("live")
    return make


@pytest.fixture
def saved(save) -> Saved:
    return save("gptq", "llama")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def stored(directory: Path) -> dict[str, Tensor]:
    shards = sorted(directory.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def assert_same_state(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize(("method", "model"), CASES)
def test_a_live_model_comes_back_with_the_same_bits(save, method, model):
    saved = save(method, model)
    loaded, tokenizer = load_quantized_model(saved.directory, device_map=None)
    assert_same_state(loaded, saved.model)
    assert torch.equal(logits(loaded), logits(saved.model))
    layers = [type(m) for m in saved.model.modules() if isinstance(m, QuantLinear)]
    assert [type(m) for m in loaded.modules() if isinstance(m, QuantLinear)] == layers
    assert len(layers) == 14
    assert loaded.dtype == saved.model.dtype
    assert loaded.config.quantization_config == saved.model.config.quantization_config
    assert tokenizer.decode(tokenizer("a text").input_ids) == "a text"


@pytest.mark.parametrize(("method", "model"), CASES)
def test_its_weights_are_the_files_that_the_quantizer_writes(save, method, model):
    saved = save(method, model)
    found, expected = files_of(saved.directory), files_of(saved.by_the_quantizer)
    assert len([name for name in expected if name.endswith(".safetensors")]) == 3
    for name, content in expected.items():
        if name.endswith(".safetensors") or name == INDEX:
            assert found[name] == content, name


def test_groups_in_order_of_activation_are_stored(save):
    saved = save("gptq in order of activation", "tied")
    g_idx = stored(saved.directory)[f"{Q_PROJ}.g_idx"]
    in_order = torch.arange(64, dtype=g_idx.dtype) // 32
    assert not torch.equal(g_idx, in_order)
    assert torch.equal(g_idx.sort().values, in_order)


def test_tied_embeddings_are_stored_once_and_tied_again(save):
    saved = save("dbf", "tied")
    assert "model.embed_tokens.weight" in stored(saved.directory)
    assert "lm_head.weight" not in stored(saved.directory)
    loaded, _ = load_quantized_model(saved.directory, device_map=None)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = save("gptq", "llama")
    assert "lm_head.weight" in stored(untied.directory)


def test_what_was_changed_in_a_live_model_is_what_is_written(saved, tmp_path):
    live, _ = load_quantized_model(saved.directory, device_map=None)
    before = logits(live)
    live.get_submodule(Q_PROJ).scales.mul_(2)
    live.model.norm.weight.data.mul_(3)
    live.config.quantization_config["note"] = "changed"
    save_live_model(live, tmp_path / "changed")
    loaded, tokenizer = load_quantized_model(tmp_path / "changed", device_map=None)
    assert_same_state(loaded, live)
    assert not torch.equal(logits(loaded), before)
    assert loaded.config.quantization_config["note"] == "changed"
    assert tokenizer is None
    old, new = stored(saved.directory), stored(tmp_path / "changed")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{Q_PROJ}.scales", "model.norm.weight"}


def test_the_tokenizer_is_copied_or_written(saved, tmp_path):
    copied = saved.directory / TOKENIZER_CONFIG
    assert copied.read_bytes() == (saved.source / TOKENIZER_CONFIG).read_bytes()
    live, tokenizer = load_quantized_model(saved.directory, device_map=None)
    tokenizer.model_max_length = 77
    save_live_model(live, tmp_path / "out", source_dir=saved.source, tokenizer=tokenizer)
    _, written = load_quantized_model(tmp_path / "out", device_map=None)
    assert written.model_max_length == 77


def test_a_checkpoint_is_not_overwritten(saved):
    before = files_of(saved.directory)
    with pytest.raises(InputError, match="already holds a checkpoint"):
        save_live_model(saved.model, saved.directory)
    assert files_of(saved.directory) == before


def test_an_error_leaves_no_configuration_behind(saved, tmp_path):
    """Weights alone are not taken for a checkpoint."""
    live, _ = load_quantized_model(saved.directory, device_map=None)
    live.config.quantization_config = {"not": {"plain": object()}}
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_live_model(live, tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG).exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks
def test_adapters_go_beside_the_model_and_stay_on_it(saved, text: Path, tmp_path):
    live, _ = load_quantized_model(saved.directory, device_map=None)
    plain = logits(live)
    original = ModelConfig(path=str(saved.source), dtype="float32", device="cpu")
    PostProcessLoraSFT(
        data_files=str(text), max_length=32, max_train_samples=12, epochs=1, lr=3e-3, lora_r=4,
        gradient_accumulation_steps=2,
    ).run(live, original)  # fmt: skip
    adapted = logits(live)
    assert not torch.equal(adapted, plain)

    save_live_model(live, tmp_path / "out", source_dir=saved.source)
    assert torch.equal(logits(live), adapted)
    files = {path.name for path in (tmp_path / "out" / ADAPTER_FOLDER).iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    old, new = stored(saved.directory), stored(tmp_path / "out")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == new.keys()

    loaded, _ = load_quantized_model(tmp_path / "out", device_map=None)
    assert torch.equal(logits(loaded), plain)
    [entry] = loaded.config.quantization_config["onecomp_post_processes"]
    assert entry["class"] == "PostProcessLoraSFT"
    together = PeftModel.from_pretrained(loaded, str(tmp_path / "out" / ADAPTER_FOLDER))
    assert torch.equal(logits(together), adapted)
