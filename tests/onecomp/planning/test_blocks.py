"""Kinds of blocks: the same groups as the engine finds, for models of any size."""

import pytest
import torch
from tiny_models import FAMILIES

from onecomp.errors import ConfigError
from onecomp.job import find_layers
from onecomp.models import ModelSource, Skeleton
from onecomp.planning.model import PlannedModel
from onecomp.quantizer import GPTQ

GIB = 2**30


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_groups_are_those_that_a_run_finds(family, tiny_model_dir):
    directory, method = tiny_model_dir(family), GPTQ(groupsize=32)
    shape = PlannedModel.open(str(directory), "auto").shape(method)
    skeleton = Skeleton.build(ModelSource.open(directory), torch.float32)
    layout = find_layers(method, skeleton)
    planned = {index: kind for kind in shape.kinds for index in kind.indices}
    for block in layout.blocks:
        found = planned[block.index].groups
        assert [(g.in_features, g.out_features) for g in found] == [
            (g.in_features, g.out_features) for g in block.groups
        ]
    assert shape.kinds[0].groups == layout.blocks[0].groups


def test_blocks_of_the_same_shapes_are_one_kind(tiny_model_dir):
    shape = PlannedModel.open(str(tiny_model_dir("llama", num_layers=3)), "auto").shape(GPTQ())
    assert [kind.indices for kind in shape.kinds] == [(0, 1, 2)]


def test_blocks_without_targets_are_another_kind(tiny_model_dir):
    method = GPTQ(include_layer_keywords=["layers.0.", "layers.1."])
    directory = tiny_model_dir("llama", num_layers=3)
    shape = PlannedModel.open(str(directory), "auto").shape(method)
    assert [(kind.indices, len(kind.groups)) for kind in shape.kinds] == [((0, 1), 4), ((2,), 0)]
    assert shape.last_target_block == 1


def test_settings_that_do_not_fit_are_refused_as_in_a_run(tiny_model_dir):
    model = PlannedModel.open(str(tiny_model_dir("llama")), "auto")
    with pytest.raises(ConfigError, match="groupsize=48 must divide in_features"):
        model.shape(GPTQ(groupsize=48))
    with pytest.raises(ConfigError, match="no layer is selected"):
        model.shape(GPTQ(include_layer_names=["nothing"]))


def test_the_largest_llama_has_its_published_size(llama_405b):
    shape = PlannedModel.open(str(llama_405b), "auto").shape(GPTQ(groupsize=128))
    assert round(shape.num_parameters / 1e9, 1) == 405.9
    [kind] = shape.kinds
    assert kind.count == 126
    assert [(g.in_features, sum(g.out_features)) for g in kind.groups] == [
        (16384, 18432), (16384, 16384), (16384, 106496), (53248, 16384)
    ]  # fmt: skip


def test_suspended_passes_of_a_llama_hold_what_its_code_refers_to(llama_405b):
    [kind] = PlannedModel.open(str(llama_405b), "auto").shape(GPTQ(groupsize=128)).kinds
    hidden, inner, keys = 16384, 53248, 1024
    elements = [stretch.held_bytes / 2 for stretch in kind.stretches]
    assert elements == [hidden, 3 * hidden + 2 * keys, 2 * hidden, 2 * hidden + inner, 0]


def test_forward_operations_are_two_for_each_weight_and_attention(llama_405b):
    [kind] = PlannedModel.open(str(llama_405b), "auto").shape(GPTQ(groupsize=128)).kinds
    constant = sum(stretch.operations.constant for stretch in kind.stretches)
    assert constant == pytest.approx(2 * kind.num_quantized)
    by_length = sum(stretch.operations.each for stretch in kind.stretches)
    assert by_length == pytest.approx(4 * 16384)


def test_experts_in_one_tensor_count_and_are_named_as_not_quantized(deepseek_v3):
    shape = PlannedModel.open(str(deepseek_v3), "auto").shape(GPTQ(groupsize=128))
    assert round(shape.num_parameters / 1e9) == 671
    dense, experts = shape.kinds
    assert (dense.count, experts.count) == (3, 58)
    assert dense.num_fused_weights == 0
    assert experts.num_fused_weights == 256 * 3 * 7168 * 2048
    assert any("97.7% of the weights in the blocks are fused" in note for note in shape.notes)
    constant = sum(stretch.operations.constant for stretch in experts.stretches)
    active = experts.num_matrix_weights - experts.num_fused_weights * (1 - 8 / 256)
    assert constant == pytest.approx(2 * active, rel=0.01)
    assert experts.passing_bytes.constant < GIB  # weights are no part of a pass
