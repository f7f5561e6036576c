"""The tiny models are what other tests take them for."""

import json

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, sample_text, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_and_its_logits_depend_on_the_text(tiny_model_dir, family):
    directory = tiny_model_dir(family)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(sample_text(30), return_tensors="pt")["input_ids"]
    assert ids.max() < VOCAB_SIZE
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 30
    assert logits.std(dim=0).mean() > 0.1  # over positions
    assert (len(list(directory.glob("*.safetensors"))), model.dtype) == (1, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_the_weights_and_torch_keeps_its_random_state(tmp_path, family):
    before = torch.random.get_rng_state()
    first = save_tiny_model(family, tmp_path / "first", seed=1)
    again = save_tiny_model(family, tmp_path / "again", seed=1)
    other = save_tiny_model(family, tmp_path / "other", seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [(path / "model.safetensors").read_bytes() for path in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_options_reach_the_files(tmp_path):
    directory = save_tiny_model(
        "llama", tmp_path, num_layers=3, dtype=torch.bfloat16, max_shard_size="50KB", tie=True
    )
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "lm_head.weight" not in index["weight_map"]
    assert "model.layers.2.mlp.down_proj.weight" in index["weight_map"]
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tokenizer_keeps_any_text(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir())
    text = sample_text(50, seed=3) + "é 123\n\t"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)


@pytest.mark.parametrize("num_words", [1, 40, 500])
def test_sample_text_has_the_words_it_was_asked_for(num_words):
    assert len(sample_text(num_words).split()) == num_words
    assert (
        sample_text(num_words) == sample_text(num_words, seed=0) != sample_text(num_words, seed=1)
    )
