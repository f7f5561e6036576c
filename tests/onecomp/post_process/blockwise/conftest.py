"""Tiny checkpoints of every format that blocks can be trained in."""

from collections.abc import Callable
from pathlib import Path

import pytest
from gang_subjects import Subject, make_subject

from onecomp.quantizer import DBF, GPTQ, Onebit, Quantizer

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "gptq": lambda: GPTQ(wbits=3, groupsize=32),
    "asymmetric": lambda: GPTQ(wbits=3, groupsize=32, sym=False),
    "dbf": lambda: DBF(target_bits=2.0, iters=40),
    "onebit": Onebit,
}

NUM_BLOCKS = 3
"""A pair that is trained for its hidden states, and a block that is trained for answers."""
SIZES = {"max_length": 64, "num_calibration_samples": 36}
"""Text enough that what is learned of 32 samples helps on the four that are held out."""


@pytest.fixture(scope="session")
def subject_of(tiny_model_dir, text: Path, tmp_path_factory) -> Callable[[str], Subject]:
    """``subject_of(kind)``: a tiny model quantized by one of ``QUANTIZERS``."""
    made: dict[str, Subject] = {}

    def subject(kind: str) -> Subject:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            directory = tiny_model_dir(num_layers=NUM_BLOCKS)
            made[kind] = make_subject(directory, text, root, QUANTIZERS[kind](), **SIZES)
        return made[kind]

    return subject
