import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from onecomp.calibration import (
    CalibrationConfig,
    load_texts,
    make_samples,
    prepare_calibration_samples,
    sample_from_model,
)
from onecomp.errors import InputError


def tiny_model() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=1004, n_embd=16, n_layer=1, n_head=1, n_positions=32)
        )


def no_model() -> PreTrainedModel:
    raise AssertionError("the model is not needed")


def test_text_goes_from_source_through_strategy(tmp_path, words):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2 w3 w4 w5\n\nw6 w7 w8 w9\n")
    config = CalibrationConfig(
        str(path), max_length=2, num_calibration_samples=3, strategy="concat_chunk"
    )
    samples = prepare_calibration_samples(config, words, no_model)
    assert samples.input_ids.tolist() == [[1, 2], [3, 4], [5, 1000]]
    assert samples.content_hash() == make_samples(load_texts(config), words, config).content_hash()


def test_self_samples_from_the_model(words):
    config = CalibrationConfig("self", max_length=8, num_calibration_samples=2, seed=5)
    samples = prepare_calibration_samples(config, words, tiny_model)
    expected = sample_from_model(tiny_model(), words, num_samples=2, length=8, seed=5)
    assert samples.content_hash() == expected.content_hash()


def test_self_without_a_model_is_refused(words):
    with pytest.raises(InputError, match=r"self: .*needs the model.*Give load_model, or name"):
        prepare_calibration_samples(CalibrationConfig("self"), words)
