"""How many bytes of tensors are alive at a time while something runs."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operators return inside the context.

    What an operator needs inside of itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._tensors_of: Counter[int] = Counter()
        """How many tensors lie in each storage, by its address."""
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        arguments = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            self._note(tensor, arguments)
        return result

    def _note(self, tensor: Tensor, arguments: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        is_known = id(tensor) in self._known and self._known[id(tensor)]() is tensor
        is_from_outside = address in arguments and not self._tensors_of[address]
        if is_known or is_from_outside or not size:
            return
        if not self._tensors_of[address]:
            self._live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        self._tensors_of[address] += 1
        self._known[id(tensor)] = weakref.ref(tensor)
        weakref.finalize(tensor, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._tensors_of[address] -= 1
        if not self._tensors_of[address]:
            self._live_bytes -= size


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors that ``function`` has made and still holds."""
    with torch.no_grad(), LiveBytes() as live:
        function()
    return live.peak_bytes
