import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, MAX_POSITIONS, VOCAB_SIZE, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

from onecomp.errors import InputError
from onecomp.models import (
    ModelSource,
    Skeleton,
    require_known_tokens,
    require_positions,
    require_stored_tensors,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def skeleton_of(directory: Path) -> Skeleton:
    return Skeleton.build(ModelSource.open(directory), torch.float32)


def changed(
    directory: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Skeleton:
    """Skeleton of a copy of a model whose stored tensors are what ``change`` makes of them."""
    shutil.copytree(directory, target / "model")
    tensors = change(load_file(directory / "model.safetensors"))
    save_file(tensors, target / "model" / "model.safetensors", metadata={"format": "pt"})
    return skeleton_of(target / "model")


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the bare model has them."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


# Stored tensors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "tie": True},
        {"max_shard_size": "100KB"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_checkpoint_passes_and_no_weight_is_read(tiny_model_dir, family, options):
    skeleton = skeleton_of(tiny_model_dir(family, **options))
    require_stored_tensors(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_other_prefixes_and_tensors_that_nobody_uses_do_not_matter(
    tiny_model_dir, tmp_path, family, tie
):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    skeleton = changed(
        tiny_model_dir(family, tie=tie), tmp_path, lambda tensors: bare(tensors) | extra
    )
    require_stored_tensors(skeleton)


def test_five_missing_tensors_are_named_with_their_shapes_and_the_rest_counted(
    tiny_model_dir, tmp_path
):
    gone = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"]
    gone += [f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    skeleton = changed(tiny_model_dir(), tmp_path, without(*gone))
    with pytest.raises(InputError) as caught:
        require_stored_tensors(skeleton)
    assert str(caught.value) == (
        f"{tmp_path}/model: its weights do not fit its architecture (llama): "
        f"{gone[0]} (64, 64) is missing; {gone[1]} (32, 64) is missing; "
        f"{gone[2]} (32, 64) is missing; {gone[3]} (64, 64) is missing; "
        f"{gone[4]} (128, 64) is missing; and 2 more. "
        "The weights belong to another model, or the download is incomplete. "
        "Download the model again."
    )


def test_a_wrong_shape_is_named_with_both_shapes(tiny_model_dir, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    skeleton = changed(tiny_model_dir(), tmp_path, lambda t: t | {name: t[name][:, :96].clone()})
    message = rf"{name} has shape \(64, 96\) and must have \(64, 128\)\. The weights belong"
    with pytest.raises(InputError, match=message):
        require_stored_tensors(skeleton)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_need_scales_are_refused(tiny_model_dir, tmp_path, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    skeleton = changed(tiny_model_dir(), tmp_path, lambda t: t | {name: t[name].to(dtype)})
    message = rf"{name} is stored as [A-Z0-9_]+ and must be BF16, F16, F32, F64\."
    with pytest.raises(InputError, match=message):
        require_stored_tensors(skeleton)


@pytest.mark.parametrize(
    ("tie", "gone", "is_missing"),
    [(True, HEAD, False), (True, EMBEDDING, True), (False, HEAD, True), (False, EMBEDDING, True)],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_only_the_tied_end_may_be_absent(tiny_model_dir, tmp_path, family, tie, gone, is_missing):
    skeleton = changed(
        tiny_model_dir(family, tie=tie),
        tmp_path,
        lambda t: without(gone)(t | {HEAD: t[EMBEDDING].clone()}),
    )
    if not is_missing:
        return require_stored_tensors(skeleton)
    with pytest.raises(InputError, match=rf"{gone} \({VOCAB_SIZE}, 64\) is missing"):
        require_stored_tensors(skeleton)
    return None


def test_a_buffer_may_be_absent_but_not_of_another_shape(tiny_model_dir, tmp_path):
    skeleton = skeleton_of(tiny_model_dir())
    skeleton.model.register_buffer("scale", torch.ones(3))
    require_stored_tensors(skeleton)
    skeleton = changed(tiny_model_dir(), tmp_path, lambda t: t | {"scale": torch.ones(4)})
    skeleton.model.register_buffer("scale", torch.ones(3))
    with pytest.raises(InputError, match=r"scale has shape \(4,\) and must have \(3,\)"):
        require_stored_tensors(skeleton)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(num_local_experts=4, num_key_value_heads=1, intermediate_size=64, **EXPERTS),
        Qwen3MoeConfig(
            num_experts=4, num_key_value_heads=1, moe_intermediate_size=16, pad_token_id=None,
            **EXPERTS,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_fused_experts_are_refused_as_not_supported(tmp_path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        require_stored_tensors(skeleton_of(tmp_path))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}: its architecture ({config.model_type}) fuses experts")
    assert "model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj" in said
    assert "Mixture-of-experts models with fused experts are not supported yet." in said


# Positions


def test_a_model_with_a_table_of_positions_ends_where_the_table_ends(tiny_model_dir, caplog):
    model = tiny_model("opt")
    with torch.inference_mode():
        model(input_ids=torch.ones(1, MAX_POSITIONS, dtype=torch.long))
        with pytest.raises(IndexError):
            model(input_ids=torch.ones(1, MAX_POSITIONS + 1, dtype=torch.long))
    directory = tiny_model_dir("opt")
    skeleton = skeleton_of(directory)
    require_positions(skeleton.model, MAX_POSITIONS)
    message = (
        f"{directory}: max_length={MAX_POSITIONS + 1} is beyond the model's {MAX_POSITIONS} "
        f"positions. Use a max_length of at most {MAX_POSITIONS}."
    )
    with pytest.raises(InputError, match=re.escape(message)):
        require_positions(skeleton.model, MAX_POSITIONS + 1)
    assert caplog.text == ""


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"opt"}))
def test_rotary_positions_go_on_with_a_warning(tiny_model_dir, family, caplog):
    model = skeleton_of(tiny_model_dir(family)).model
    with caplog.at_level(logging.WARNING):
        require_positions(model, MAX_POSITIONS)
        assert caplog.text == ""
        require_positions(model, MAX_POSITIONS + 1)
    assert f"max_length={MAX_POSITIONS + 1} is beyond the {MAX_POSITIONS} positions" in caplog.text
    with pytest.raises(InputError, match=f"at most {MAX_POSITIONS}"):
        require_positions(model, MAX_POSITIONS + 1, may_extrapolate=False)


def test_an_embedding_of_as_many_tokens_is_no_table_of_positions(caplog):
    config = LlamaConfig(
        vocab_size=64, max_position_embeddings=64, hidden_size=32, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    require_positions(LlamaForCausalLM(config), 65)
    assert "beyond the 64 positions" in caplog.text


# Tokens


def test_tokens_beyond_the_embedding_are_refused(tiny_model_dir):
    directory = tiny_model_dir()
    model = skeleton_of(directory).model
    require_known_tokens(model, torch.tensor([[0, VOCAB_SIZE - 1]]))
    message = (
        f"{directory}: its tokenizer gives token {VOCAB_SIZE}, "
        f"but the model's embedding ends with token {VOCAB_SIZE - 1}."
    )
    with pytest.raises(InputError, match=re.escape(message)):
        require_known_tokens(model, torch.tensor([[0, VOCAB_SIZE]]))
