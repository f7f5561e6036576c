"""Bits that fit a GPU, from true counts of parameters."""

from dataclasses import replace

import pytest
from tiny_models import tiny_config, tiny_model

from onecomp.errors import ConfigError
from onecomp.planning.vram import (
    estimate_target_bitwidth,
    estimate_wbits_from_vram,
    kv_cache_bytes,
)


def test_what_is_estimated_fills_the_budget_exactly(tiny_model_dir):
    found = estimate_wbits_from_vram(
        str(tiny_model_dir("llama", num_layers=4)), 0.5, total_vram_gb=0.001, max_length=100
    )
    bits = found.quantizable_params * (found.target_bitwidth + 20 / 128)
    plain = 2 * (found.total_params - found.quantizable_params)
    cache = 2 * 4 * 2 * 16 * 100 * 2
    assert bits / 8 + plain + cache == pytest.approx(0.5 * 0.001e9)
    assert found.kv_cache_gb == pytest.approx(cache / 1e9)


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_are_counted_not_assumed(tie, tiny_model_dir):
    """Most of this model is its embedding: 95 % would be off by far."""
    model = tiny_model("llama", tie=tie)
    found = estimate_wbits_from_vram(str(tiny_model_dir("llama", tie=tie)), total_vram_gb=0.01)
    assert found.total_params == sum(p.numel() for p in model.parameters())
    inside = [p for n, p in model.named_parameters() if "proj" in n]
    assert found.quantizable_params == sum(p.numel() for p in inside)
    assert found.quantizable_params < 0.9 * found.total_params


def test_a_live_model_and_its_configuration_give_the_same(tiny_model_dir):
    by_name = estimate_wbits_from_vram(str(tiny_model_dir()), 0.7, total_vram_gb=0.01)
    assert estimate_target_bitwidth(tiny_model("llama"), total_vram_gb=0.01) == by_name
    assumed = estimate_target_bitwidth(
        tiny_model("llama"), total_vram_gb=0.01, quantizable_ratio=0.95
    )
    assert assumed.quantizable_params == round(0.95 * by_name.total_params)


def test_rows_without_groups_share_their_scales():
    model = tiny_model("llama")
    found = estimate_target_bitwidth(model, total_vram_gb=0.01, group_size=-1, wbits=3)
    rows = sum(p.shape[0] for n, p in model.named_parameters() if "proj" in n)
    assert found.meta_bits_per_param == pytest.approx(rows * 19 / found.quantizable_params)


def test_windows_bound_the_cache():
    config = tiny_config("gemma2")
    config.sliding_window = 10
    config.layer_types = ["sliding_attention", "full_attention"]
    assert kv_cache_bytes(config, 100) == 2 * 2 * 16 * (10 + 100) * 2
    assert kv_cache_bytes(config, 100, batch_size=3, kv_bits=8) == 3 * 2 * 2 * 16 * 110
    assert kv_cache_bytes(config, 0) == 0


def test_too_small_a_memory_and_bad_arguments_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="take all of it"):
        estimate_target_bitwidth(model, total_vram_gb=0.0001)
    with pytest.raises(ConfigError) as caught:
        estimate_target_bitwidth(
            model, 1.5, total_vram_gb=-1.0, group_size=0, max_length=-1, batch_size=0, wbits=0,
            scale_bits=-1,
        )  # fmt: skip
    assert len(caught.value.problems) == 7


def test_a_width_below_nothing_is_refused():
    """Room for the weights, but for less than their scales."""
    model = tiny_model("llama")
    fits = estimate_target_bitwidth(model, total_vram_gb=0.01)
    plain_gb = fits.non_quant_weight_gb + fits.kv_cache_gb
    few_gb = plain_gb + 0.5 * fits.meta_bits_per_param * fits.quantizable_params / 8e9
    with pytest.raises(ConfigError, match=r"0\.16 bits a weight of scales take all of it"):
        estimate_target_bitwidth(model, 1.0, total_vram_gb=few_gb)


def test_more_context_leaves_fewer_bits():
    model = tiny_model("llama")
    short, long = (
        estimate_target_bitwidth(model, total_vram_gb=0.01, max_length=n) for n in (0, 4096)
    )
    assert long.target_bitwidth < short.target_bitwidth
    assert replace(long, kv_cache_gb=0.0).non_quant_weight_gb == short.non_quant_weight_gb
