"""From a CalibrationConfig to samples, whatever the source."""

import logging
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecomp.calibration.config import SELF, CalibrationConfig
from onecomp.calibration.samples import CalibrationSamples
from onecomp.calibration.sampling import sample_from_model
from onecomp.calibration.sources import load_texts
from onecomp.calibration.strategies import make_samples
from onecomp.errors import InputError

logger = logging.getLogger(__name__)


def prepare_calibration_samples(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    load_model: Callable[[], PreTrainedModel] | None = None,
) -> CalibrationSamples:
    """The samples that ``config`` describes.

    Args:
        config: Source, strategy and sizes.
        tokenizer: Tokenizer of the model.
        load_model: Gives the model; called only for ``calibration_dataset="self"``, which
            samples the text from it and has no use for ``strategy``.

    Raises:
        InputError: The text cannot be had, or is too short.
    """
    if config.dataset_name == SELF:
        samples = _own_samples(config, tokenizer, load_model)
    else:
        samples = make_samples(load_texts(config), tokenizer, config)
    logger.info(
        "calibration data: %d samples of %d tokens from %s",
        *samples.input_ids.shape,
        config.dataset_name,
    )
    return samples


def _own_samples(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    load_model: Callable[[], PreTrainedModel] | None,
) -> CalibrationSamples:
    if load_model is None:
        raise InputError(
            SELF,
            "sampling from the model needs the model, and none can be loaded here. "
            "Give load_model, or name a dataset or a text file.",
        )
    return sample_from_model(
        load_model(),
        tokenizer,
        num_samples=config.num_calibration_samples,
        length=config.max_length,
        seed=config.seed,
    )
