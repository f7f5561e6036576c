"""Reloads a written checkpoint and compares it, layer by layer, with what the run recorded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from onecomp.errors import InputError
from onecomp.export.load import load_quantized_model
from onecomp.models.source import ModelSource
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.store import RunDirectory, StoredResults


@dataclass(frozen=True)
class Verification:
    """What was compared and what did not agree."""

    num_layers: int
    num_other_tensors: int
    problems: list[str]


def verify_checkpoint(
    directory: Path, run: RunDirectory, source: ModelSource | None
) -> Verification:
    """Load a checkpoint through the ordinary loader and compare every tensor with its origin.

    Quantized layers must dequantize to exactly what the run's results say, all other tensors must
    equal the original model's in the checkpoint's dtype.

    Args:
        directory: The checkpoint.
        run: The run that wrote it.
        source: The original model; None skips the tensors that were not quantized.

    Raises:
        InputError: The checkpoint cannot be loaded, or the run has no results.
    """
    results = run.results()
    if not len(results):
        raise InputError(run.path, "holds no results to compare with. Give the run's directory.")
    model, _ = load_quantized_model(directory, device_map="cpu")
    problems = [p for name in results if (p := _layer_problem(model, name, results))]
    others = {} if source is None else _other_tensors(model, results)
    stored = {n for n in others if source is not None and n in source.tensor_files}
    for name in sorted(stored):
        original = source.read([name], dtype=others[name].dtype)[name]
        if not torch.equal(original, others[name]):
            problems.append(f"{name}: differs from the original model's.")
    return Verification(len(results), len(stored), problems)


def _layer_problem(model: PreTrainedModel, name: str, results: StoredResults) -> str | None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return f"{name}: missing in the checkpoint."
    expected = results[name].dequantize()
    if isinstance(layer, QuantLinear):
        found = layer.dequantize()
    else:
        found, expected = layer.weight, expected.to(layer.weight.dtype)
    if torch.equal(found, expected):
        return None
    difference = (found.float() - expected.float()).abs().max().item()
    return f"{name}: differs from the run's result by up to {difference:.3g}."


def _other_tensors(model: nn.Module, results: StoredResults) -> dict[str, torch.Tensor]:
    prefixes = tuple(f"{name}." for name in results)
    return {n: t for n, t in model.state_dict().items() if not n.startswith(prefixes)}
