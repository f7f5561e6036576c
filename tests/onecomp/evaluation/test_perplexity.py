import logging
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from onecomp.errors import ConfigError, InputError
from onecomp.evaluation import perplexity
from onecomp.evaluation.perplexity import (
    calculate_perplexity,
    perplexity_of_tokens,
    sliding_windows,
)

VOCABULARY = 97


def tiny_llama(vocab_size: int = VOCABULARY, positions: int = 64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def reference_perplexity(model, input_ids, max_length: int, stride: int) -> float:
    """One window at a time, masked labels, the model's own shifted loss."""
    total, weights, previous_end = 0.0, 0, 0
    for begin in range(0, len(input_ids), stride):
        end = min(begin + max_length, len(input_ids))
        labels = input_ids[begin:end].clone()
        labels[: len(labels) - (end - previous_end)] = -100
        weight = int((labels != -100).sum()) - 1
        with torch.no_grad():
            logits = model(input_ids=input_ids[None, begin:end]).logits[0]
        if weight > 0:
            total += weight * functional.cross_entropy(logits[:-1], labels[1:]).double().item()
            weights += weight
        previous_end = end
        if end == len(input_ids):
            break
    return math.exp(total / weights)


@pytest.mark.parametrize(
    ("num_tokens", "max_length", "stride"),
    [
        (200, 32, 32),
        (200, 32, 8),
        (200, 32, 31),
        (193, 32, 32),
        (161, 32, 20),
        (20, 64, 64),
        (2, 32, 1),
    ],
)
def test_equals_the_reference_of_one_window_at_a_time(num_tokens, max_length, stride):
    model, input_ids = tiny_llama(), random_tokens(num_tokens)
    result = perplexity_of_tokens(
        model, input_ids, max_length=max_length, stride=stride, batch_tokens=128
    )
    reference = reference_perplexity(model, input_ids, max_length, stride)
    assert result.perplexity == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 32, 100, 10_000])
@pytest.mark.parametrize("slice_tokens", [5, 256])
def test_batches_and_slices_do_not_change_the_number(batch_tokens, slice_tokens, monkeypatch):
    model, input_ids = tiny_llama(), random_tokens(300)
    expected = perplexity_of_tokens(model, input_ids, max_length=32, stride=24)
    monkeypatch.setattr(perplexity, "LOSS_SLICE_TOKENS", slice_tokens)
    result = perplexity_of_tokens(
        model, input_ids, max_length=32, stride=24, batch_tokens=batch_tokens
    )
    assert result.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert result.num_tokens == expected.num_tokens


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 16, 50])
def test_windows_cover_every_token_once(num_tokens, stride):
    windows = sliding_windows(num_tokens, max_length=8, stride=stride)
    new = [token for w in windows for token in range(w.end - w.num_new, w.end)]
    assert new == list(range(num_tokens))
    assert [w.begin for w in windows] == [i * stride for i in range(len(windows))]
    assert all(w.length == 8 for w in windows[:-1])


def test_no_batch_holds_more_tokens_than_asked_for():
    windows = sliding_windows(1000, max_length=32, stride=16)
    batches = list(perplexity._equal_length_batches(windows, 100))
    assert max(sum(w.length for w in batch) for batch in batches) == 96
    assert [w for batch in batches for w in batch] == windows


def test_result_says_how_it_was_made():
    input_ids = random_tokens(70)
    input_ids[0] = 1
    result = perplexity_of_tokens(tiny_llama(), input_ids, max_length=32, stride=32)
    # 32 + 32 + 6 tokens; nothing predicts the first of each window.
    assert (result.num_windows, result.num_tokens, result.bos) == (3, 67, True)
    assert (result.max_length, result.stride) == (32, 32)
    assert result.perplexity == pytest.approx(math.exp(result.mean_nll))
    without_bos = perplexity_of_tokens(tiny_llama(), input_ids[1:], max_length=32, stride=32)
    assert not without_bos.bos


def test_uniform_predictions_give_the_size_of_the_vocabulary():
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity_of_tokens(model, random_tokens(100), max_length=16, stride=16)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_the_models_mode_is_restored_module_by_module():
    model = tiny_llama().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    perplexity_of_tokens(model, random_tokens(40), max_length=16, stride=16)
    assert [module.training for module in model.modules()] == modes


def test_overflow_is_infinite_and_warned_of(caplog):
    model = tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with caplog.at_level(logging.WARNING):
        result = perplexity_of_tokens(model, random_tokens(20), max_length=16, stride=16)
    assert math.isnan(result.perplexity)
    assert "19 tokens is nan" not in caplog.text
    assert "18 tokens is nan" in caplog.text
    assert perplexity._exp(1000.0) == math.inf


def test_settings_out_of_range_are_all_named():
    with pytest.raises(ConfigError, match="perplexity: 2 problems") as caught:
        sliding_windows(1, max_length=8, stride=9)
    assert "num_tokens=1" in str(caught.value)
    assert "stride=9: must be between 1 and max_length=8" in str(caught.value)
    with pytest.raises(ConfigError, match="max_length=1: must be at least 2"):
        sliding_windows(10, max_length=1, stride=1)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_file(path, num_tokens: int):
    path.write_text(" ".join(f"w{i}" for i in random_tokens(num_tokens).tolist()))
    return str(path)


def test_calculate_perplexity_scores_a_local_file(tmp_path):
    model, name = tiny_llama(), word_file(tmp_path / "text.txt", 150)
    tokenizer = word_tokenizer()
    input_ids = torch.tensor(
        tokenizer.convert_tokens_to_ids((tmp_path / "text.txt").read_text().split())
    )
    value = calculate_perplexity(model, tokenizer, dataset_name=name, max_length=32, stride=16)
    assert value == pytest.approx(reference_perplexity(model, input_ids, 32, 16), rel=1e-6)


def test_none_means_the_models_positions_and_no_overlap(tmp_path):
    model, name = tiny_llama(positions=40), word_file(tmp_path / "text.txt", 150)
    tokenizer = word_tokenizer()
    default = calculate_perplexity(
        model, tokenizer, dataset_name=name, max_length=None, stride=None
    )
    assert default == calculate_perplexity(
        model, tokenizer, dataset_name=name, max_length=40, stride=40
    )


@pytest.mark.parametrize(("num_tokens", "is_warned_of"), [(64, False), (65, True)])
def test_windows_beyond_the_models_positions_are_warned_of(
    tmp_path, caplog, num_tokens, is_warned_of
):
    name = word_file(tmp_path / "text.txt", num_tokens)
    calculate_perplexity(tiny_llama(), word_tokenizer(), dataset_name=name)
    assert ("max_length=65 is beyond the 64 positions" in caplog.text) is is_warned_of


def test_windows_that_the_model_cannot_compute_are_refused():
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = OPTForCausalLM(config)
    perplexity_of_tokens(model, random_tokens(100), max_length=64, stride=64)
    with pytest.raises(InputError, match="max_length=65 is beyond the model's 64 positions"):
        perplexity_of_tokens(model, random_tokens(100), max_length=65, stride=65)


def test_tokens_that_the_model_does_not_know_are_refused():
    input_ids = random_tokens(10)
    input_ids[3] = VOCABULARY
    with pytest.raises(InputError, match=f"gives token {VOCABULARY}, but the model's embedding"):
        perplexity_of_tokens(tiny_llama(), input_ids, max_length=8, stride=8)


def test_too_short_a_text_is_refused(tmp_path):
    name = word_file(tmp_path / "text.txt", 1)
    with pytest.raises(InputError, match="has 1 token"):
        calculate_perplexity(tiny_llama(), word_tokenizer(), dataset_name=name)


def test_something_must_give_the_model(tmp_path):
    name = word_file(tmp_path / "text.txt", 10)
    with pytest.raises(ConfigError, match="tokenizer is None and there is no model_config"):
        calculate_perplexity(tiny_llama(), dataset_name=name)
    with pytest.raises(ConfigError, match="model is None and there is no model_config"):
        calculate_perplexity(tokenizer=word_tokenizer(), dataset_name=name)
