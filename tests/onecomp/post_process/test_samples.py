"""Text to train on and text to judge by."""

from dataclasses import replace

import pytest
import torch

from onecomp.calibration import CalibrationConfig, prepare_calibration_samples
from onecomp.errors import ConfigError, InputError
from onecomp.models import ModelConfig
from onecomp.post_process import samples as samples_module
from onecomp.post_process.samples import DEFAULT_SAMPLES, training_samples


@pytest.fixture
def model_config(tiny_model_dir) -> ModelConfig:
    return ModelConfig(path=str(tiny_model_dir()), dtype="float32", device="cpu")


@pytest.fixture
def words(text) -> CalibrationConfig:
    return CalibrationConfig(str(text), max_length=16, strategy="concat_chunk")


@pytest.mark.parametrize(
    ("num_samples", "num_held_out"), [(2, 1), (9, 1), (15, 1), (16, 2), (25, 3)]
)
def test_the_last_eighth_is_held_out_and_at_least_one(
    num_samples, num_held_out, words, model_config
):
    config = replace(words, num_calibration_samples=num_samples)
    found = training_samples("mine", config, model_config)
    assert found.held_out.shape == (num_held_out, 16)
    assert found.train.shape == (num_samples - num_held_out, 16)
    whole = prepare_calibration_samples(config, model_config.load_tokenizer()).input_ids
    assert torch.equal(found.all, whole)
    assert torch.equal(found.held_out, whole[-num_held_out:])


def test_no_sample_is_in_both_parts(words, model_config):
    found = training_samples("mine", replace(words, num_calibration_samples=64), model_config)
    train, held_out = (
        {tuple(row) for row in part.tolist()} for part in (found.train, found.held_out)
    )
    assert len(train) == 56
    assert not train & held_out


def test_parts_do_not_share_memory(words, model_config):
    found = training_samples("mine", replace(words, num_calibration_samples=8), model_config)
    places = {part.untyped_storage().data_ptr() for part in (found.train, found.held_out)}
    assert len(places) == 2
    assert found.held_out.untyped_storage().nbytes() == found.held_out.nbytes


def test_one_seed_gives_one_text(words, model_config):
    config = replace(words, num_calibration_samples=8, strategy="concat_rand")
    first, again, other = (
        training_samples("mine", replace(config, seed=seed), model_config).all for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_single_sample_is_refused(words, model_config):
    with pytest.raises(ConfigError) as caught:
        training_samples("mine", replace(words, num_calibration_samples=1), model_config)
    assert str(caught.value) == (
        "mine: 1 sample(s): one is held out, so that at least 2 are needed. Raise "
        "num_calibration_samples, or give more text."
    )


def test_text_that_is_too_short_is_refused(words, model_config):
    with pytest.raises(InputError):
        training_samples("mine", replace(words, max_length=10**6), model_config)


def test_without_settings_it_is_128_samples_of_c4(model_config, monkeypatch):
    asked = []

    def prepare(config: CalibrationConfig, *_args: object) -> None:
        asked.append(config)
        raise InputError("c4", "no network")

    monkeypatch.setattr(samples_module, "prepare_calibration_samples", prepare)
    with pytest.raises(InputError, match="no network"):
        training_samples("mine", None, model_config)
    assert asked == [CalibrationConfig("c4", num_calibration_samples=128)]
    assert DEFAULT_SAMPLES == 128
