"""What the checkpoint writer refuses, and under which names it writes."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, tiny_model
from torch import nn

from onecomp.calibration import CalibrationConfig
from onecomp.errors import LayerError
from onecomp.executor import LocalExecutor
from onecomp.export.load import load_quantized_model
from onecomp.export.save import CheckpointWriter, require_finite
from onecomp.job import QuantizationJob
from onecomp.models import ModelConfig, ModelSource, Skeleton
from onecomp.quantizer import RTN, QuantizationResult
from onecomp.session import Session

BLOCK = "model.decoder.layers.1"
RTN_4 = RTN(wbits=4, groupsize=32)


def change_tensor(directory: Path, name: str, value: float, count: int = 2) -> None:
    """Overwrite the first values of a tensor."""
    file = directory / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[:count] = value
    save_file(tensors, file, metadata={"format": "pt"})


def skeleton_of(directory: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton.build(ModelSource.open(directory), dtype)


def rtn_results(skeleton: Skeleton, block_index: int) -> dict[str, QuantizationResult]:
    block = skeleton.load_block(block_index, torch.device("cpu"))
    prefix = skeleton.block_name(block_index)
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    return {f"{prefix}.{n}": RTN_4.quantize_layer(m) for n, m in layers.items()}


def write_all(writer: CheckpointWriter, skeleton: Skeleton) -> None:
    results = {}
    writer.write_outer(skeleton)
    for index in range(len(skeleton.blocks)):
        of_block = rtn_results(skeleton, index)
        writer.write_block(skeleton, index, of_block)
        results |= of_block
    writer.finish(skeleton, list(results))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.decoder.final_layer_norm.bias"])
def test_values_outside_the_blocks_must_be_finite(tmp_path, name, value):
    model = save_tiny_model("opt", tmp_path / "model")
    change_tensor(model, name, value)
    with pytest.raises(LayerError, match=rf"^{name}: 2 of \d+ values are NaN or infinite in fl"):
        CheckpointWriter(tmp_path, RTN_4, dequantized=False).write_outer(skeleton_of(model))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize("name", ["self_attn.k_proj.bias", "final_layer_norm.weight"])
def test_values_that_are_not_quantized_must_be_finite(tmp_path, name, dequantized):
    model = save_tiny_model("opt", tmp_path / "model")
    change_tensor(model, f"{BLOCK}.{name}", math.nan)
    skeleton = skeleton_of(model)
    writer = CheckpointWriter(tmp_path, RTN_4, dequantized)
    with pytest.raises(LayerError, match=rf"^{BLOCK}\.{name}: 2 of 64 values are NaN"):
        writer.write_block(skeleton, 1, rtn_results(skeleton, 1))
    assert not list(tmp_path.glob("*.safetensors"))


def test_scales_must_be_finite(tmp_path, tiny_model_dir):
    skeleton = skeleton_of(tiny_model_dir("llama"))
    results = rtn_results(skeleton, 0)
    results["model.layers.0.mlp.up_proj"].scale[0, 0] = math.inf
    with pytest.raises(LayerError, match=r"^model\.layers\.0\.mlp\.up_proj\.scales: 1 of 256"):
        CheckpointWriter(tmp_path, RTN_4, dequantized=False).write_block(skeleton, 0, results)


def test_values_too_large_for_the_dtype_are_named_with_it(tmp_path):
    model = save_tiny_model("llama", tmp_path / "model")
    change_tensor(model, "model.norm.weight", 1e5)
    with pytest.raises(LayerError, match=r"^model\.norm\.weight: .* float16 is too narrow"):
        CheckpointWriter(tmp_path, RTN_4, dequantized=False).write_outer(
            skeleton_of(model, torch.float16)
        )
    writer = CheckpointWriter(tmp_path, RTN_4, dequantized=False)
    writer.write_outer(skeleton_of(model, torch.bfloat16))


def test_a_run_over_a_damaged_output_head_stops_and_names_it(tmp_path):
    model = save_tiny_model("llama", tmp_path / "model")
    change_tensor(model, "lm_head.weight", math.nan, count=3)
    job = QuantizationJob(ModelConfig(path=str(model)), RTN_4, CalibrationConfig())
    session = Session.open(job, tmp_path / "run", output=tmp_path / "out")
    executor = LocalExecutor(1)
    try:
        with pytest.raises(LayerError, match=r"lm_head\.weight: 3 of 16512 values are NaN"):
            session.quantize(executor, report_progress=False)
    finally:
        executor.stop()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_value_among_many_is_found(dtype, place):
    tensor = torch.linspace(-1, 1, 1000, dtype=dtype)
    empty_and_whole = {"empty": tensor[:0], "whole": torch.tensor([3])}
    require_finite({"all": tensor, "one": tensor[0], **empty_and_whole})
    for value in (math.nan, math.inf, -math.inf):
        tensor[place] = value
        with pytest.raises(LayerError, match=r"^all: 1 of 1000"):
            require_finite({**empty_and_whole, "all": tensor})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_checkpoint_of_a_bare_model_has_the_models_names(tmp_path, family):
    whole = tiny_model(family, tie=True)
    whole.model.save_pretrained(tmp_path / "bare")
    whole.save_pretrained(tmp_path / "whole")
    for name in ("bare", "whole"):
        directory, skeleton = tmp_path / f"{name}-w4", skeleton_of(tmp_path / name)
        write_all(CheckpointWriter(directory, RTN_4, dequantized=False), skeleton)
    tensors = [
        ModelSource(name, tmp_path / f"{name}-w4").tensor_files.keys() for name in ("bare", "whole")
    ]
    assert set(tensors[0]) == set(tensors[1])
    model, _ = load_quantized_model(tmp_path / "bare-w4", device_map="cpu")
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings, whole.get_input_embeddings().weight)
