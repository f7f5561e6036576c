"""The text of a process: samples to train on, and a slice that is held out to judge by."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from onecomp.calibration import CalibrationConfig, prepare_calibration_samples
from onecomp.errors import ConfigError
from onecomp.models import ModelConfig

HELD_OUT_RATIO = 1 / 8
DEFAULT_SAMPLES = 128


@dataclass(frozen=True, eq=False)
class TrainingSamples:
    """Tokens to train on and to judge by; the two have no sample in common."""

    train: Int64[Tensor, "samples length"]
    held_out: Int64[Tensor, "judges length"]

    @property
    def all(self) -> Int64[Tensor, "both length"]:
        """Training samples, and behind them the held-out ones."""
        return torch.cat([self.train, self.held_out])


def training_samples(
    process: str, config: CalibrationConfig | None, model_config: ModelConfig
) -> TrainingSamples:
    """Read a process's text; the last eighth of the samples, at least one, is held out.

    Args:
        process: Name for messages.
        config: Text and sizes; None for 128 samples of C4.
        model_config: Whose tokenizer.

    Raises:
        ConfigError: Fewer than two samples.
    """
    config = config or CalibrationConfig(num_calibration_samples=DEFAULT_SAMPLES)
    samples = prepare_calibration_samples(
        config, model_config.load_tokenizer(), model_config.load_model
    ).input_ids
    if len(samples) < 2:
        raise ConfigError(
            process,
            [
                f"{len(samples)} sample(s): one is held out, so that at least 2 are needed. Raise "
                "num_calibration_samples, or give more text."
            ],
        )
    num_held_out = max(1, int(len(samples) * HELD_OUT_RATIO))
    split = len(samples) - num_held_out
    return TrainingSamples(samples[:split].clone(), samples[split:].clone())
