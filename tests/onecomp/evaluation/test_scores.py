import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import MAX_POSITIONS, VOCAB_SIZE, sample_text, tiny_tokenizer

from onecomp.errors import ConfigError, InputError
from onecomp.evaluation.scores import PerplexityRequest, evaluate_checkpoint
from onecomp.models import ModelSource, Skeleton


@pytest.fixture
def text(tmp_path: Path) -> Callable[[str], str]:
    def write(content: str) -> str:
        (tmp_path / "text.txt").write_text(content)
        return str(tmp_path / "text.txt")

    return write


def skeleton_of(directory: Path) -> Skeleton:
    return Skeleton.build(ModelSource.open(directory), torch.float32)


def test_the_stride_is_the_windows_length_unless_given(text):
    name = text("some text")
    assert PerplexityRequest.checked(name, 512).stride == 512
    assert PerplexityRequest.checked(name, 512, 64).stride == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length=0: must be at least 2."),
        ({"max_length": -5}, "max_length=-5: must be at least 2."),
        ({"max_length": 1}, "max_length=1: must be at least 2."),
        ({"stride": 0}, "stride=0: must be between 1 and max_length=2048"),
        ({"max_length": 8, "stride": 9}, "stride=9: must be between 1 and max_length=8"),
        ({"max_tokens": 1}, "max_tokens=1: must be at least 2."),
        ({"max_tokens": 0}, "max_tokens=0: must be at least 2."),
    ],
)
def test_settings_out_of_range_are_refused_before_the_text_is_read(settings, message):
    with pytest.raises(ConfigError, match=re.escape(f"perplexity: {message}")):
        PerplexityRequest.checked("missing.txt", **settings)


def test_a_text_of_one_token_does_not_fit_any_model(tiny_model_dir, text):
    model, tokenizer = skeleton_of(tiny_model_dir()).model, tiny_tokenizer()
    PerplexityRequest.checked(text("ab")).require_fit(model, tokenizer)
    name = text("a")
    with pytest.raises(InputError, match=rf"{name}: has 1 token\(s\); a prediction needs"):
        PerplexityRequest.checked(name).require_fit(model, tokenizer)


def test_windows_fit_the_model_or_are_refused(tiny_model_dir, text):
    model, tokenizer = skeleton_of(tiny_model_dir("opt")).model, tiny_tokenizer()
    name = text(sample_text(300))
    PerplexityRequest.checked(name, MAX_POSITIONS).require_fit(model, tokenizer)
    PerplexityRequest.checked(name, max_tokens=MAX_POSITIONS).require_fit(model, tokenizer)
    with pytest.raises(InputError, match=f"Use a max_length of at most {MAX_POSITIONS}"):
        PerplexityRequest.checked(name, MAX_POSITIONS + 1).require_fit(model, tokenizer)


def test_a_tokenizer_of_another_model_is_refused(tiny_model_dir, text):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = skeleton_of(tiny_model_dir()).model
    request = PerplexityRequest.checked(text("some <new> text"))
    with pytest.raises(InputError, match=f"gives token {VOCAB_SIZE}, but the model's embedding"):
        request.require_fit(model, tokenizer)


def test_a_checkpoint_that_cannot_compute_the_windows_is_refused(tiny_model_dir, text):
    request = PerplexityRequest.checked(text(sample_text(300)))
    with pytest.raises(InputError, match=r"max_length=\d+ is beyond the model's 512 positions"):
        evaluate_checkpoint(tiny_model_dir("opt"), request)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_checkpoint_without_a_tokenizer_is_refused(tiny_model_dir, tmp_path, text, family):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir(family), directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    request = PerplexityRequest.checked(text("some text"))
    with pytest.raises(InputError, match=rf"{directory}: has no tokenizer.*Put the tokenizer fil"):
        evaluate_checkpoint(directory, request)


def test_scores_say_what_they_depend_on(tiny_model_dir, text):
    name = text("some text")
    scores = evaluate_checkpoint(tiny_model_dir(), PerplexityRequest.checked(name, 8, 4))
    assert (scores["text"], scores["max_length"], scores["stride"]) == (name, 8, 4)
    assert scores["perplexity"] > 1
