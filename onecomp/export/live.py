"""Writing a live quantized model as a checkpoint, one shard for each block."""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onecomp.export.checkpoint import ADAPTER_FOLDER, finish_checkpoint, write_shard
from onecomp.export.install import require_no_checkpoint
from onecomp.export.quant_config import split_layer_name
from onecomp.quantizer.quant_linear import QuantLinear


def save_live_model(
    model: PreTrainedModel,
    directory: Path,
    *,
    source_dir: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a model whose quantized layers are in place, e.g. one that was trained.

    The configuration is the model's own with its ``quantization_config``; ``load_quantized_model``
    gives the same model back. LoRA adapters go to ``ADAPTER_FOLDER`` in the directory, from which
    ``PeftModel.from_pretrained`` puts them on that model.

    Args:
        model: On any device.
        directory: New directory.
        source_dir: Checkpoint whose tokenizer and other files are copied.
        tokenizer: Written instead of copying the source's.

    Raises:
        InputError: The directory already holds a checkpoint.
    """
    require_no_checkpoint(directory)
    with _adapters_apart(model, directory / ADAPTER_FOLDER):
        shards = _by_shard(_stored_tensors(model))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        write_shard(directory, name, tensors)
    config = copy.copy(model.config).to_dict()
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = dict(model.config.quantization_config)
    finish_checkpoint(directory, names, config, source_dir, tokenizer)


def _adapters_apart(model: PreTrainedModel, directory: Path) -> AbstractContextManager[None]:
    """The model without its LoRA adapters, which are written to ``directory``, if it has any."""
    if "peft_config" not in vars(model):
        return nullcontext()
    # PEFT takes half a second to import, and was imported by whoever made the adapters.
    from onecomp.post_process.lora.adapter import save_adapter, without_adapters  # noqa: PLC0415

    save_adapter(model, directory)
    return without_adapters(model)


def _stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its full name; of tied ones the first."""
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    tensors = {
        f"{name}.{key}": tensor
        for name, layer in quantized.items()
        for key, tensor in layer.packed_state().items()
    }
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.numel())
        if name.rpartition(".")[0] not in quantized and place not in seen:
            seen.add(place)
            tensors[name] = tensor
    return tensors


def _by_shard(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What lies outside the blocks, and each block."""
    shards: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place = split_layer_name(name)
        shards.setdefault(-1 if place is None else place[0], {})[name] = tensor
    return [shards[index] for index in sorted(shards)]
