import dataclasses
import json

import pytest
import torch
from before_after import state_of
from peft import PeftModel
from tiny_models import sample_text

from onecomp import ModelConfig
from onecomp.errors import ConfigError, InputError, OneCompError
from onecomp.post_process.base import records_of
from onecomp.post_process.lora import process as process_module
from onecomp.post_process.lora.adapter import ADAPTER, without_adapters
from onecomp.post_process.lora.layers import LoraQuantLinear, adapter_layers
from onecomp.post_process.lora.losses import LoraLoss
from onecomp.post_process.lora.process import (
    PostProcessLoraSFT,
    PostProcessLoraTeacherOnlySFT,
    PostProcessLoraTeacherSFT,
)
from onecomp.quantizer.quant_linear import QuantLinear

QUICK = {
    "max_length": 32,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "epochs": 2,
    "lora_r": 4,
    "lora_alpha": 8,
    "lr": 3e-3,
}
IDS = torch.arange(24).unsqueeze(0)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def is_untouched(model, before) -> bool:
    """Same tensors under the same names, same flags, no trace of PEFT."""
    now = model.state_dict()
    same = now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)
    frozen = {p.requires_grad for p in model.model.embed_tokens.parameters()}
    return (
        same and frozen == {True} and not adapter_layers(model) and "peft_config" not in vars(model)
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PostProcessLoraTeacherOnlySFT, {}),
        (PostProcessLoraSFT, {"target_modules": ("q_proj", "down_proj")}),
        (PostProcessLoraTeacherSFT, {"cache_teacher_outputs": True, "lora_dropout": 0.0}),
        (
            PostProcessLoraTeacherOnlySFT,
            {
                "teacher_loss_type": "mse",
                "teacher_loss_weight": 0.1,
                "cache_teacher_outputs": True,
                "teacher_cache_dtype": "float32",
                "intermediate_block_loss_weight": 1.0,
                "intermediate_block_indices": (1,),
            },
        ),
        (
            PostProcessLoraTeacherSFT,
            {"intermediate_block_loss_weight": 1.0, "cache_intermediate_outputs": True},
        ),
        (PostProcessLoraTeacherOnlySFT, {"use_bf16": True, "teacher_temperature": 2.0}),
    ],
)
def test_adapters_help_and_come_back_from_their_files(
    kind, settings, quantized, original, jsonl, tmp_path
):
    model = quantized()
    before, layers = logits_of(model), [m for m in model.modules() if isinstance(m, QuantLinear)]
    states = [state_of(layer) for layer in layers]
    process = kind(data_files=str(jsonl), output_dir=str(tmp_path), **QUICK, **settings)
    process.run(model, original)

    [entry] = records_of(model)
    assert entry["executed"]
    assert entry["held_out_after"] < entry["held_out_before"]
    assert entry["class"] == kind.__name__
    assert entry["details"]["updates"] == 8  # 18 training samples, 4 of a step, 2 epochs
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for layer, state in zip(layers, states, strict=True):
        assert all(torch.equal(layer.state_dict()[key], state[key]) for key in state)

    after = logits_of(model)
    assert not torch.equal(before, after)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(quantized(), str(tmp_path))
    assert torch.equal(logits_of(loaded), after)
    with without_adapters(model):
        assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), after)


def test_adapters_are_where_they_are_wanted(quantized, original, jsonl, tmp_path):
    model = quantized()
    targets = ("0.self_attn.q_proj", "o_proj")
    PostProcessLoraSFT(
        data_files=str(jsonl), output_dir=str(tmp_path), target_modules=targets, **QUICK
    ).run(model, original)
    assert list(adapter_layers(model)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraQuantLinear)
    assert layer.lora_A[ADAPTER].weight.dtype == torch.float32


def test_the_result_does_not_depend_on_padding_or_torchs_random_state(quantized, original, jsonl):
    states = []
    for seed, size in ((0, (1, 4)), (1, (1, 4)), (1, (4, 1))):
        torch.manual_seed(seed)
        model = quantized()
        batch_size, accumulation = size
        settings = {**QUICK, "batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        before = torch.get_rng_state()
        PostProcessLoraTeacherOnlySFT(
            data_files=str(jsonl), max_length=8, lora_dropout=0.0, epochs=1,
            **{k: v for k, v in settings.items() if k not in {"max_length", "epochs"}},
        ).run(model, original)  # fmt: skip
        assert torch.equal(torch.get_rng_state(), before)
        states.append(logits_of(model))
    assert torch.equal(states[0], states[1])
    assert torch.allclose(states[1], states[2], atol=1e-4)  # all samples have 8 tokens: no padding


def test_what_is_no_better_is_taken_off(quantized, original, jsonl, tmp_path, caplog):
    model = quantized()
    before, logits = state_of(model), logits_of(model)
    settings = {**QUICK, "lr": 100.0}
    PostProcessLoraTeacherOnlySFT(
        data_files=str(jsonl), output_dir=str(tmp_path / "adapter"), **settings
    ).run(model, original)
    [entry] = records_of(model)
    assert not entry["executed"]
    assert "no state was better on held-out samples" in entry["reason"]
    assert "no state was better" in caplog.text
    assert is_untouched(model, before)
    assert torch.equal(logits_of(model), logits)
    assert not (tmp_path / "adapter").exists()


def test_a_loss_that_is_not_finite_is_skipped_and_counted(quantized, original, jsonl, monkeypatch):
    model = quantized()
    before = state_of(model)
    whole = LoraLoss.__call__

    def broken(*args):
        loss = whole(*args)
        return loss * torch.nan if loss.requires_grad else loss

    monkeypatch.setattr(LoraLoss, "__call__", broken)
    PostProcessLoraSFT(data_files=str(jsonl), **{**QUICK, "epochs": 4}).run(model, original)
    [entry] = records_of(model)
    assert "the loss was not finite in 10 steps in a row; rolled back" in entry["reason"]
    assert entry["details"]["skipped_steps"] == 10
    assert is_untouched(model, before)


@pytest.mark.parametrize("num_workers", [None, 0, 1])
def test_an_error_in_this_process_leaves_the_model_untouched(
    num_workers, quantized, original, jsonl, monkeypatch
):
    def fail(*_args):
        raise OneCompError("lost")

    model = quantized()
    before = state_of(model)
    monkeypatch.setattr(process_module, "train_adapter", fail)
    process = PostProcessLoraSFT(data_files=str(jsonl), num_workers=num_workers, **QUICK)
    with pytest.raises(OneCompError, match="lost"):
        process.run(model, original)
    assert is_untouched(model, before)
    assert records_of(model) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("query",)}, "no quantized layer is called query. There are: down_"),
        ({"gradient_accumulation_steps": 9}, "17 training samples are fewer than the 18 of one"),
        ({"max_train_samples": 1}, "1 sample(s): one is held out"),
        ({"text_column": "body"}, "there is no column 'body': found text"),
        (
            {"intermediate_block_loss_weight": 1.0, "intermediate_block_indices": (0, 7)},
            "intermediate_block_indices has 7, but the model has 2 blocks",
        ),
    ],
)
def test_what_cannot_work_is_found_before_any_work(
    settings, message, quantized, original, jsonl, monkeypatch
):
    monkeypatch.setattr(ModelConfig, "load_model", None)
    model = quantized()
    before = state_of(model)
    process = PostProcessLoraTeacherSFT(
        data_files=str(jsonl), **{**QUICK, "held_out_ratio": 0.15, **settings}
    )
    with pytest.raises((ConfigError, InputError)) as caught:
        process.run(model, original)
    assert message in str(caught.value)
    assert is_untouched(model, before)


def test_a_teacher_that_does_not_fit_is_refused(quantized, original, jsonl, tiny_model_dir):
    wide = str(tiny_model_dir("llama", hidden_size=128))
    process = PostProcessLoraTeacherSFT(
        data_files=str(jsonl), teacher_model_path=wide, intermediate_block_loss_weight=1.0, **QUICK
    )
    with pytest.raises(ConfigError, match="2 blocks of width 64, the teacher 2 of width 128"):
        process.run(quantized(), original)


def test_another_model_can_teach(quantized, original, jsonl, tiny_model_dir):
    model = quantized()
    PostProcessLoraTeacherOnlySFT(
        data_files=str(jsonl),
        teacher_model_path=str(tiny_model_dir("llama", hidden_size=128)),
        **QUICK,
    ).run(model, original)
    assert records_of(model)[0]["executed"]


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({}, [("auto", "float32"), ("auto", "bfloat16")]),
        ({"teacher_dtype": "float16"}, [("auto", "float16"), ("auto", "float16")]),
        ({"teacher_device": "cpu"}, [("cpu", "float32"), ("cpu", "float32")]),
    ],
)
def test_where_the_teacher_computes_is_settled_in_the_process_that_asks_it(
    settings, places, quantized, original, jsonl, monkeypatch
):
    """The driver has no GPU, the worker has one."""
    jobs = []

    def note(job, _model):
        jobs.append(job)
        raise OneCompError("stopped")

    monkeypatch.setattr(process_module, "train_adapter", note)
    process = PostProcessLoraTeacherSFT(data_files=str(jsonl), **QUICK, **settings)
    auto = dataclasses.replace(original, device="auto", dtype="bfloat16")
    found = []
    with pytest.raises(OneCompError, match="stopped"):
        process.run(quantized(), auto)
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        teacher = jobs[0].teaching.teacher_here()
        found.append((teacher.device, teacher.dtype))
    assert found == places


def test_a_model_without_quantized_layers_is_refused(original, jsonl):
    with pytest.raises(InputError, match="the model has no quantized layers"):
        PostProcessLoraSFT(data_files=str(jsonl)).run(original.load_model(), original)


def test_adapters_on_adapters_are_refused(quantized, original, jsonl):
    model = quantized()
    process = PostProcessLoraSFT(data_files=str(jsonl), **QUICK)
    process.run(model, original)
    with pytest.raises(InputError, match="has LoRA adapters already"):
        process.run(model, original)


def test_conversations_train_too(quantized, original, tmp_path, monkeypatch):
    talks = [
        {"messages": [{"role": "user", "content": sample_text(5, seed=number)}]}
        for number in range(12)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, talks)))
    tokenizer = original.load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(ModelConfig, "load_tokenizer", lambda _config: tokenizer)
    model = quantized()
    PostProcessLoraSFT(data_files=str(path), **QUICK).run(model, original)
    assert records_of(model)[0]["executed"]


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        PostProcessLoraSFT(
            lora_r=0,
            lora_dropout=1.0,
            warmup_ratio=-0.1,
            weight_decay=-1.0,
            held_out_ratio=0.0,
            max_train_samples=0,
            num_workers=-1,
            lr=0.0,
            target_modules=(),
            sft_loss_weight=0.0,
            teacher_loss_type="cosine",
            teacher_cache_dtype="int8",
            intermediate_block_indices=(-1,),
        )
    found = str(caught.value)
    for name in (
        "neither dataset_name nor data_files",
        "lora_r=0",
        "lora_dropout=1.0",
        "warmup_ratio=-0.1",
        "weight_decay=-1.0",
        "held_out_ratio=0.0",
        "max_train_samples=0",
        "num_workers=-1: must be a whole number, at least 0",
        "lr=0.0",
        "target_modules is empty",
        "are all 0: nothing would be trained",
        "teacher_loss_type='cosine': must be 'kl' or 'mse'",
        "teacher_cache_dtype='int8'",
        "intermediate_block_indices=(-1,)",
    ):
        assert name in found
    assert len(caught.value.problems) == 14


@pytest.mark.parametrize(
    ("kind", "sft", "teacher"),
    [
        (PostProcessLoraSFT, 1.0, 0.0),
        (PostProcessLoraTeacherSFT, 1.0, 1.0),
        (PostProcessLoraTeacherOnlySFT, 0.0, 1.0),
    ],
)
def test_kinds_differ_in_their_weights(kind, sft, teacher):
    process = kind(data_files="text.txt")
    assert (process.sft_loss_weight, process.teacher_loss_weight) == (sft, teacher)
    assert process.name == kind.__name__
    assert dataclasses.replace(process) == process
    names = [f.name for f in dataclasses.fields(kind)]
    assert names == [f.name for f in dataclasses.fields(PostProcessLoraSFT)]
