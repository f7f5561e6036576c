"""Groups that do not depend on each other are quantized at once, with the bytes of one by one."""

from pathlib import Path

import pytest
import torch
from small_job import NUM_SHARDS, Made, assert_same, make, shards
from transformers import AutoModelForCausalLM, GPTNeoXConfig
from worker_settings import worker_settings

from onecomp.executor import LocalExecutor
from onecomp.models import ModelSource, Skeleton
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ
from onecomp.store import RunDirectory


@pytest.fixture(scope="module")
def parallel_model(tmp_path_factory) -> Path:
    """Blocks in which attention and MLP stand side by side."""
    directory = tmp_path_factory.mktemp("gpt-neox")
    config = GPTNeoXConfig(
        vocab_size=258, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def quantize(model: Path, run: Path, num_workers: int) -> Made:
    skeleton = Skeleton.build(ModelSource.open(model), torch.float32)
    quantizer = GPTQ(wbits=3, groupsize=64, mse=True)
    settings = worker_settings(skeleton, quantizer, QEPConfig(), NUM_SHARDS, run)
    return make(settings, LocalExecutor(num_workers), shards())


def methods(run: Path) -> list[str]:
    units = [unit for event in RunDirectory(run).events("units") for unit in event["units"]]
    return [unit["method"] for unit in units]


def test_stages_are_observed_ahead_with_the_same_bytes(parallel_model, tmp_path):
    one_by_one = quantize(parallel_model, tmp_path / "one", 1)
    at_once = quantize(parallel_model, tmp_path / "two", 2)
    assert "observe_ahead" not in methods(tmp_path / "one")
    assert methods(tmp_path / "two").count("observe_ahead") >= 3 * 2
    assert_same(at_once, one_by_one)
