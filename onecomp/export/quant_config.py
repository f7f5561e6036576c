"""The ``quantization_config`` of a checkpoint: the only place with Hugging Face's key names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onecomp.errors import ConfigError, InputError

LAYER_METHODS = {
    "gptq": "gptq",
    "mixed_gptq": "gptq",
    "dbf": "dbf",
    "onebit": "onebit",
    "autobit": "gptq",
}
"""``quant_method`` of the checkpoint -> method of layers whose entry names none. Layers of several
methods make ``autobit``."""
BITS_BY_NAME = ("module_wbits", "module_target_bits")
BITS_OF_MLPS = ("mlp_wbits", "mlp_target_bits")
"""Keys of the model-wide settings that a layer's bits may be under, else ``bits``."""
GROUP_SIZE = "group_size"

_BLOCK_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is stored."""

    method: str
    """Whose tensors they are: ``gptq``, ``dbf`` or ``onebit``."""
    bits: int | float
    """Bits per weight that were asked for; a whole number with codes."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """What else the layer's entry holds, e.g. ``group_size``."""


def gptq_format(wbits: int, groupsize: int) -> LayerFormat:
    """A layer of integer codes.

    Args:
        wbits: Bits per weight.
        groupsize: Columns per group, -1 for all.
    """
    return LayerFormat("gptq", wbits, {GROUP_SIZE: groupsize})


def dbf_format(target_bits: float, settings: Mapping[str, Any]) -> LayerFormat:
    """A layer of two binary factors.

    Args:
        target_bits: Bits of signs per weight that the layer's rank follows from.
        settings: Settings of the method, repeated for every layer.
    """
    return LayerFormat("dbf", target_bits, dict(settings))


def dbf_quant_config(
    *,
    target_bits: float,
    settings: Mapping[str, Any],
    mlp_target_bits: float | None = None,
    module_target_bits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Top-level entries for layers of two binary factors.

    Args:
        target_bits: Bits of signs per weight where nothing else is said.
        settings: Settings of the method.
        mlp_target_bits: Bits of layers with ``mlp`` in their name.
        module_target_bits: Bits by layer name.
    """
    overrides = {
        "mlp_target_bits": mlp_target_bits,
        "module_target_bits": dict(module_target_bits) if module_target_bits else None,
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}
    return {"quant_method": "dbf", "bits": target_bits, **settings, **overrides}


def gptq_quant_config(
    *,
    wbits: int,
    groupsize: int,
    actorder: bool,
    sym: bool,
    mlp_wbits: int | None = None,
    mlp_groupsize: int | None = None,
    module_wbits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Top-level entries for layers in GPTQ's layout.

    Args:
        wbits: Bits per weight where nothing else is said.
        groupsize: Columns per group, -1 for all.
        actorder: Whether the checkpoint needs ``g_idx``: not when groups are static or per row.
        sym: Symmetric grids.
        mlp_wbits: Bits of layers with ``mlp`` in their name.
        mlp_groupsize: Columns per group of those layers.
        module_wbits: Bits by layer name.
    """
    overrides = {
        "mlp_wbits": mlp_wbits,
        "mlp_groupsize": mlp_groupsize,
        "module_wbits": dict(module_wbits) if module_wbits else None,
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}
    return {
        "quant_method": "mixed_gptq" if overrides else "gptq",
        "bits": wbits,
        "groupsize": groupsize,
        "group_size": groupsize,
        "actorder": actorder,
        "desc_act": actorder,
        "sym": sym,
        "checkpoint_format": "gptq",
        **overrides,
    }


def mixed_quant_config(
    configs: Sequence[Mapping[str, Any]], average_bits: float | None
) -> dict[str, Any]:
    """Top-level entries for layers of several methods; each layer has an entry of its own.

    Layers in GPTQ's layout alone make ``mixed_gptq``, which serving engines read, whichever method
    made the codes; ``sym`` then holds where it does for all of them, as kernels for symmetric
    grids ignore zero points.

    Args:
        configs: Of each method, that of most layers first.
        average_bits: Stored bits a weight, for the reader's information.
    """
    if len(configs) == 1:
        return dict(configs[0])
    methods = {LAYER_METHODS[config["quant_method"]] for config in configs}
    if len(methods) == 1 and methods != {"gptq"}:
        return dict(configs[0])
    if methods != {"gptq"}:
        return {"quant_method": "autobit", "bits": average_bits, "checkpoint_format": "gptq"}
    has_order = any(config["desc_act"] for config in configs)
    usual = gptq_quant_config(
        wbits=configs[0]["bits"],
        groupsize=configs[0][GROUP_SIZE],
        actorder=has_order,
        sym=all(config["sym"] for config in configs),
    )
    return {**usual, "quant_method": "mixed_gptq"}


def finalize_quant_config(
    config: Mapping[str, Any], layers: Mapping[str, LayerFormat], num_hidden_layers: int | None
) -> dict[str, Any]:
    """``config`` with everything that depends on which layers were quantized.

    ``gptq`` becomes ``mixed_gptq`` where one setting does not describe every layer, and for
    rotated models and experts, whose kernels the plain method does not choose.

    Args:
        config: From :func:`gptq_quant_config`; not changed.
        layers: Full layer name -> how it is stored.
        num_hidden_layers: Number of decoder blocks.

    Raises:
        ConfigError: ``num_hidden_layers`` is None, or a layer has no place in the config.
    """
    if num_hidden_layers is None:
        raise ConfigError(
            "quantization_config",
            ["num_hidden_layers=None: the model's config must say how many blocks it has."],
        )
    names = sorted(layers)
    final = {
        "rotated": False,
        "fp32_had": False,
        **config,
        "quantization_bits": _bits_by_block(layers, num_hidden_layers),
        "modules_in_block_to_quantize": names,
        "quantized_layer_names": names,
    }
    if final["quant_method"] == "gptq" and _needs_mixed(final, layers):
        final["quant_method"] = "mixed_gptq"
    problems = [
        f"{name}: {layers[name]} is outside the numbered blocks, where only the model-wide "
        f"setting {layer_format(final, name)} can be stored. Exclude it or add it to module_wbits."
        for name in names
        if layer_format(final, name) != layers[name]
    ]
    if problems:
        raise ConfigError("quantization_config", problems)
    return final


def split_layer_name(layer_name: str) -> tuple[int, str] | None:
    """Index of the decoder block and name inside it; None outside the numbered blocks.

    Example:
        >>> split_layer_name("model.decoder.layers.3.mlp.experts.7.up_proj")
        (3, 'mlp.experts.7.up_proj')
    """
    match = _BLOCK_INDEX.search(layer_name)
    return None if match is None else (int(match[1]), layer_name[match.end() :])


def layer_format(config: Mapping[str, Any], layer_name: str) -> LayerFormat:
    """How ``layer_name`` is stored: its own entry, else the model-wide settings.

    Raises:
        InputError: Neither says how many bits.
    """
    entry = _entry(config, layer_name) or {}
    bits = entry.get("bits", _default_bits(config, layer_name))
    if bits is None:
        raise InputError(
            "quantization_config", f"no bits for {layer_name}, neither its own nor the model's."
        )
    params = dict(entry.get("params", {}))
    groupsize = entry.get(GROUP_SIZE, params.get(GROUP_SIZE))
    if groupsize is None:
        groupsize = _default_groupsize(config, layer_name)
    if groupsize is not None:
        params[GROUP_SIZE] = groupsize
    return LayerFormat(entry.get("method", LAYER_METHODS[config["quant_method"]]), bits, params)


def quantized_layers(
    config: Mapping[str, Any], module_names: Iterable[str]
) -> dict[str, LayerFormat]:
    """Full name of every quantized layer -> how it is stored.

    Args:
        config: A checkpoint's ``quantization_config``.
        module_names: The model's modules, for checkpoints that list layers per block only.
    """
    names = config.get("quantized_layer_names")
    if names is None:
        names = [name for name in module_names if _entry(config, name)]
    return {name: layer_format(config, name) for name in names}


def check_quant_config(config: Mapping[str, Any], subject: object) -> None:
    """Refuse a ``quantization_config`` that would be read wrongly.

    Args:
        config: A checkpoint's ``quantization_config``.
        subject: The checkpoint, for the error.

    Raises:
        InputError: Unknown method or layout.
    """
    method, layout = config.get("quant_method"), config.get("checkpoint_format", "gptq")
    if method not in LAYER_METHODS:
        known = ", ".join(sorted(LAYER_METHODS))
        raise InputError(subject, f"quant_method={method!r} is unknown. Known methods: {known}.")
    if layout != "gptq":
        raise InputError(
            subject,
            f"checkpoint_format={layout!r}: only 'gptq' is read, which stores zero points minus 1.",
        )
    if config.get("rotated"):
        raise InputError(
            subject,
            "rotated=true: the model needs an online Hadamard transform before its down_proj "
            "layers, which this loader does not apply.",
        )


def _bits_by_block(
    layers: Mapping[str, LayerFormat], num_hidden_layers: int
) -> list[dict[str, dict[str, Any]]]:
    blocks: list[dict[str, dict[str, Any]]] = [{} for _ in range(num_hidden_layers)]
    for name in sorted(layers):
        place = split_layer_name(name)
        if place is None:
            continue
        index, suffix = place
        if index >= num_hidden_layers:
            raise ConfigError(
                "quantization_config",
                [f"{name} is in block {index}, but num_hidden_layers={num_hidden_layers}."],
            )
        stored = layers[name]
        blocks[index][suffix] = {
            "bits": stored.bits,
            "method": stored.method,
            "params": dict(stored.params),
        }
    return blocks


def _needs_mixed(config: Mapping[str, Any], layers: Mapping[str, LayerFormat]) -> bool:
    usual = gptq_format(config["bits"], config[GROUP_SIZE])
    uniform = all(stored == usual for stored in layers.values())
    return not uniform or config["rotated"] or any(".experts." in name for name in layers)


def _entry(config: Mapping[str, Any], layer_name: str) -> Mapping[str, Any] | None:
    blocks, place = config.get("quantization_bits", []), split_layer_name(layer_name)
    if place is None or place[0] >= len(blocks):
        return None
    return blocks[place[0]].get(place[1])


def _default_bits(config: Mapping[str, Any], layer_name: str) -> int | float | None:
    """Model-wide bits for a layer: by name, else for MLPs, else for all."""
    for key in BITS_BY_NAME:
        if layer_name in (config.get(key) or {}):
            return config[key][layer_name]
    if "mlp" in layer_name:
        for key in BITS_OF_MLPS:
            if config.get(key) is not None:
                return config[key]
    return config.get("bits")


def _default_groupsize(config: Mapping[str, Any], layer_name: str) -> int | None:
    if "mlp" in layer_name and "mlp_groupsize" in config:
        return config["mlp_groupsize"]
    return config.get(GROUP_SIZE)
