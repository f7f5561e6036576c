"""The input groups of a block that is run, and which of them depend on the outputs of others."""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DataFlow(TorchDispatchMode):
    """Follows names from the tensors that were marked with them to all that is made of these.

    Names belong to storages, so that views share them and what is written in place is noticed.
    What is copied out of one storage into another keeps all names of the first: a dependency may
    be reported where there is none, never the reverse. Values that leave torch (``item``) are not
    followed; on the meta device there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, frozenset[str]] = {}
        self._kept: list[torch.UntypedStorage] = []  # no storage is freed, so none is mistaken

    def mark(self, tensor: Tensor, name: str) -> None:
        """From now on the tensor, and whatever is made of it, has this name."""
        self._add(tensor, frozenset({name}))

    def names(self, tensor: Tensor) -> frozenset[str]:
        """What a tensor depends on."""
        return self._names.get(tensor.untyped_storage()._cdata, frozenset())

    def _add(self, tensor: Tensor, names: frozenset[str]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._names:
            self._kept.append(storage)
        self._names[storage._cdata] = self.names(tensor) | names

    def __torch_dispatch__(
        self,
        func: Any,
        types: Collection[type],
        args: Sequence = (),
        kwargs: dict | None = None,
    ) -> object:
        """Run an operator, and give what it made or changed the names of all that it read."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = frozenset().union(*map(self.names, read))
        if names:
            for tensor in _tensors([output, *_written(func, args, kwargs)]):
                self._add(tensor, names)
        return output


def _written(func: Any, args: Sequence, kwargs: dict) -> Iterator[object]:
    """Arguments that an operator writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if position < len(args):
                yield args[position]
            elif argument.name in kwargs:
                yield kwargs[argument.name]


def _tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


@dataclass
class ObservedGroups:
    """Collects the input groups of a pass, in the order in which it calls them.

    Layers are in one group when they are called with the same tensor object.
    """

    flow: DataFlow = field(default_factory=DataFlow)
    """Entered by whoever runs the pass."""
    names: list[list[str]] = field(default_factory=list)
    """Of the layers of each group."""
    _inputs: list["weakref.ref[Tensor]"] = field(default_factory=list)
    _behind: list[frozenset[str]] = field(default_factory=list)

    @contextmanager
    def of(
        self, layers: Mapping[str, nn.Module], on_new: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Observe layers while the body runs the pass.

        Args:
            layers: By the names that they are to have.
            on_new: Called in front of the first layer of each group.
        """
        handles = []
        for name, layer in layers.items():
            handles += [
                layer.register_forward_pre_hook(
                    lambda _m, args, name=name: self._note(name, args[0], on_new)
                ),
                layer.register_forward_hook(
                    lambda _m, _args, output, name=name: self.flow.mark(output, name)
                ),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, tensor: Tensor, on_new: Callable[[], None]) -> None:
        for known, names in zip(self._inputs, self.names, strict=True):
            if known() is tensor:
                names.append(name)
                return
        self._inputs.append(weakref.ref(tensor))
        self.names.append([name])
        self._behind.append(self.flow.names(tensor))
        on_new()

    def dependencies(self) -> tuple[frozenset[int], ...]:
        """For each group, the groups that its input depends on."""
        group_of = {name: index for index, names in enumerate(self.names) for name in names}
        return tuple(frozenset(group_of[name] for name in names) for names in self._behind)
