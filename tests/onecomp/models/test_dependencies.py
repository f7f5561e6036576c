import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GPTNeoXConfig,
    PhiConfig,
)

from onecomp.job import find_layers
from onecomp.models import ModelSource, Skeleton
from onecomp.models.dependencies import DataFlow
from onecomp.quantizer import GPTQ

SIZES = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4
}  # fmt: skip


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_names_follow_products_views_and_what_is_written_in_place():
    with DataFlow() as flow:
        marked, other = meta(4, 4), meta(4, 4)
        flow.mark(marked, "a")
        assert flow.names(marked[1:] @ other) == {"a"}
        assert flow.names(other + 1) == frozenset()
        target = torch.zeros(4, 4, device="meta")
        target.index_add_(0, torch.zeros(4, dtype=torch.long, device="meta"), marked)
        assert flow.names(target) == {"a"}
        out = meta(4, 4)
        torch.mul(marked, 2, out=out)
        assert flow.names(out) == {"a"}
        flow.mark(target, "b")
        assert flow.names(target.softmax(-1)) == {"a", "b"}


def test_names_follow_indices():
    with DataFlow() as flow:
        scores = meta(6, 4)
        flow.mark(scores, "router")
        chosen = scores.argmax(-1)
        assert flow.names(meta(4, 8)[chosen]) == {"router"}
        assert flow.names(torch.where(chosen > 1, 1.0, 0.0)) == {"router"}


def test_what_is_made_later_of_other_tensors_has_no_names():
    """Freed storages are not mistaken for new ones."""
    linear = nn.Linear(8, 8, device="meta")
    with torch.inference_mode(), DataFlow() as flow:
        for _ in range(20):
            flow.mark(linear(meta(2, 8)), "layer")
        assert flow.names(meta(2, 8) * 2) == frozenset()


def stages(config, folder) -> list[list[tuple[str, ...]]]:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    skeleton = Skeleton.build(ModelSource.open(folder), torch.float32)
    block = find_layers(GPTQ(groupsize=-1), skeleton).blocks[0]
    return [
        [tuple(name.rsplit(".", 1)[1] for name in group.layer_names) for group in stage]
        for stage in block.stages
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            GPTNeoXConfig(intermediate_size=128, **SIZES),
            [[("query_key_value",), ("dense_h_to_4h",)], [("dense",), ("dense_4h_to_h",)]],
        ),
        (
            PhiConfig(intermediate_size=128, **SIZES),
            [[("q_proj", "k_proj", "v_proj", "fc1")], [("dense",), ("fc2",)]],
        ),
        (
            FalconConfig(**SIZES),
            [[("query_key_value", "dense_h_to_4h")], [("dense",), ("dense_4h_to_h",)]],
        ),
        (
            DeepseekV3Config(
                intermediate_size=128, first_k_dense_replace=2, q_lora_rank=32, kv_lora_rank=16,
                qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, num_key_value_heads=4,
                **SIZES,
            ),
            [
                [("q_a_proj", "kv_a_proj_with_mqa")],
                [("q_b_proj",), ("kv_b_proj",)],
                [("o_proj",)],
                [("gate_proj", "up_proj")],
                [("down_proj",)],
            ],
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_layers_that_do_not_depend_on_each_other_share_a_stage(config, expected, tmp_path):
    assert stages(config, tmp_path) == expected
