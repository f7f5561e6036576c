"""Which layers' outputs a tensor depends on, followed through every operator of a block."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
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
