"""Checkpoints whose layers are of several methods, from a run to a model that computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor, nn

from onecomp.calibration import CalibrationConfig
from onecomp.executor import LocalExecutor
from onecomp.export.load import load_quantized_model
from onecomp.export.verify import verify_checkpoint
from onecomp.job import QuantizationJob
from onecomp.models import ModelConfig, ModelSource
from onecomp.quantizer import DBF, GPTQ, RTN, Onebit, Quantizer
from onecomp.quantizer.autobit import AutoBitQuantizer
from onecomp.quantizer.dbf.layer import DoubleBinaryLinear
from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.onebit.layer import OnebitLinear
from onecomp.session import Session

INPUT_IDS = torch.arange(24).view(2, 12)
LAYERS = {"k_proj": DoubleBinaryLinear, "up_proj": OnebitLinear, "fc1": OnebitLinear}
"""By the last part of their names; all others are GPTQ's."""


def mixed() -> AutoBitQuantizer:
    """GPTQ, DBF and OneBit for a layer of each block, RTN for all others."""
    methods = [
        GPTQ(wbits=3, groupsize=32, include_layer_keywords=["q_proj"]),
        DBF(target_bits=1.0, iters=4, include_layer_keywords=["k_proj"]),
        Onebit(iters=2, include_layer_keywords=["up_proj", "fc1"]),
        RTN(wbits=4, groupsize=32),
    ]
    return AutoBitQuantizer(quantizers=methods, assignment_strategy="manual")


def quantize(model: Path, text: Path, quantizer: Quantizer, folder: Path) -> Session:
    """A run in ``folder / "run"`` and its checkpoint in ``folder / "out"``."""
    job = QuantizationJob(
        ModelConfig(path=str(model), dtype="float32", device="cpu"),
        quantizer,
        CalibrationConfig(str(text), 64, 8, strategy="concat_chunk"),
    )
    session = Session.open(job, folder / "run", output=folder / "out")
    executor = LocalExecutor(1)
    session.quantize(executor, report_progress=False)
    executor.stop()
    return session


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_of_four_methods_computes_with_the_weights_of_the_run(
    tiny_model_dir, text, tmp_path, family
):
    source = tiny_model_dir(family)
    session = quantize(source, text, mixed(), tmp_path)
    dense, results = tiny_model(family), session.run.results()
    for name, result in results.items():
        dense.get_submodule(name).weight.data.copy_(result.dequantize())
    model, _ = load_quantized_model(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    for name in results:
        expected = LAYERS.get(name.rpartition(".")[2], GPTQLinear)
        assert type(model.get_submodule(name)) is expected
    assert len({type(result) for result in results.values()}) == 4
    found = verify_checkpoint(tmp_path / "out", session.run, ModelSource.open(source))
    assert (found.num_layers, found.problems) == (len(results), [])


def test_a_onebit_checkpoint_is_verified(tiny_model_dir, text, tmp_path):
    source = tiny_model_dir("llama")
    session = quantize(source, text, Onebit(iters=2), tmp_path)
    found = verify_checkpoint(tmp_path / "out", session.run, ModelSource.open(source))
    assert (found.num_layers, found.problems) == (14, [])
    changed = "model.layers.1.mlp.up_proj"
    for leaf in ("sign_packed", "a", "b"):
        [shard] = [
            path
            for path in (tmp_path / "out").glob("*.safetensors")
            if f"{changed}.{leaf}" in load_file(path)
        ]
        tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
        before = shard.read_bytes()
        tensors[f"{changed}.{leaf}"].view(torch.uint8)[-1] ^= 1
        save_file(tensors, shard, metadata={"format": "pt"})
        [problem] = verify_checkpoint(
            tmp_path / "out", session.run, ModelSource.open(source)
        ).problems
        shard.write_bytes(before)
        assert problem.startswith(f"{changed}: differs from the run's result in {leaf}, by ")
