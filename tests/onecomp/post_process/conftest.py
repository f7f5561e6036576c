"""Checkpoints that the tests of several processes share."""

from pathlib import Path

import pytest
from gang_subjects import Subject, make_subject

from onecomp.quantizer import GPTQ


@pytest.fixture(scope="session")
def subject(tiny_model_dir, text: Path, tmp_path_factory) -> Subject:
    """A tiny model in 3 bits."""
    quantizer = GPTQ(wbits=3, groupsize=32)
    return make_subject(tiny_model_dir(), text, tmp_path_factory.mktemp("subject"), quantizer)
