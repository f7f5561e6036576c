"""Directories of large models, and shapes made of tiny ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from large_models import DEEPSEEK_V3, LLAMA_405B

from onecomp.planning.costs import UnitCosts
from onecomp.planning.estimate import Estimate
from onecomp.planning.methods import method_shape
from onecomp.planning.model import PlannedModel
from onecomp.planning.request import Place
from onecomp.planning.shapes import ModelShape, TextShape
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, Quantizer


def _directory(root: Path, config: dict) -> Path:
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="session")
def llama_405b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration of Llama-3.1-405B and nothing else."""
    return _directory(tmp_path_factory.mktemp("llama-405b"), LLAMA_405B)


@pytest.fixture(scope="session")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of DeepSeek-V3, whose weights are stored in 8 bits."""
    return _directory(tmp_path_factory.mktemp("deepseek-v3"), DEEPSEEK_V3)


@pytest.fixture(scope="session")
def estimate_of() -> Callable:
    """``estimate_of(directory, gpu=..., num_workers=..., ...)``: a plan's estimate."""
    known: dict[tuple[Path, str], ModelShape] = {}  # tracing a large model takes a second

    def estimate(
        directory: Path,
        *,
        gpu: str = "H100",
        num_workers: int = 8,
        samples: int = 128,
        length: int = 2048,
        qep: bool = True,
        quantizer: Quantizer | None = None,
        price: float | None = None,
    ) -> Estimate:
        method = quantizer or GPTQ(groupsize=32, mse=True, actorder=True, static_groups=True)
        key = directory, method.name
        if key not in known:
            known[key] = PlannedModel.open(str(directory), "auto").shape(method)
        place = Place(num_workers, gpu=gpu, price_per_hour=price)
        hardware = place.hardware()
        number, settings = place.workers(hardware)
        costs = UnitCosts(
            known[key],
            method_shape(method),
            TextShape(samples, length) if method.flag_hessian else None,
            QEPConfig() if qep and method.flag_hessian else None,
            hardware,
            number,
        )
        return Estimate(costs, settings)

    return estimate
