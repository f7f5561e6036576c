"""No tensor of a checkpoint can change, go or come without `verify` saying so."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onecomp.calibration import CalibrationConfig
from onecomp.errors import InputError
from onecomp.executor import LocalExecutor
from onecomp.export.verify import Verification, same_bits, verify_checkpoint
from onecomp.job import QuantizationJob
from onecomp.models import ModelConfig, ModelSource
from onecomp.quantizer import RTN, QuantizationResult, Quantizer
from onecomp.quantizer.rtn.result import RTNResult
from onecomp.session import Session
from onecomp.store import RunDirectory

RTN_4 = RTN(wbits=4, groupsize=32)
BLOCK = "model.decoder.layers.1"
K_PROJ = f"{BLOCK}.self_attn.k_proj"
LAST = "model-00003-of-00003.safetensors"
"""Shard of block 1."""


class HalfPrecision(Quantizer):
    """A method without a checkpoint format."""

    def quantize_layer(self, module: nn.Module, input=None, hessian=None) -> Tensor:  # noqa: A002
        return module.weight.data.half()


@dataclass
class OwnResult(QuantizationResult):
    """A result that nothing but its method can pack."""

    packed_as: ClassVar[dict[str, RTNResult]] = {}


class OwnMethod(RTN):
    """A method of the user's own that saves in a known layout."""

    def quantize_weights(self, weights, factors):
        OwnResult.packed_as.update(super().quantize_weights(weights, factors))
        return {n: OwnResult(OwnResult.packed_as[n].dequantize()) for n in weights}

    def create_inference_layer(self, result, linear_module, **kwargs):
        [packed] = [
            r
            for r in OwnResult.packed_as.values()
            if same_bits(r.dequantize(), result.dequantized_weight)
        ]
        return super().create_inference_layer(packed, linear_module, **kwargs)


def quantize(model: Path, folder: Path, quantizer: Quantizer = RTN_4, dtype="float32") -> Session:
    """A run in ``folder / "run"`` and its checkpoint in ``folder / "out"``."""
    config = ModelConfig(path=str(model), dtype=dtype, device="cpu")
    job = QuantizationJob(config, quantizer, CalibrationConfig())
    session = Session.open(job, folder / "run", output=folder / "out")
    executor = LocalExecutor(1)
    session.quantize(executor, report_progress=False)
    executor.stop()
    return session


@dataclass(frozen=True)
class Made:
    """A checkpoint, its run, and the original model."""

    model: Path
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "out"

    def verify(self, *, with_original: bool = True) -> Verification:
        source = ModelSource.open(self.model) if with_original else None
        return verify_checkpoint(self.checkpoint, RunDirectory(self.folder / "run"), source)

    def change(self, change: Callable[[dict], object], shard: str = LAST) -> None:
        tensors = {n: t.clone() for n, t in load_file(self.checkpoint / shard).items()}
        change(tensors)
        save_file(tensors, self.checkpoint / shard, metadata={"format": "pt"})

    def change_config(self, change: Callable[[dict], object]) -> None:
        config = json.loads((self.checkpoint / "config.json").read_text())
        change(config)
        (self.checkpoint / "config.json").write_text(json.dumps(config))

    def copy(self, folder: Path) -> "Made":
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Made(self.model, folder)


@pytest.fixture(scope="module")
def packed(tiny_model_dir, tmp_path_factory) -> Made:
    """OPT, all of whose layers have biases, in 4 bits: not to be changed."""
    made = Made(tiny_model_dir("opt"), tmp_path_factory.mktemp("packed"))
    quantize(made.model, made.folder)
    return made


@pytest.fixture(scope="module")
def dense(tiny_model_dir, tmp_path_factory) -> Made:
    """The same by a method without a format: not to be changed."""
    made = Made(tiny_model_dir("opt"), tmp_path_factory.mktemp("dense"))
    quantize(made.model, made.folder, HalfPrecision(), "bfloat16")
    return made


def flip_bit(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[-1] ^= 1


def num_tensors(directory: Path) -> int:
    return len(ModelSource(str(directory), directory).tensor_files)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float16"), ("qwen2", "bfloat16"), ("gemma3", "float16")]
)
def test_what_a_run_wrote_has_no_problems(tiny_model_dir, tmp_path, family, dtype):
    made = Made(tiny_model_dir(family, tie=family == "gemma3"), tmp_path)
    quantize(made.model, tmp_path, RTN(wbits=3, groupsize=32), dtype)
    found = made.verify()
    assert found.problems == []
    assert (found.num_layers, found.num_not_compared) == (14, 0)
    packed_tensors = 4 * found.num_layers
    assert found.num_other_tensors == num_tensors(made.checkpoint) - packed_tensors


@pytest.mark.parametrize(("wbits", "pack_weights"), [(1, True), (4, False)])
def test_unpacked_checkpoints_are_compared_too(tiny_model_dir, tmp_path, wbits, pack_weights):
    made = Made(tiny_model_dir("llama"), tmp_path)
    session = quantize(made.model, tmp_path, RTN(wbits=wbits, groupsize=32))
    shutil.rmtree(made.checkpoint)
    writer = session.writer(made.checkpoint, dequantized=False, pack_weights=pack_weights)
    session.export(writer, session.run.results())
    assert made.verify().problems == []
    name = "model.layers.1.mlp.up_proj"
    made.change(lambda t: flip_bit(t[f"{name}.qzeros"]))
    [problem] = made.verify().problems
    assert problem.startswith(f"{name}: differs from the run's result in qzeros, by up to ")


def test_a_bit_in_any_tensor_is_reported(packed, tmp_path):
    made = packed.copy(tmp_path)
    for shard, part in (("model-00001-of-00003.safetensors", ""), (LAST, "k_proj"), (LAST, "norm")):
        for name in [name for name in load_file(packed.checkpoint / shard) if part in name]:
            made.change(lambda tensors, name=name: flip_bit(tensors[name]), shard)
            [problem] = made.verify().problems
            shutil.copy(packed.checkpoint / shard, made.checkpoint / shard)
            module, _, leaf = name.rpartition(".")
            if leaf in {"weight", "bias"}:
                assert problem == f"{name}: differs from the original model's."
            elif leaf == "g_idx":
                assert problem.startswith(f"{module}: cannot be loaded: g_idx has values from 0")
            else:
                assert problem.startswith(f"{module}: differs from the run's result in {leaf}, by ")


def test_codes_and_zero_points_that_are_shifted_together_are_reported(tiny_model_dir, tmp_path):
    made = Made(tiny_model_dir("opt"), tmp_path)
    session = quantize(made.model, tmp_path, RTN(wbits=4, groupsize=32, sym=True))
    shutil.rmtree(made.checkpoint)
    writer = session.writer(made.checkpoint, dequantized=False, pack_weights=False)
    session.export(writer, session.run.results())

    def shift(tensors: dict[str, Tensor]) -> None:
        tensors[f"{K_PROJ}.qweight"] += 1
        tensors[f"{K_PROJ}.qzeros"] += 1

    made.change(shift)
    expected = f"{K_PROJ}: differs from the run's result in qweight, qzeros, by up to 0."
    assert made.verify().problems == [expected]


def test_every_tensor_that_is_missing_is_reported(packed, tmp_path):
    made = packed.copy(tmp_path)
    names = [f"{K_PROJ}.bias", f"{K_PROJ}.qzeros", f"{BLOCK}.final_layer_norm.weight"]
    made.change(lambda tensors: [tensors.pop(name) for name in names])
    assert sorted(made.verify().problems) == sorted(
        f"{n}: missing in the checkpoint." for n in names
    )
    shard = "model-00001-of-00003.safetensors"
    made.change(lambda tensors: tensors.pop("lm_head.weight"), shard)
    assert "lm_head.weight: missing in the checkpoint." in made.verify().problems


def test_a_layer_that_is_missing_is_reported_once(packed, tmp_path):
    made = packed.copy(tmp_path)
    made.change(
        lambda t: [t.pop(n) for n in list(t) if n.startswith(K_PROJ + ".") and "bias" not in n]
    )
    assert made.verify().problems == [f"{K_PROJ}: missing in the checkpoint."]
    made.change(lambda t: t.pop(f"{K_PROJ}.bias"))
    expected = [
        f"{K_PROJ}: missing in the checkpoint.",
        f"{K_PROJ}.bias: missing in the checkpoint.",
    ]
    assert made.verify().problems == expected


@pytest.mark.parametrize("name", ["model.nonesuch", f"{K_PROJ}.weight", f"{BLOCK}.extra.bias"])
def test_a_tensor_without_counterpart_is_reported(packed, tmp_path, name):
    made = packed.copy(tmp_path)
    made.change(lambda tensors: tensors.update({name: torch.ones(3)}))
    assert made.verify().problems == [f"{name}: has no counterpart."]


def test_a_tensor_in_another_dtype_or_shape_is_reported(packed, tmp_path):
    made = packed.copy(tmp_path)
    bias, norm = f"{K_PROJ}.bias", f"{BLOCK}.final_layer_norm.weight"
    made.change(lambda t: t.update({bias: t[bias].half(), norm: t[norm][:8].clone()}))
    assert sorted(made.verify().problems) == [
        f"{norm}: has float32 (8,) instead of the original's float32 (64,).",
        f"{bias}: has float16 (64,) instead of the original's float32 (64,).",
    ]


@pytest.mark.parametrize("block", [0, 1])
def test_layers_whose_results_are_gone_are_reported(packed, tmp_path, block):
    made = packed.copy(tmp_path)
    RunDirectory(made.folder / "run").block_path(block).unlink()
    for with_original in (True, False):
        found = made.verify(with_original=with_original)
        assert found.num_layers == 6
        assert len(found.problems) == 6
        name = f"model.decoder.layers.{block}.fc1"
        assert f"{name}: is quantized, but the run holds no result for it." in found.problems


def test_a_layer_that_the_configuration_does_not_list_is_reported(packed, tmp_path):
    made = packed.copy(tmp_path)
    made.change_config(lambda c: c["quantization_config"]["quantized_layer_names"].remove(K_PROJ))
    assert made.verify().problems == [
        f"{K_PROJ}: was quantized by the run, but the quantization_config does not list it."
    ]


def test_a_configuration_that_does_not_fit_the_tensors_is_reported(packed, tmp_path):
    made = packed.copy(tmp_path)

    def widen(config: dict) -> None:
        blocks = config["quantization_config"]["quantization_bits"]
        blocks[1]["self_attn.k_proj"]["bits"] = 8

    made.change_config(widen)
    [problem] = made.verify().problems
    assert K_PROJ in problem
    made.change_config(lambda c: c.pop("quantization_config"))
    problems = made.verify().problems
    assert f"{K_PROJ}.weight: missing in the checkpoint." in problems
    assert f"{K_PROJ}.qweight: has no counterpart." in problems


def test_a_checkpoint_that_does_not_load_is_reported(packed, tmp_path):
    made = packed.copy(tmp_path)
    made.change_config(lambda config: config.update(num_hidden_layers=3))
    [problem] = made.verify().problems
    assert "tensors missing in the checkpoint: model.decoder.layers.2" in problem


@pytest.mark.parametrize("other", [RTN(wbits=3, groupsize=32), RTN(wbits=4, groupsize=64)])
def test_the_results_of_another_run_differ(packed, tmp_path, other):
    quantize(packed.model, tmp_path, other)
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(packed.checkpoint, tmp_path / "out")
    problems = Made(packed.model, tmp_path).verify().problems
    assert len(problems) == 12
    assert all(": differs from the run's result in " in problem for problem in problems)


def test_another_place_does_not_matter(packed, tmp_path):
    made = packed.copy(tmp_path)
    path = made.folder / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output": "elsewhere"}))
    assert made.verify().problems == []


def test_without_the_original_the_rest_is_counted_as_not_compared(packed, tmp_path):
    made = packed.copy(tmp_path)
    made.change(lambda tensors: tensors[f"{K_PROJ}.bias"].fill_(123))
    found = made.verify(with_original=False)
    assert (found.num_layers, found.num_other_tensors, found.problems) == (12, 0, [])
    assert found.num_not_compared == num_tensors(made.checkpoint) - 4 * 12
    assert made.verify().problems == [f"{K_PROJ}.bias: differs from the original model's."]


def test_the_weight_decides_where_only_the_users_method_knows_the_tensors(tiny_model_dir, tmp_path):
    made = Made(tiny_model_dir("opt"), tmp_path)
    quantize(made.model, tmp_path, OwnMethod(wbits=4, groupsize=32))
    found = made.verify()
    assert (found.num_layers, found.problems) == (12, [])
    made.change(lambda tensors: flip_bit(tensors[f"{K_PROJ}.qweight"]))
    [problem] = made.verify().problems
    assert problem.startswith(f"{K_PROJ}: differs from the run's result, by up to ")


# Dequantized


def test_dequantized_weights_are_compared(dense, tmp_path):
    made = dense.copy(tmp_path)
    found = made.verify()
    assert (found.num_layers, found.problems) == (12, [])
    assert found.num_layers + found.num_other_tensors == num_tensors(made.checkpoint)
    made.change(lambda t: [flip_bit(t[f"{K_PROJ}.{leaf}"]) for leaf in ("weight", "bias")])
    layer, bias = made.verify().problems
    assert layer.startswith(f"{K_PROJ}: differs from the run's result in weight, by up to ")
    assert bias == f"{K_PROJ}.bias: differs from the original model's."
    made.change(lambda t: t.update({f"{K_PROJ}.weight": t[f"{K_PROJ}.weight"][:3].clone()}))
    assert (
        f"{K_PROJ}: has bfloat16 (3, 64) instead of the result's bfloat16 (64, 64)."
        in made.verify().problems
    )


def test_dequantized_codes_are_compared_and_missing_results_noticed(packed, tmp_path):
    made = packed.copy(tmp_path)
    session = quantize(made.model, tmp_path / "again")
    shutil.rmtree(made.checkpoint)
    writer = session.writer(made.checkpoint, dequantized=True)
    session.export(writer, session.run.results())
    assert made.verify().problems == []
    RunDirectory(made.folder / "run").block_path(1).unlink()
    problems = made.verify().problems
    assert len(problems) == 6
    assert f"{K_PROJ}.weight: differs from the original model's." in problems


# What cannot be compared


def test_a_run_without_results_and_damaged_files_are_refused(packed, tmp_path):
    made = packed.copy(tmp_path)
    shard = made.checkpoint / LAST
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{LAST}: is truncated or corrupt"):
        made.verify()
    made.change_config(lambda config: config.update(dtype="float17"))
    with pytest.raises(InputError, match=r"config\.json: dtype='float17' is no type"):
        made.verify()
    shutil.rmtree(made.folder / "run" / "blocks")
    with pytest.raises(InputError, match="holds no results to compare with"):
        made.verify()


def bits(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def test_bits_are_compared_and_not_values():
    nan = bits([math.nan, 1.0])
    assert same_bits(nan, nan.clone())
    assert not torch.equal(nan, nan.clone())
    assert not same_bits(bits([0.0]), bits([-0.0]))
    assert not same_bits(bits([1.0]), bits([1.0], torch.float64))
    assert not same_bits(bits([1.0]), bits([1.0])[0])
    assert same_bits(bits([2.0, 1.0, 3.0])[::2], bits([2.0, 3.0]))
    assert same_bits(bits([1.0])[0], bits([1.0])[0])
    assert same_bits(bits([]), bits([]))
