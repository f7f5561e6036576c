"""A forward pass that stops in front of each input group and goes on when told to.

Error propagation has to quantize a group before what lies behind it is computed. Instead of
running the block again for every group, each pass is kept where it is, as a coroutine, while the
group is quantized; it then goes on with the new weights. Nothing is ever computed twice.
"""

from collections.abc import Sequence

import torch
from greenlet import greenlet
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onecomp.models.calls import BlockCall


class SuspendedForward:
    """One pass of hidden states through a block, stopping at each of its input groups.

    Args:
        block: Any module.
        call: Arguments besides the hidden states.
        hidden: Hidden states in front of the block.
    """

    def __init__(
        self, block: "StoppingBlock", call: BlockCall, hidden: Float[Tensor, "*batch hidden"]
    ):
        self._passing = greenlet(self._run)
        self._block, self._call, self._hidden = block, call, hidden
        self._visited: set[int] = set()
        self._stop: tuple[int, Tensor] | None = None
        self.output: Tensor | None = None

    def run_to(self, group_index: int) -> Float[Tensor, "*batch in"] | None:
        """Go on until the group is called; its input, or None when this pass does not call it.

        The pass stays in front of the group until the next ``run_to`` or ``finish``.
        """
        while self.output is None and (self._stop is None or self._stop[0] < group_index):
            self._resume()
        if self._stop is None or self._stop[0] != group_index:
            return None
        return self._stop[1]

    def finish(self) -> Float[Tensor, "*batch hidden"]:
        """Go on to the end; hidden states behind the block."""
        while self.output is None:
            self._resume()
        return self.output

    def close(self) -> None:
        """Give the pass up where it is, and let go of everything that it holds."""
        if not self._passing.dead:
            self._passing.parent = greenlet.getcurrent()
            self._passing.throw()
        self._stop = self._hidden = None

    def _resume(self) -> None:
        self._stop, self._block.running = None, self
        self._passing.parent = greenlet.getcurrent()
        with torch.inference_mode():
            self._stop = self._passing.switch()

    def _run(self) -> None:
        self.output = self._call.run(self._block.module, self._hidden)
        self._hidden = None

    def reached(self, group_index: int, tensor: Tensor) -> None:
        """Hand the group's input out and wait for the next ``_resume``; called by hooks."""
        if group_index not in self._visited:
            self._visited.add(group_index)
            self._passing.parent.switch((group_index, tensor))


class StoppingBlock:
    """A block whose passes stop in front of its input groups.

    Args:
        module: The block.
        groups: For each input group, names of its layers relative to the block.
    """

    def __init__(self, module: nn.Module, groups: Sequence[Sequence[str]]):
        self.module = module
        self.running: SuspendedForward | None = None
        self._hooks: list[RemovableHandle] = []
        for index, names in enumerate(groups):
            for name in names:
                hook = module.get_submodule(name).register_forward_pre_hook(
                    lambda _layer, args, index=index: self.running.reached(index, args[0])
                )
                self._hooks.append(hook)

    def release(self) -> None:
        """Take the hooks away: they and the block hold each other in memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.running = None
