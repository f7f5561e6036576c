"""The kinds of decoder blocks that a model has, found by running one of each without weights."""

import copy
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from onecomp.errors import ConfigError, InputError
from onecomp.models.calls import BlockCall, record_calls
from onecomp.models.layout import InputGroup
from onecomp.models.skeleton import Skeleton
from onecomp.models.source import CONFIG_ERRORS, reason
from onecomp.planning.amounts import Amount
from onecomp.planning.shapes import BlockShape, Linear, Stretch
from onecomp.planning.trace import Trace, trace_block
from onecomp.quantizer import Quantizer

TRACED_TOKENS = (8, 64)


def target_layers(quantizer: Quantizer, skeleton: Skeleton) -> set[str]:
    """Names of the layers to quantize, as a run selects and checks them."""
    selected = quantizer.select_layers(skeleton.model)
    inside = {name for name in selected if name.startswith(skeleton.blocks_name + ".")}
    problems = [
        problem
        for name in selected
        if name in inside
        for problem in quantizer.layer_problems(
            name, selected[name].in_features, selected[name].out_features
        )
    ]
    if not inside:
        problems.append("no layer is selected: the decoder blocks have no linear layers.")
    if problems:
        raise ConfigError(type(quantizer).__name__, problems)
    return inside


def block_kinds(skeleton: Skeleton, targets: Collection[str]) -> tuple[BlockShape, ...]:
    """Every kind of block, in the order of their first blocks.

    Args:
        skeleton: Model without weights.
        targets: Full names of the layers to quantize.

    Raises:
        InputError: A block that cannot be run without weights.
    """
    blocks_of: dict[Hashable, list[int]] = defaultdict(list)
    for index, block in enumerate(skeleton.blocks):
        prefix = skeleton.block_name(index) + "."
        blocks_of[_signature(block, prefix, targets)].append(index)
    calls = {tokens: _calls(skeleton, tokens) for tokens in TRACED_TOKENS}
    return tuple(
        _block_shape(skeleton, tuple(indices), calls, targets) for indices in blocks_of.values()
    )


def _signature(block: nn.Module, prefix: str, targets: Collection[str]) -> Hashable:
    """What blocks of one kind have in common: modules, shapes and target layers, by name."""
    modules = tuple(
        (name, type(module), prefix + name in targets) for name, module in block.named_modules()
    )
    return modules, tuple((name, weight.shape) for name, weight in block.named_parameters())


def _calls(skeleton: Skeleton, tokens: int) -> list[BlockCall]:
    """How each block is called, its tensors on the meta device."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    try:
        with _zeros_outside(skeleton):
            is_tuple = _returns_tuple(skeleton, ids)
            _, calls = record_calls(skeleton, ids, None, returns_tuple=is_tuple)
    except CONFIG_ERRORS as error:
        raise _not_runnable(skeleton, skeleton.blocks_name, error) from error
    return [_on_meta(call) for call in calls]


@contextmanager
def _zeros_outside(skeleton: Skeleton) -> Iterator[None]:
    """Weights of zeros, which take no memory, where the model is run in front of its blocks."""
    originals = [
        (module, key, parameter)
        for _, module in skeleton.outer_modules()
        for key, parameter in module.named_parameters(recurse=False)
    ]
    for module, key, parameter in originals:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        module._parameters[key] = nn.Parameter(zeros, requires_grad=False)
    try:
        yield
    finally:
        for module, key, parameter in originals:
            module._parameters[key] = parameter


def _returns_tuple(skeleton: Skeleton, ids: torch.Tensor) -> bool:
    _, [call] = record_calls(skeleton, ids, None, returns_tuple=False, num_blocks=1)
    call = _on_meta(call)
    with torch.inference_mode():
        block = _meta_copy(skeleton.blocks[0])
        output = block(_hidden(skeleton, ids.shape[1]), *call.args, **call.kwargs)
    return isinstance(output, tuple)


def _on_meta(call: BlockCall) -> BlockCall:
    return call.map_tensors(lambda tensor: tensor.to("meta"))


def _meta_copy(block: nn.Module) -> nn.Module:
    """The block with its buffers on the meta device, too."""
    return copy.deepcopy(block).to("meta")


def _hidden(skeleton: Skeleton, tokens: int) -> torch.Tensor:
    width = skeleton.model.get_input_embeddings().embedding_dim
    return torch.empty(1, tokens, width, device="meta", dtype=skeleton.dtype)


def _block_shape(
    skeleton: Skeleton,
    indices: tuple[int, ...],
    calls: Mapping[int, list[BlockCall]],
    targets: Collection[str],
) -> BlockShape:
    first, prefix = indices[0], skeleton.block_name(indices[0]) + "."
    block = _meta_copy(skeleton.blocks[first])
    names = {name.removeprefix(prefix) for name in targets if name.startswith(prefix)}
    try:
        traces = {
            tokens: trace_block(block, calls[tokens][first], _hidden(skeleton, tokens), names)
            for tokens in TRACED_TOKENS
        }
        stretches = _stretches(traces)
    except CONFIG_ERRORS as error:
        raise _not_runnable(skeleton, prefix.rstrip("."), error) from error
    stops = traces[TRACED_TOKENS[0]].stops
    parameters = list(block.parameters())
    return BlockShape(
        indices=indices,
        groups=tuple(
            _group(skeleton, first, position, [prefix + name for name in stop.layer_names])
            for position, stop in enumerate(stops)
        ),
        stretches=stretches,
        passing_bytes=_line([trace.peak_bytes for trace in traces.values()]),
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_matrix_weights=sum(p.numel() for p in parameters if p.ndim > 1),
        num_fused_weights=sum(p.numel() for p in parameters if p.ndim > 2),
        dependencies=traces[TRACED_TOKENS[0]].dependencies,
    )


def _group(skeleton: Skeleton, block: int, position: int, names: list[str]) -> InputGroup:
    layers = [skeleton.model.get_submodule(name) for name in names]
    out_features = tuple(layer.out_features for layer in layers)
    return InputGroup(block, position, tuple(names), layers[0].in_features, out_features)


def _stretches(traces: Mapping[int, Trace]) -> tuple[Stretch, ...]:
    """Operations per token by length, and bytes per token, of each stretch of the pass."""
    by_stretch = zip(
        *([*(stop.operations for stop in t.stops), t.last_operations] for t in traces.values()),
        strict=True,
    )
    operations = [
        _line([count / tokens for count, tokens in zip(counts, TRACED_TOKENS, strict=True)])
        for counts in by_stretch
    ]
    tokens, trace = list(traces.items())[-1]
    held = [*(stop.held_bytes / tokens for stop in trace.stops), 0.0]
    return tuple(Stretch(*parts) for parts in zip(operations, held, strict=True))


def _line(values: list[Amount]) -> Linear:
    small, large = zip(TRACED_TOKENS, values, strict=True)
    return Linear.through(small, large)


def _not_runnable(skeleton: Skeleton, name: str, error: Exception) -> InputError:
    return InputError(
        skeleton.source.directory,
        f"{name} of {type(skeleton.model).__name__} cannot be run without weights "
        f"({reason(error)}), so that its layers cannot be found. Give a model whose blocks "
        "compute the same for every input.",
    )
