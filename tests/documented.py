"""How a signature is compared with what is documented of it."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields

import torch
from torch import nn

REQUIRED = inspect.Parameter.empty
"""Stands for "no default"."""

Parameters = dict[str, object]
"""Documented parameters in their order, each with its default."""

QUANTIZER: Parameters = {
    "name": None,
    "num_layers": None,
    "calc_quant_error": False,
    "include_layer_names": None,
    "exclude_layer_names": ["lm_head"],
    "include_layer_keywords": None,
    "exclude_layer_keywords": None,
    "target_layer_types": (nn.Linear,),
    "hessian_dtype": torch.float32,
    "module_to_name": {},
    "results": {},
    "flag_calibration": False,
    "flag_hessian": False,
    "flag_xtx": False,
}


def differences(call: Callable[..., object], documented: Parameters) -> list[str]:
    """What a documented call would find changed; a parameter may become optional."""
    parameters = list(inspect.signature(call).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    names = [parameter.name for parameter in positional]
    found = []
    if names != list(documented):
        found.append(f"parameters {names}, documented {list(documented)}")
    for parameter in positional:
        default = documented.get(parameter.name, REQUIRED)
        if default is not REQUIRED and parameter.default != default:
            found.append(f"{parameter.name}={parameter.default!r}, documented {default!r}")
    return found


def default_of(field: Field) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def field_differences(cls: type, documented: Parameters) -> list[str]:
    """Fields that are not the documented ones, or additions that take a position."""
    found = {field.name: default_of(field) for field in fields(cls) if not field.kw_only}
    if list(found) != list(documented):
        return [f"fields {list(found)}, documented {list(documented)}"]
    return [
        f"{name}={found[name]!r}, documented {default!r}"
        for name, default in documented.items()
        if found[name] != default
    ]
