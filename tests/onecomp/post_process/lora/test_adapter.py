import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer
from torch import nn

from onecomp.errors import ConfigError, InputError
from onecomp.evaluation.scores import PerplexityRequest, evaluate_checkpoint
from onecomp.export.checkpoint import ADAPTER_FOLDER
from onecomp.export.install import install_checkpoint
from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.post_process.lora.adapter import (
    adapter_parameters,
    adapters_on_trial,
    target_names,
    targeted_layers,
)
from onecomp.quantizer.quant_linear import QuantLinear

IDS = torch.arange(24).unsqueeze(0)


def quantized_layers(model) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_usual_projections_are_targeted_where_there_are_some(quantized):
    layers = quantized_layers(quantized())
    assert targeted_layers("LoRA", layers, None) == layers
    others = {name.replace("_proj", "_matrix"): layer for name, layer in layers.items()} | {
        "lm_head": layers["model.layers.0.mlp.up_proj"]
    }
    assert set(targeted_layers("LoRA", others, None)) == set(others) - {"lm_head"}


def test_a_name_that_fits_no_layer_is_refused(quantized):
    layers = quantized_layers(quantized())
    with pytest.raises(ConfigError, match="no quantized layer is called qkv, proj"):
        targeted_layers("LoRA", layers, ("q_proj", "qkv", "proj"))


def test_layers_that_are_not_quantized_get_no_adapter(quantized):
    model = quantized()
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(64, 128, bias=False))
    targets = targeted_layers("LoRA", quantized_layers(model), ("up_proj", "o_proj"))
    names = target_names(model, targets)
    assert names == sorted(targets)
    assert len(names) == 3
    assert target_names(model, {n: m for n, m in targets.items() if "o_proj" in n}) == ["o_proj"]


def test_a_checkpoint_has_its_adapters_in_a_folder(quantized, tmp_path):
    model, reference = quantized(), logits_of(quantized())
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    layers = targeted_layers("LoRA", quantized_layers(model), ("q_proj",))
    with adapters_on_trial(model, layers, config, seed=0) as trial:
        trial.keep()
    for parameter in adapter_parameters(model).values():
        nn.init.constant_(parameter, 0.1)
    adapted = logits_of(model)
    save_live_model(model, tmp_path / "staging")
    assert torch.equal(logits_of(model), adapted)  # they are on again
    (tmp_path / "out" / ADAPTER_FOLDER).mkdir(parents=True)
    (tmp_path / "out" / ADAPTER_FOLDER / "old.json").touch()
    install_checkpoint(tmp_path / "staging", tmp_path / "out")
    loaded, _ = load_quantized_model(tmp_path / "out", device_map=None)
    assert torch.equal(logits_of(loaded), reference)
    assert not (tmp_path / "out" / ADAPTER_FOLDER / "old.json").exists()
    again = with_adapter(loaded, tmp_path / "out" / ADAPTER_FOLDER)
    assert torch.equal(logits_of(again), adapted)
    loaded, _ = load_quantized_model(tmp_path / "out", device_map=None, adapters=True)
    assert torch.equal(logits_of(loaded), adapted)


def test_adapters_of_another_model_are_refused(quantized, tmp_path):
    model = quantized()
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    layers = targeted_layers("LoRA", quantized_layers(model), ("q_proj",))
    with adapters_on_trial(model, layers, config, seed=0) as trial:
        trial.keep()
    save_live_model(model, tmp_path / "model")
    path = tmp_path / "model" / ADAPTER_FOLDER / "adapter_model.safetensors"
    tensors = {name: tensor[:, :-1].clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(InputError, match="holds adapters of another model"):
        load_quantized_model(tmp_path / "model", device_map=None, adapters=True)


def test_what_is_evaluated_has_its_adapters(quantized, text, tmp_path):
    model = quantized()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    layers = targeted_layers("LoRA", quantized_layers(model), ("q_proj", "down_proj"))
    with adapters_on_trial(model, layers, config, seed=0) as trial:
        trial.keep()
    for parameter in adapter_parameters(model).values():
        nn.init.constant_(parameter, 0.1)
    save_live_model(model, tmp_path / "with")
    save_live_model(quantized(), tmp_path / "without")
    tiny_tokenizer().save_pretrained(tmp_path / "with")
    tiny_tokenizer().save_pretrained(tmp_path / "without")
    request = PerplexityRequest.checked(str(text), max_length=64, max_tokens=640)
    found = [evaluate_checkpoint(tmp_path / name, request) for name in ("with", "without")]
    assert found[0]["perplexity"] != pytest.approx(found[1]["perplexity"], rel=0.01)


def with_adapter(model, directory) -> PeftModel:
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # PEFT asks
        return PeftModel.from_pretrained(model, str(directory))
