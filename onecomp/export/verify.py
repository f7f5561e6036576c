"""Compares a written checkpoint, tensor by tensor and bit by bit, with what it was made from.

The tensors of quantized layers come from the run's results, all others from the original model.
One tensor, or one block's results, is in memory at a time.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecomp.errors import InputError
from onecomp.export.checkpoint import CONFIG
from onecomp.export.load import (
    CODE_TENSORS,
    by_module,
    checkpoint_directory,
    load_layer,
    load_quantized_model,
    read_json,
)
from onecomp.export.quant_config import LayerFormat, check_quant_config, quantized_layers
from onecomp.export.save import block_names, outer_names
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import ModelSource
from onecomp.quantizer.inference import inference_layer
from onecomp.quantizer.result import QuantizationResult
from onecomp.quantizer.several import methods_of
from onecomp.store import RunDirectory


@dataclass(frozen=True)
class Verification:
    """What was compared and what did not agree."""

    num_layers: int
    """Layers whose tensors were compared with the run's results."""
    num_other_tensors: int
    """Tensors that were compared with the original model's."""
    problems: list[str]
    num_not_compared: int = 0
    """Tensors that only an original model could be compared with, and none was given."""


def verify_checkpoint(
    directory: Path, run: RunDirectory, source: ModelSource | None
) -> Verification:
    """Compare every tensor of a checkpoint with its origin, and require that none is missing.

    Quantized layers must hold the bits that the run's results give, packed or dequantized, and
    every quantized layer must have a result. All other tensors, biases of quantized layers
    included, must be the original model's in the checkpoint's dtype. A quantized checkpoint
    without other problems is also loaded as a whole; a dequantized one is an ordinary model.

    Args:
        directory: The checkpoint.
        run: The run that wrote it.
        source: The original model; None leaves out what did not come from the results.

    Raises:
        InputError: The checkpoint cannot be read, or the run has no results.
    """
    results = run.results()
    if not len(results):
        raise InputError(run.path, "holds no results to compare with. Give the run's directory.")
    if methods := methods_of(results):
        raise InputError(
            run.path,
            f"holds the results of several methods ({', '.join(methods)}), of which a checkpoint "
            "has one. Quantize with that one alone to compare.",
        )
    checkpoint = Checkpoint.open(directory, run)
    problems = checkpoint.coverage_problems(results)
    for name in results:
        problems += checkpoint.layer_problems(name, results[name])
    layers = {*results, *checkpoint.quantized, *checkpoint.packed}
    rest = checkpoint.names_outside(layers)
    names = {} if source is None else _names_outside(layers, source, checkpoint.dtype)
    if source is not None:
        problems += checkpoint.other_problems(names, source)
        problems += [f"{name}: has no counterpart." for name in sorted(rest - names.keys())]
    if not problems:
        problems += checkpoint.loading_problems()
    num_layers = len(results.keys() & checkpoint.modules.keys())
    num_others = len(rest & names.keys())
    return Verification(num_layers, num_others, problems, len(rest) if source is None else 0)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration, and its tensors as far as they are asked for."""

    files: ModelSource
    quantization: dict[str, Any] | None
    """``quantization_config``; None for dequantized weights."""
    dtype: torch.dtype
    """Of everything that is not quantized."""

    @classmethod
    def open(cls, directory: Path, run: RunDirectory) -> "Checkpoint":
        """Read everything but the tensors.

        Raises:
            InputError: It is no checkpoint, or one of an unknown kind.
        """
        model = run.record()["model"]
        path = checkpoint_directory(directory, local_files_only=False)
        settings = read_json(path / CONFIG)
        quantization = settings.get("quantization_config")
        if quantization is not None:
            check_quant_config(quantization, path)
        files = ModelSource(str(path), path, model.get("trust_remote_code") is True)
        dtype_name = settings.get("dtype") or model["dtype"]
        dtype = getattr(torch, str(dtype_name), None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(path / CONFIG, f"dtype={dtype_name!r} is no type of torch.")
        return cls(files, quantization, dtype)

    @cached_property
    def modules(self) -> dict[str, dict[str, Path]]:
        """Files of each module's own tensors, by their name inside the module."""
        return by_module(self.files.tensor_files)

    @cached_property
    def packed(self) -> set[str]:
        """Layers with codes among their tensors."""
        return {name for name, leaves in self.modules.items() if CODE_TENSORS & set(leaves)}

    @cached_property
    def quantized(self) -> dict[str, LayerFormat]:
        """Layers that are quantized by the configuration."""
        if self.quantization is None:
            return {}
        return quantized_layers(self.quantization, self.modules)

    def names_outside(self, layers: Collection[str]) -> set[str]:
        """Tensors other than what a layer has instead of or for its weight."""
        return {
            name
            for name in self.files.tensor_files
            if name.endswith(".bias") or name.rpartition(".")[0] not in layers
        }

    # Quantized layers

    def coverage_problems(self, results: Collection[str]) -> list[str]:
        """Layers that are quantized and have no result, or the other way round."""
        found = self.packed | self.quantized.keys()
        problems = [
            f"{name}: is quantized, but the run holds no result for it."
            for name in sorted(found - set(results))
        ]
        if self.quantization is not None:
            problems += [
                f"{name}: was quantized by the run, but the quantization_config does not list it."
                for name in results
                if name not in self.quantized
            ]
        return problems

    def layer_problems(self, name: str, result: QuantizationResult) -> list[str]:
        """What is wrong with one layer's tensors, its bias aside."""
        leaves = [leaf for leaf in self.modules.get(name, ()) if leaf != "bias"]
        if not leaves:
            return [f"{name}: missing in the checkpoint."]
        read = self.files.read(f"{name}.{leaf}" for leaf in leaves)
        found = {leaf: read[f"{name}.{leaf}"] for leaf in leaves}
        weight = result.dequantize()
        if self.quantization is None:
            expected = {"weight": weight.to(self.dtype)}
        else:
            expected = _packed_state(result, tuple(weight.shape), found)
        missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
        if missing or unknown:
            problems = [f"{name}.{leaf}: missing in the checkpoint." for leaf in sorted(missing)]
            return problems + [f"{name}.{leaf}: has no counterpart." for leaf in sorted(unknown)]
        wrong = [leaf for leaf in sorted(expected) if not same_bits(found[leaf], expected[leaf])]
        return self._weight_problems(name, found, weight, wrong)

    def _weight_problems(
        self, name: str, found: dict[str, Tensor], weight: Tensor, wrong: list[str]
    ) -> list[str]:
        """Whether the layer computes with ``weight``, which does not depend on how it is packed.

        Args:
            name: The layer.
            found: Its tensors.
            weight: As the result dequantizes.
            wrong: Which tensors differ from the result's.
        """
        if self.quantization is None:
            loaded, weight = found["weight"], weight.to(self.dtype)
        elif name in self.quantized:
            try:
                layer = load_layer(found, self.quantized[name], name, self.files.directory)
            except InputError as error:
                return [f"{name}: cannot be loaded: {error.problem}"]
            loaded = layer.dequantize()
        else:
            return []  # reported already
        if _kind(loaded) != _kind(weight):
            return [f"{name}: has {_kind(loaded)} instead of the result's {_kind(weight)}."]
        if not wrong and same_bits(loaded, weight):
            return []
        difference = (loaded.float() - weight.float()).abs().max().item()
        where = f" in {', '.join(wrong)}" if wrong else ""
        return [f"{name}: differs from the run's result{where}, by up to {difference:.3g}."]

    # Everything else

    def other_problems(self, names: Mapping[str, str], source: ModelSource) -> Iterator[str]:
        """What differs from the original model.

        Args:
            names: Name in the checkpoint -> name in the original model.
            source: The original model.
        """
        for name, stored in names.items():
            if name not in self.files.tensor_files:
                yield f"{name}: missing in the checkpoint."
                continue
            found = self.files.read([name])[name]
            original = source.read([stored], dtype=self.dtype)[stored]
            if _kind(found) != _kind(original):
                yield f"{name}: has {_kind(found)} instead of the original's {_kind(original)}."
            elif not same_bits(found, original):
                yield f"{name}: differs from the original model's."

    def loading_problems(self) -> list[str]:
        """What keeps a quantized checkpoint from being loaded; its tensors are mapped, not read."""
        if self.quantization is None:
            return []
        try:
            load_quantized_model(
                self.files.directory,
                device_map="cpu",
                trust_remote_code=self.files.trust_remote_code,
            )
        except InputError as error:
            return [str(error)]
        return []


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits; equal NaNs are equal."""
    if _kind(found) != _kind(expected):
        return False
    bytes_of = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
    return torch.equal(*bytes_of)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _packed_state(
    result: QuantizationResult, shape: tuple[int, int], found: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """A layer's tensors as its result gives them, packed or not as in the checkpoint."""
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    try:
        packed = inference_layer(result, linear).packed_state()
    except NotImplementedError:
        return found  # a method of the user's own: its dequantized weight decides
    unpacked = inference_layer(result, linear, pack_weights=False).packed_state()
    alike = {leaf: tensor.shape for leaf, tensor in found.items()}
    return unpacked if alike == {n: t.shape for n, t in unpacked.items()} else packed


def _names_outside(
    layers: Collection[str], source: ModelSource, dtype: torch.dtype
) -> dict[str, str]:
    """Tensors that are copied from the original: name in the checkpoint -> name in the original."""
    skeleton = Skeleton.build(source, dtype)
    names = outer_names(skeleton)
    for index in range(len(skeleton.blocks)):
        names |= block_names(skeleton, index)
    return {n: s for n, s in names.items() if n.removesuffix(".weight") not in layers}
