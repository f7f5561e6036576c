"""How many bits a weight may take so that a model fits a GPU's memory; reads no weight.

Parameters are counted on the meta device: what no method quantizes (embeddings, norms, the output
head, fused experts) stays at 16 bits, and the cache of keys and values takes its part.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from onecomp.errors import ConfigError
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import ModelSource
from onecomp.quantizer.checks import as_number, group_size_problems, whole_problems

GB = 1e9
PLAIN_BYTES = 2
"""Of a parameter that is not quantized."""
NO_CACHE = ("linear_attention", "mamba", "conv")
"""Kinds of layers whose state does not grow with the text."""
SLIDING = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class VRAMBitwidthEstimation:
    """Bits a weight that fit, and what they follow from; GB are 1e9 bytes."""

    target_bitwidth: float
    """Raw bits of a code; scales and zero points come on top as ``meta_bits_per_param``."""
    total_vram_gb: float
    budget_gb: float
    """The part of it that may be used."""
    non_quant_weight_gb: float
    available_for_quant_gb: float
    total_params: int
    quantizable_params: int
    meta_bits_per_param: float
    kv_cache_gb: float = 0.0


def estimate_wbits_from_vram(  # noqa: PLR0913 - the documented signature
    model_id: str,
    vram_ratio: float = 0.8,
    *,
    total_vram_gb: float | None = None,
    group_size: int = 128,
    wbits: int = 4,
    max_length: int = 2048,
    batch_size: int = 1,
    kv_bits: int = 16,
    trust_remote_code: bool = False,
) -> VRAMBitwidthEstimation:
    """``estimate_target_bitwidth`` of a model by Hub id or directory, from its configuration.

    Args:
        model_id: Hub id or directory.
        vram_ratio: Part of the memory that weights and cache may take.
        total_vram_gb: Memory of the GPU, 1e9 bytes; None for that of the first one here.
        group_size: Columns that share a scale, -1 for a whole row.
        wbits: Bits of a zero point.
        max_length: Tokens of a sequence in the cache of keys and values; 0 leaves the cache out.
        batch_size: Sequences at once.
        kv_bits: Bits of a number in the cache.
        trust_remote_code: Allow the model's own code to run.

    Raises:
        ConfigError: Arguments out of range, or no memory left for the weights.
        InputError: No such model.
    """
    source = ModelSource.open(model_id, trust_remote_code=trust_remote_code)
    skeleton = Skeleton.build(source, torch.float16)
    return estimate_target_bitwidth(
        skeleton.model,
        vram_ratio,
        total_vram_gb=total_vram_gb,
        group_size=group_size,
        wbits=wbits,
        blocks_name=skeleton.blocks_name,
        max_length=max_length,
        batch_size=batch_size,
        kv_bits=kv_bits,
    )


def estimate_target_bitwidth(  # noqa: PLR0913 - the documented signature
    model: PreTrainedModel,
    vram_ratio: float = 0.70,
    *,
    total_vram_gb: float | None = None,
    group_size: int = 128,
    wbits: int = 4,
    scale_bits: int = 16,
    zero_bits: int | None = None,
    quantizable_ratio: float | None = None,
    blocks_name: str = "",
    max_length: int = 2048,
    batch_size: int = 1,
    kv_bits: int = 16,
) -> VRAMBitwidthEstimation:
    """Bits a weight with which a model fits.

    Args:
        model: On any device, the meta device included.
        vram_ratio: Part of the memory that weights and cache may take.
        total_vram_gb: Memory of the GPU, 1e9 bytes; None for that of the first one here.
        group_size: Columns that share a scale, -1 for a whole row.
        wbits: Bits of a zero point where ``zero_bits`` is None.
        scale_bits: Bits of a scale.
        zero_bits: Bits of a zero point.
        quantizable_ratio: Part of the parameters that is quantized; None counts it.
        blocks_name: Full name of the decoder blocks: only layers in them count.
        max_length: Tokens of a sequence in the cache of keys and values; 0 leaves the cache out.
        batch_size: Sequences at once.
        kv_bits: Bits of a number in the cache.

    Raises:
        ConfigError: Arguments out of range, or no memory left for the weights.
    """
    total_gb = _gpu_memory_gb() if total_vram_gb is None else total_vram_gb
    zero_bits = wbits if zero_bits is None else zero_bits
    from_zero = {"max_length": max_length, "scale_bits": scale_bits, "zero_bits": zero_bits}
    from_one = {"wbits": wbits, "batch_size": batch_size, "kv_bits": kv_bits}
    problems = _memory_problems(vram_ratio, total_gb, quantizable_ratio)
    problems += group_size_problems({"group_size": group_size})
    problems += whole_problems(from_zero, 0) + whole_problems(from_one, 1)
    if problems:
        raise ConfigError("VRAM estimate", problems)
    layers, total = _quantizable(model, blocks_name), _num_parameters(model)
    weights = sum(layer.weight.numel() for layer in layers)
    quantizable = weights if quantizable_ratio is None else round(total * quantizable_ratio)
    meta = _num_grids(layers, group_size) * (scale_bits + zero_bits) / max(1, weights)
    plain = PLAIN_BYTES * (total - quantizable) / GB
    cache = kv_cache_bytes(model.config, max_length, batch_size, kv_bits) / GB
    available = total_gb * vram_ratio - plain - cache
    found = VRAMBitwidthEstimation(
        target_bitwidth=available * GB * 8 / max(1, quantizable) - meta,
        total_vram_gb=float(total_gb),
        budget_gb=total_gb * vram_ratio,
        non_quant_weight_gb=plain,
        available_for_quant_gb=available,
        total_params=total,
        quantizable_params=quantizable,
        meta_bits_per_param=meta,
        kv_cache_gb=cache,
    )
    _require_room(found, vram_ratio)
    return found


def _require_room(found: VRAMBitwidthEstimation, vram_ratio: float) -> None:
    if found.quantizable_params and found.target_bitwidth > 0:
        return
    raise ConfigError(
        "VRAM estimate",
        [
            f"total_vram_gb={found.total_vram_gb:g} leaves {found.budget_gb:.3g} GB at "
            f"vram_ratio={vram_ratio:g}: {found.non_quant_weight_gb:.3g} GB of parameters that are "
            f"not quantized, {found.kv_cache_gb:.3g} GB of cache and "
            f"{found.meta_bits_per_param:.2g} bits a weight of scales take all of it. Use a larger "
            "GPU, vram_ratio or group_size, or a smaller max_length, batch_size or kv_bits."
        ],
    )


def _num_grids(layers: Iterable[nn.Linear], group_size: int) -> float:
    """Groups of columns with a scale of their own, in all rows."""
    if group_size == -1:
        return float(sum(layer.out_features for layer in layers))
    return sum(layer.weight.numel() for layer in layers) / group_size


def kv_cache_bytes(
    config: PretrainedConfig, max_length: int, batch_size: int = 1, kv_bits: int = 16
) -> int:
    """Bytes of keys and values of all layers, as serving engines keep them.

    Args:
        config: Of the model, or of one whose text part it holds.
        max_length: Tokens of a sequence.
        batch_size: Sequences.
        kv_bits: Bits of a number.
    """
    text = config.get_text_config()
    num_layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * num_layers
    window = getattr(text, "sliding_window", None) or max_length
    tokens = sum(
        0 if kind in NO_CACHE else min(max_length, window) if kind in SLIDING else max_length
        for kind in kinds
    )
    return math.ceil(tokens * batch_size * _numbers_per_token(text) * kv_bits / 8)


def _numbers_per_token(text: PretrainedConfig) -> int:
    """Numbers that one layer keeps of one token."""
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention keeps the latent only
        return text.kv_lora_rank + text.qk_rope_head_dim
    num_heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return 2 * (getattr(text, "num_key_value_heads", None) or num_heads) * head_dim


def _num_parameters(model: PreTrainedModel) -> int:
    """All of them; a tied output head, which on the meta device is one of its own, counts once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = model.config.get_text_config().tie_word_embeddings and head is not None
    return total - head.weight.numel() if is_tied and head.weight is not embedding.weight else total


def _quantizable(model: PreTrainedModel, blocks_name: str) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.startswith(blocks_name)
    ]


def _gpu_memory_gb() -> float:
    if not torch.cuda.is_available():
        raise ConfigError(
            "VRAM estimate", ["there is no GPU here to ask. Give total_vram_gb, e.g. 24."]
        )
    return torch.cuda.get_device_properties(0).total_memory / GB


def _memory_problems(
    vram_ratio: float, total_gb: float, quantizable_ratio: float | None
) -> list[str]:
    problems = []
    if not 0 < as_number(vram_ratio) <= 1:
        problems.append(f"vram_ratio={vram_ratio!r}: must be above 0, at most 1.")
    if not as_number(total_gb) > 0:
        problems.append(f"total_vram_gb={total_gb!r}: must be above 0.")
    if quantizable_ratio is not None and not 0 < as_number(quantizable_ratio) <= 1:
        problems.append(f"quantizable_ratio={quantizable_ratio!r}: must be above 0, at most 1.")
    return problems
