"""Tracing a block: its stops, what a waiting pass holds, and what it computes."""

import torch
from torch import nn

from onecomp.models.calls import BlockCall
from onecomp.planning.trace import Trace, trace_block

TOKENS, WIDTH, INNER = 4, 16, 48
FLOAT_BYTES = 4


class Block(nn.Module):
    """A gated layer with a residual, as decoders have it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, hidden):
        normed = self.norm(hidden)
        viewed = normed.view(1, -1, WIDTH)  # nothing new: a view
        inner = self.gate(normed).sigmoid() * self.up(normed)
        assert viewed.shape == hidden.shape
        return hidden + self.down(inner)


def traced(block: nn.Module) -> Trace:
    hidden = torch.empty(1, TOKENS, WIDTH, device="meta")
    return trace_block(block.to("meta"), BlockCall(), hidden, ["gate", "up", "down"])


def test_layers_called_with_the_same_tensor_share_a_stop():
    assert [stop.layer_names for stop in traced(Block()).stops] == [("gate", "up"), ("down",)]


def test_operations_are_those_of_the_layers_in_between():
    trace = traced(Block())
    assert [stop.operations for stop in trace.stops] == [0, 2 * TOKENS * WIDTH * 2 * INNER]
    assert trace.last_operations == 2 * TOKENS * INNER * WIDTH


def test_a_waiting_pass_holds_what_its_frames_refer_to():
    gate, down = traced(Block()).stops
    normed, inner = TOKENS * WIDTH * FLOAT_BYTES, TOKENS * INNER * FLOAT_BYTES
    assert gate.held_bytes == normed
    assert down.held_bytes == normed + inner


def test_the_peak_counts_what_was_there_for_a_moment():
    trace = traced(Block())
    inner = TOKENS * INNER * FLOAT_BYTES
    assert trace.peak_bytes >= TOKENS * WIDTH * FLOAT_BYTES + 3 * inner  # both factors, product


def test_a_copied_tensor_is_another_input():
    class Copying(Block):
        def forward(self, hidden):
            inner = self.gate(hidden.clone()) * self.up(hidden.clone())
            return self.down(inner)

    assert len(traced(Copying()).stops) == 3


def test_hooks_are_taken_away_again():
    block = Block()
    traced(block)
    assert not any(module._forward_pre_hooks for module in block.modules())
