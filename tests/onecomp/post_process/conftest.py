"""Checkpoints that the tests of several processes share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gang_subjects import Subject, make_subject

from onecomp.export.live import save_live_model
from onecomp.export.load import load_quantized_model
from onecomp.models.config import DTYPES
from onecomp.quantizer import DBF, GPTQ, Onebit

QUANTIZERS = {
    "symmetric": GPTQ(wbits=3, groupsize=32),
    "asymmetric": GPTQ(wbits=3, groupsize=32, sym=False),
    "dbf": DBF(),
    "onebit": Onebit(),
}


@pytest.fixture(scope="session")
def subject(tiny_model_dir, text: Path, tmp_path_factory) -> Subject:
    """A tiny model in 3 bits."""
    quantizer = GPTQ(wbits=3, groupsize=32)
    return make_subject(tiny_model_dir(), text, tmp_path_factory.mktemp("subject"), quantizer)


@pytest.fixture(scope="session")
def subject_of(tiny_model_dir, text: Path, tmp_path_factory) -> Callable[..., Subject]:
    """``subject_of(family, quantizer, dtype, **sizes)``: a tiny model, quantized as by ``subject``.

    Quantizers are named as in ``QUANTIZERS``. All tests that ask for the same share it.
    """
    made: dict[tuple, Subject] = {}

    def make(
        family: str = "llama", quantizer: str = "symmetric", dtype: str = "float32", **sizes: object
    ) -> Subject:
        key = (family, quantizer, dtype, *sorted(sizes.items()))
        if key not in made:
            root = tmp_path_factory.mktemp("subject")
            made[key] = (
                make_subject(tiny_model_dir(family, **sizes), text, root, QUANTIZERS[quantizer])
                if dtype == "float32"
                else in_dtype(make(family, quantizer, **sizes), dtype, root / "model")
            )
        return made[key]

    return make


def in_dtype(subject: Subject, dtype: str, directory: Path) -> Subject:
    """The same checkpoint with everything but the quantized layers in another type."""
    model, _ = load_quantized_model(subject.checkpoint, torch_dtype=DTYPES[dtype], device_map=None)
    save_live_model(model, directory, source_dir=subject.checkpoint)
    return Subject(directory, replace(subject.model_config, dtype=dtype), subject.text)
