"""Reading a model block by block gives what the model itself computes, for every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from onecomp.errors import InputError
from onecomp.models import (
    BlockCall,
    ModelLayout,
    ModelSource,
    Skeleton,
    SuspendedForward,
    inspect_model,
    record_calls,
)
from onecomp.models.calls import CallInterner, fill_on_demand
from onecomp.models.skeleton import find_blocks
from onecomp.models.suspended import StoppingBlock

CPU = torch.device("cpu")
USUAL = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
GROUPS = dict.fromkeys(FAMILIES, USUAL) | {
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
}


def skeleton_of(directory: Path) -> Skeleton:
    return Skeleton.build(ModelSource.open(directory), torch.float32)


def layout_of(skeleton: Skeleton) -> ModelLayout:
    linear = [n for n, m in skeleton.model.named_modules() if isinstance(m, nn.Linear)]
    return inspect_model(skeleton, [name for name in linear if name != "lm_head"])


def tokens(padding: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 16 - padding :] = 0
    return ids, mask


@pytest.fixture
def llama(tiny_model_dir: Callable[..., Path]) -> tuple[Skeleton, ModelLayout, Tensor, BlockCall]:
    """Skeleton, layout, and what the first block is called with."""
    skeleton = skeleton_of(tiny_model_dir("llama"))
    layout = layout_of(skeleton)
    fill_on_demand(skeleton, CPU)
    hidden, calls = record_calls(skeleton, *tokens(3), returns_tuple=layout.blocks_return_tuples)
    return skeleton, layout, hidden, calls[0]


def stopping(skeleton: Skeleton, layout: ModelLayout, index: int) -> StoppingBlock:
    block = layout.blocks[index]
    names = [block.short_names(group) for group in block.groups]
    return StoppingBlock(skeleton.load_block(index, CPU), names)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_called_with_one_tensor_are_one_group(tiny_model_dir, family):
    skeleton = skeleton_of(tiny_model_dir(family))
    layout = layout_of(skeleton)
    assert layout.num_blocks == len(layout.blocks) == 2
    for block in layout.blocks:
        found = [[name.rpartition(".")[2] for name in g.layer_names] for g in block.groups]
        assert found == GROUPS[family]
        for position, group in enumerate(block.groups):
            layers = [skeleton.model.get_submodule(name) for name in group.layer_names]
            assert (group.block_index, group.index) == (block.index, position)
            assert {layer.in_features for layer in layers} == {group.in_features}
            assert [layer.out_features for layer in layers] == list(group.out_features)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_only_targets_are_in_groups_and_blocks_behind_the_last_one_are_left_out(tiny_model_dir):
    skeleton = skeleton_of(tiny_model_dir("llama", num_layers=3))
    layout = inspect_model(
        skeleton, ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"]
    )
    assert layout.num_blocks == 3
    assert [len(block.groups) for block in layout.blocks] == [0, 2]
    assert layout.layer_names == ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"]
    assert inspect_model(skeleton, []).blocks == ()


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_with_their_recorded_calls_give_the_models_hidden_states(
    tiny_model_dir, family, padding
):
    directory = tiny_model_dir(family)
    skeleton = skeleton_of(directory)
    layout = layout_of(skeleton)
    fill_on_demand(skeleton, CPU)
    ids, mask = tokens(padding)
    hidden, calls = record_calls(skeleton, ids, mask, returns_tuple=layout.blocks_return_tuples)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    behind = []
    for block in model.get_submodule(skeleton.blocks_name):
        block.register_forward_hook(
            lambda _m, _a, out: behind.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.inference_mode():
        model(ids, attention_mask=mask, use_cache=False)
        for index, expected in enumerate(behind):
            hidden = calls[index].run(skeleton.load_block(index, CPU), hidden)
            assert torch.equal(hidden, expected)
    assert skeleton.model.lm_head.weight.is_meta  # never reached, never read


def test_recording_leaves_the_model_as_it_was(llama):
    skeleton, layout, *_ = llama
    before = list(skeleton.blocks)
    record_calls(skeleton, *tokens(0), returns_tuple=layout.blocks_return_tuples, num_blocks=1)
    assert all(a is b for a, b in zip(before, skeleton.blocks, strict=True))


def test_equal_tensors_of_calls_are_kept_once(llama):
    call = llama[-1]
    copies = [call.map_tensors(torch.clone) for _ in range(2)]
    interner = CallInterner()
    first, second = (interner.intern(copy) for copy in copies)
    tensors: list[list[Tensor]] = [[], []]
    for found, interned in zip(tensors, (first, second), strict=True):
        interned.map_tensors(lambda t, found=found: (found.append(t), t)[1])
    assert len(tensors[0]) >= 2
    assert all(a is b for a, b in zip(*tensors, strict=True))


def test_a_suspended_pass_stops_in_front_of_every_group_in_order(llama):
    skeleton, layout, hidden, call = llama
    block = stopping(skeleton, layout, 0)
    expected: dict[str, Tensor] = {}
    plain = skeleton.load_block(0, CPU)
    groups = layout.blocks[0].groups
    for group in groups:
        first = layout.blocks[0].short_names(group)[0]
        plain.get_submodule(first).register_forward_pre_hook(
            lambda _m, args, first=first: expected.setdefault(first, args[0])
        )
    with torch.inference_mode():
        output = call.run(plain, hidden)
    passing = SuspendedForward(block, call, hidden)
    for group in groups:
        inputs = passing.run_to(group.index)
        assert passing.output is None
        assert torch.equal(inputs, expected[layout.blocks[0].short_names(group)[0]])
        assert passing.run_to(group.index) is inputs  # stays where it is
    assert torch.equal(passing.finish(), output)


def test_a_suspended_pass_goes_on_with_changed_weights(llama):
    """Two passes through one block, both in front of the second group while it is changed."""
    skeleton, layout, hidden, call = llama
    block = stopping(skeleton, layout, 0)
    passes = [SuspendedForward(block, call, factor * hidden) for factor in (1, 2)]
    for index, names in enumerate(layout.blocks[0].groups):
        for passing in passes:
            passing.run_to(index)
        for name in layout.blocks[0].short_names(names):
            block.module.get_submodule(name).weight.data.mul_(0.5)
    changed = skeleton.load_block(0, CPU)
    for group in layout.blocks[0].groups:
        for name in layout.blocks[0].short_names(group):
            changed.get_submodule(name).weight.data.mul_(0.5)
    with torch.inference_mode():
        for factor, passing in zip((1, 2), passes, strict=True):
            assert torch.equal(passing.finish(), call.run(changed, factor * hidden))


def test_groups_may_be_skipped_and_one_that_is_passed_is_none(llama):
    skeleton, layout, hidden, call = llama
    passing = SuspendedForward(stopping(skeleton, layout, 0), call, hidden)
    assert passing.run_to(2) is not None
    assert passing.run_to(1) is None
    assert passing.run_to(3) is not None
    passing.finish()
    assert passing.run_to(3) is None


def test_a_pass_that_does_not_call_a_group_says_so():
    """A mixture of experts where no token reaches the second expert."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, hidden: Tensor) -> Tensor:
            return self.experts[2](self.experts[0](hidden))

    block = StoppingBlock(Block(), [["experts.0"], ["experts.1"], ["experts.2"]])
    passing = SuspendedForward(block, BlockCall(), torch.ones(2, 4))
    assert passing.run_to(0) is not None
    assert passing.run_to(1) is None
    assert passing.run_to(2) is not None
    assert passing.finish().shape == (2, 4)


def test_an_abandoned_pass_leaves_the_block_usable(llama):
    skeleton, layout, hidden, call = llama
    block = stopping(skeleton, layout, 0)
    abandoned = SuspendedForward(block, call, hidden)
    abandoned.run_to(1)
    del abandoned
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        expected = call.run(skeleton.load_block(0, CPU), hidden)
    assert torch.equal(SuspendedForward(block, call, hidden).finish(), expected)


def test_an_error_inside_a_pass_reaches_the_caller(llama):
    skeleton, layout, hidden, call = llama
    passing = SuspendedForward(stopping(skeleton, layout, 0), call, hidden[..., :5])
    with pytest.raises(RuntimeError):
        passing.run_to(0)


def test_a_loaded_block_is_a_fresh_copy(llama):
    skeleton = llama[0]
    first, second = (skeleton.load_block(0, CPU) for _ in range(2))
    first.mlp.up_proj.weight.data.zero_()
    assert second.mlp.up_proj.weight.abs().sum() > 0
    assert all(parameter.is_meta for parameter in skeleton.blocks.parameters())
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_a_model_without_blocks_is_refused(tiny_model_dir):
    source = ModelSource.open(tiny_model_dir("llama"))
    message = "the architecture Sequential has no list of blocks with linear layers"
    with pytest.raises(InputError, match=message):
        find_blocks(nn.Sequential(nn.Linear(2, 2)), source)


def test_the_largest_list_of_the_language_part_is_the_list_of_blocks(tiny_model_dir):
    source = ModelSource.open(tiny_model_dir("llama"))

    def part(width: int) -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(width, width)])})

    model = nn.ModuleDict({"vision": part(64), "language_model": part(8), "aux": part(4)})
    assert find_blocks(model, source) == "language_model.layers"
    del model["language_model"]
    assert find_blocks(model, source) == "vision.layers"
