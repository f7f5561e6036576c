"""A tiny model, its 3-bit checkpoint, and text to train on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import sample_text
from transformers import PreTrainedModel

from onecomp import GPTQ, CalibrationConfig, LocalExecutor, ModelConfig, Runner
from onecomp.export.load import load_quantized_model


@pytest.fixture(scope="session")
def original(tiny_model_dir) -> ModelConfig:
    """The model before it was quantized."""
    return ModelConfig(path=str(tiny_model_dir("llama")), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def checkpoint(original, text, tmp_path_factory) -> Path:
    """The same in 3 bits."""
    root = tmp_path_factory.mktemp("quantized")
    runner = Runner(
        model_config=original,
        quantizer=GPTQ(wbits=3, groupsize=32),
        calibration_config=CalibrationConfig(str(text), max_length=64, num_calibration_samples=8),
        run_dir=root / "run",
        executor=LocalExecutor(),
    )
    runner.run()
    return runner.save_quantized_model(root / "model")


@pytest.fixture
def quantized(checkpoint) -> Callable[[], PreTrainedModel]:
    """Loads the checkpoint anew."""

    def load() -> PreTrainedModel:
        model, _ = load_quantized_model(checkpoint, device_map=None)
        return model

    return load


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory) -> Path:
    """Twenty samples of different lengths."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"text": sample_text(6 + number % 5, seed=number)} for number in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
