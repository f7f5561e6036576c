import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from onecomp.errors import InputError
from onecomp.export.checkpoint import finish_checkpoint, write_shard
from onecomp.export.load import QuantizedModelLoader, load_quantized_model
from onecomp.export.quant_config import finalize_quant_config, gptq_format, gptq_quant_config
from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.gptq.result import GPTQResult

GROUPSIZE = 32
INPUT_IDS = torch.arange(24).view(2, 12)
SINGLE = "model.safetensors"


def min_max_result(weight: torch.Tensor, wbits: int) -> GPTQResult:
    """Round to nearest on the grid between the smallest and the largest weight of each group."""
    groups = weight.detach().float().unflatten(1, (-1, GROUPSIZE))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / (2**wbits - 1)).half().float()
    zeros = (-low / scales).round()
    codes = (groups / scales.unsqueeze(2)).round() + zeros.unsqueeze(2)
    return GPTQResult(
        wbits=wbits,
        groupsize=GROUPSIZE,
        actorder=False,
        sym=False,
        qweight=codes.clamp(0, 2**wbits - 1).int().flatten(1),
        scales=scales.T.half().contiguous(),
        qzeros=zeros.clamp(0, 2**wbits - 1).T.half().contiguous(),
    )


def target_layers(model: nn.Module) -> dict[str, nn.Linear]:
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and n != "lm_head"}


def write_quantized(
    directory: Path, model: PreTrainedModel, *, pack_weights: bool = True, num_shards: int = 1
) -> PreTrainedModel:
    """Write ``model`` with 4-bit and 3-bit layers; returns it with the dequantized weights."""
    tensors, layers, dense = dict(model.state_dict()), {}, copy.deepcopy(model)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, linear in target_layers(model).items():
        wbits = 3 if "up_proj" in name else 4
        result = min_max_result(linear.weight, wbits)
        layers[name] = gptq_format(wbits, GROUPSIZE)
        layer = GPTQLinear.from_quantization_result(result, linear, pack_weights)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.packed_state().items()}
        dense.get_submodule(name).weight.data.copy_(result.dequantize())
    quantization = gptq_quant_config(wbits=4, groupsize=GROUPSIZE, actorder=False, sym=False)
    config = model.config.to_dict()
    config["quantization_config"] = finalize_quant_config(
        quantization, layers, model.config.num_hidden_layers
    )
    shards = [SINGLE] if num_shards == 1 else [f"part-{i}.safetensors" for i in range(num_shards)]
    for i, shard in enumerate(shards):
        write_shard(directory, shard, {n: tensors[n] for n in sorted(tensors)[i::num_shards]})
    finish_checkpoint(directory, shards, config, tokenizer=tiny_tokenizer())
    return dense


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_quantized(tmp_path, tiny_model("llama"))
    return tmp_path


def rewrite_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_tensors(directory: Path, change: Callable[[dict], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}
    change(tensors)
    save_file(tensors, directory / SINGLE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gemma3"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_loaded_model_computes_with_the_dequantized_weights(tmp_path, family, tie):
    dense = write_quantized(tmp_path, tiny_model(family, tie=tie))
    model, _ = load_quantized_model(tmp_path)
    assert torch.equal(logits(model), logits(dense))
    assert not model.training
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == tie
    assert all(isinstance(model.get_submodule(n), GPTQLinear) for n in target_layers(dense))


@pytest.mark.parametrize("pack_weights", [True, False])
@pytest.mark.parametrize("num_shards", [1, 5])
def test_shards_and_packing_change_nothing(tmp_path, pack_weights, num_shards):
    dense = write_quantized(
        tmp_path, tiny_model("llama"), pack_weights=pack_weights, num_shards=num_shards
    )
    assert (tmp_path / "model.safetensors.index.json").exists() == (num_shards > 1)
    model, _ = load_quantized_model(tmp_path)
    assert torch.equal(logits(model), logits(dense))


def test_type_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    half = tiny_model("llama").to(torch.bfloat16)
    half.config.dtype = torch.bfloat16
    write_quantized(tmp_path / "quantized", half).save_pretrained(tmp_path / "dense")
    model, _ = load_quantized_model(tmp_path / "quantized")
    dense, _ = load_quantized_model(tmp_path / "dense")
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(dense))
    model, _ = load_quantized_model(tmp_path / "quantized", torch_dtype=torch.float32)
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    assert logits(model).dtype == torch.float32


def test_layers_are_found_without_their_list_of_names(checkpoint):
    expected = logits(load_quantized_model(checkpoint)[0])
    rewrite_json(
        checkpoint / "config.json", lambda c: c["quantization_config"].pop("quantized_layer_names")
    )
    assert torch.equal(logits(load_quantized_model(checkpoint)[0]), expected)


def test_config_comes_back_as_written_and_transformers_reads_it(checkpoint):
    written = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    model, tokenizer = QuantizedModelLoader.load_quantized_model(str(checkpoint))
    assert model.config.quantization_config == written
    assert type(model.config.quantization_config) is dict
    assert written["quant_method"] == "mixed_gptq"
    assert AutoConfig.from_pretrained(checkpoint).quantization_config == written
    assert tokenizer("any text").input_ids == tiny_tokenizer()("any text").input_ids


def test_a_loaded_model_is_written_as_it_was_read(checkpoint, tmp_path):
    model, _ = load_quantized_model(checkpoint)
    write_shard(tmp_path / "again", SINGLE, model.state_dict())
    assert (tmp_path / "again" / SINGLE).read_bytes() == (checkpoint / SINGLE).read_bytes()


def test_changing_a_loaded_model_leaves_the_file_alone(checkpoint):
    before = (checkpoint / SINGLE).read_bytes()
    model, _ = load_quantized_model(checkpoint)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert (checkpoint / SINGLE).read_bytes() == before


def test_generation_settings_come_along(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"max_new_tokens": 7}')
    model, _ = load_quantized_model(checkpoint)
    assert model.generation_config.max_new_tokens == 7


def test_a_checkpoint_without_quantization_is_an_ordinary_model(tiny_model_dir):
    model, tokenizer = load_quantized_model(tiny_model_dir("llama"))
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert tokenizer is not None
    assert not model.training


def test_a_checkpoint_may_have_no_tokenizer(checkpoint):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    assert load_quantized_model(checkpoint)[1] is None


def test_unused_tensors_are_reported(checkpoint, caplog):
    rewrite_tensors(checkpoint, lambda t: t.update({"model.layers.9.norm.weight": torch.ones(2)}))
    with caplog.at_level(logging.WARNING):
        load_quantized_model(checkpoint)
    assert "the model does not use weight of model.layers.9.norm" in caplog.text


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.qzeros"), f"{Q_PROJ}: tensor missing .*: qzeros"),
        (
            lambda t: [t.pop(n) for n in list(t) if Q_PROJ in n],
            f"{Q_PROJ}: tensor missing .*: qweight, qzeros, scales",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(2)}),
            f"{Q_PROJ}: tensor unexpected .*: weight",
        ),
        (
            lambda t: t.update({"model.norm.qweight": torch.ones(2)}),
            r"unexpected quantized tensors model\.norm\.\{qweight,weight\}",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.bias": torch.ones(64)}),
            f"{Q_PROJ} has a bias, but the model expects none",
        ),
        (
            lambda t: t[f"{Q_PROJ}.g_idx"][5:].fill_(2),
            f"{Q_PROJ}: g_idx has values from 0 to 2 for 2 groups",
        ),
        (lambda t: t.pop("model.norm.weight"), r"tensors missing .*: model\.norm\.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(2)}),
            r"model\.norm\.weight has shape \(2,\), but the model expects \(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(checkpoint, change, text):
    rewrite_tensors(checkpoint, change)
    with pytest.raises(InputError, match=f"^{checkpoint}: {text}"):
        load_quantized_model(checkpoint)


def test_a_quantized_layer_without_its_bias_is_refused(tmp_path):
    write_quantized(tmp_path, tiny_model("qwen2"))
    rewrite_tensors(tmp_path, lambda t: t.pop(f"{Q_PROJ}.bias"))
    with pytest.raises(InputError, match=f"{Q_PROJ} has no bias, but the model expects one"):
        load_quantized_model(tmp_path)


def test_a_layer_the_model_does_not_have_is_refused(checkpoint):
    rewrite_tensors(
        checkpoint,
        lambda t: t.update(
            {n.replace("0.self_attn", "0.x"): t[n].clone() for n in list(t) if Q_PROJ in n}
        ),
    )
    rewrite_json(
        checkpoint / "config.json",
        lambda c: c["quantization_config"]["quantized_layer_names"].append(
            "model.layers.0.x.q_proj"
        ),
    )
    with pytest.raises(InputError, match=r"0\.x\.q_proj is quantized, but .* no such module"):
        load_quantized_model(checkpoint)


def test_another_models_layer_is_refused(checkpoint):
    rewrite_json(checkpoint / "config.json", lambda c: c.update(intermediate_size=96))
    with pytest.raises(
        InputError, match=r"has shape \(64, 128\), but the model expects \(64, 96\)"
    ):
        load_quantized_model(checkpoint)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda q: q.update(quant_method="awq"),
            "'awq' is unknown. Known methods: autobit, dbf",
        ),
        (
            lambda q: q["quantization_bits"][0]["self_attn.q_proj"].update(method="awq"),
            f"{Q_PROJ}: method 'awq' is unknown. Known: dbf, gptq",
        ),
    ],
)
def test_unknown_methods_are_refused(checkpoint, change, text):
    rewrite_json(checkpoint / "config.json", lambda c: change(c["quantization_config"]))
    with pytest.raises(InputError, match=text):
        load_quantized_model(checkpoint)


def test_unknown_architecture_is_refused(checkpoint):
    rewrite_json(checkpoint / "config.json", lambda c: c.update(model_type="nonesuch"))
    with pytest.raises(InputError, match="nonesuch"):
        load_quantized_model(checkpoint)


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_damaged_weights_are_named(checkpoint, kept_bytes):
    path = checkpoint / SINGLE
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match=rf"{SINGLE}: is truncated or corrupt"):
        load_quantized_model(checkpoint)


def test_a_missing_shard_is_named(tmp_path):
    write_quantized(tmp_path, tiny_model("llama"), num_shards=3)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"part-1\.safetensors: is listed in .* but missing"):
        load_quantized_model(tmp_path)


def test_directories_that_are_no_checkpoints_are_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match="is a file, not a directory"):
        load_quantized_model(checkpoint / SINGLE)
    with pytest.raises(InputError, match="nowhere/at-all: is not a directory, and the Hub has no"):
        load_quantized_model("nowhere/at-all", local_files_only=True)
    (checkpoint / SINGLE).rename(checkpoint / "model.bin")
    with pytest.raises(InputError, match=r"no \.safetensors files"):
        load_quantized_model(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is not valid JSON"):
        load_quantized_model(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_quantized_model(checkpoint)
