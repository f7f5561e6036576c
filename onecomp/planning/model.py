"""Reading the shapes of a model: its configuration and the headers of its files, no weight."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from onecomp.errors import ConfigError, InputError
from onecomp.models.config import DTYPES
from onecomp.models.skeleton import Skeleton, find_blocks
from onecomp.models.source import CONFIG_ERRORS, ModelSource, StoredTensor, reason
from onecomp.planning.blocks import block_kinds, target_layers
from onecomp.planning.shapes import BlockShape, ModelShape, StoredWeights
from onecomp.quantizer import Quantizer

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64}
BITS |= {"I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class PlannedModel:
    """A model without weights, from a directory that need not have any."""

    skeleton: Skeleton
    headers: Mapping[str, StoredTensor]
    """Empty where there are no weight files."""
    num_files: int
    stored_method: str | None
    """The quantization that config.json says the weights have; a run refuses such a model."""
    num_outer_parameters: int
    """Outside the blocks; tied tensors count once."""

    @classmethod
    def open(cls, model_id: str, dtype: str, *, trust_remote_code: bool = False) -> "PlannedModel":
        """Read the configuration, build the modules, read the headers of weight files.

        Args:
            model_id: Directory, or a Hub id of which the configuration alone is downloaded.
            dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the model's own.
            trust_remote_code: Allow the model's own Python code to run.

        Raises:
            InputError: No model, or none that can be planned.
        """
        if dtype not in {*DTYPES, "auto"}:
            rule = f"dtype={dtype!r}: must be one of {', '.join(DTYPES)} or auto."
            raise ConfigError("plan", [rule])
        source = ModelSource(model_id, _directory(model_id), trust_remote_code)
        config = _read_config(source)
        quantization = getattr(config, "quantization_config", None)
        stored_method = None if quantization is None else str(dict(quantization)["quant_method"])
        if quantization is not None:
            del config.quantization_config
        skeleton = _build(source, config, DTYPES.get(dtype) or config.dtype or torch.float32)
        return cls.of(skeleton, stored_method)

    @classmethod
    def of(cls, skeleton: Skeleton, stored_method: str | None = None) -> "PlannedModel":
        """A model whose modules are built already."""
        source = skeleton.source
        has_files = any(source.directory.glob("*.safetensors"))
        return cls(
            skeleton,
            source.headers() if has_files else {},
            len(set(source.tensor_files.values())) if has_files else 0,
            stored_method,
            _num_outer_parameters(skeleton),
        )

    def shape(self, quantizer: Quantizer) -> ModelShape:
        """The shapes of a run of ``quantizer``.

        Raises:
            ConfigError: No layer is selected, or layers do not fit the settings.
            InputError: A block that cannot be run without weights.
        """
        skeleton, model = self.skeleton, self.skeleton.model
        kinds = block_kinds(skeleton, target_layers(quantizer, skeleton))
        embedding = model.get_input_embeddings()
        return ModelShape(
            name=skeleton.source.model_id,
            architecture=type(model).__name__,
            dtype=str(skeleton.dtype).removeprefix("torch."),
            dtype_bytes=skeleton.dtype.itemsize,
            hidden_size=embedding.embedding_dim,
            num_blocks=len(skeleton.blocks),
            kinds=kinds,
            num_outer_parameters=self.num_outer_parameters,
            num_embedding_weights=embedding.weight.numel(),
            stored=_stored(self.headers, self.num_files),
            notes=(*_coverage_notes(kinds), *self._notes_on_files()),
        )

    def _notes_on_files(self) -> list[str]:
        notes = []
        if self.stored_method is not None:
            notes.append(
                f"The weights are stored quantized ({self.stored_method}): `quantize` refuses "
                f"them. Convert them to {self.skeleton.dtype} first; the plan is for that model."
            )
        odd = {tensor.dtype for tensor in self.headers.values()} - FLOATING
        if odd and self.stored_method is None:
            notes.append(f"Some tensors are stored as {', '.join(sorted(odd))}, not as weights.")
        if not self.headers:
            notes.append("No weight files: sizes follow from the configuration.")
        return notes


def _num_outer_parameters(skeleton: Skeleton) -> int:
    """Outside the blocks; without weights, tied tensors are not one yet."""
    model, prefix = skeleton.model, skeleton.blocks_name + "."
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(prefix) and name not in model.all_tied_weights_keys
    )


def _directory(model_id: str) -> Path:
    path = Path(model_id).expanduser()
    if path.is_file():
        raise InputError(model_id, "is a file. Give the model's directory or a Hub id.")
    try:
        directory = path if path.is_dir() else Path(_download_configuration(model_id))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            model_id,
            "is not a directory, and the Hub has no such model or cannot be reached "
            f"({type(error).__name__}). Check the path, or put the model's config.json in a "
            "directory: a plan needs no more.",
        ) from error
    if not (directory / "config.json").is_file():
        raise InputError(directory, "holds no config.json, so it is not a Hugging Face model.")
    return directory.resolve()


def _download_configuration(model_id: str) -> str:
    return snapshot_download(model_id, allow_patterns=["config.json", "*.py"])


def _read_config(source: ModelSource) -> PretrainedConfig:
    path = source.directory / "config.json"
    try:
        return AutoConfig.from_pretrained(
            source.directory, trust_remote_code=source.trust_remote_code
        )
    except CONFIG_ERRORS as error:
        raise InputError(
            path,
            f"cannot be read as a model configuration ({reason(error)}). Correct it, or download "
            "the model again.",
        ) from error


def _build(source: ModelSource, config: PretrainedConfig, dtype: torch.dtype) -> Skeleton:
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=source.trust_remote_code
            )
    except CONFIG_ERRORS as error:
        raise InputError(
            source.directory / "config.json",
            f"describes no causal language model that can be built ({reason(error)}). "
            "Correct it, or give a decoder-only model.",
        ) from error
    return Skeleton(source, model.eval(), find_blocks(model, source), dtype)


def _stored(headers: Mapping[str, StoredTensor], num_files: int) -> StoredWeights | None:
    if not headers:
        return None
    values: Counter[str] = Counter()
    for tensor in headers.values():
        values[tensor.dtype] += torch.Size(tensor.shape).numel()
    num_bytes = {dtype: count * BITS.get(dtype, 8) // 8 for dtype, count in values.items()}
    dtypes = tuple(sorted(num_bytes, key=lambda dtype: -num_bytes[dtype]))
    return StoredWeights(sum(num_bytes.values()), values.total(), dtypes, num_files)


def _coverage_notes(kinds: tuple[BlockShape, ...]) -> list[str]:
    weights = sum(kind.count * kind.num_matrix_weights for kind in kinds)
    fused = sum(kind.count * kind.num_fused_weights for kind in kinds)
    if not fused:
        return []
    return [
        f"{fused / weights:.1%} of the weights in the blocks are fused in tensors of several "
        "layers (experts), which are not quantized: they are copied as they are."
    ]
