import pytest

from onecomp.errors import ConfigError, InputError
from onecomp.export.quant_config import (
    LayerFormat,
    check_quant_config,
    finalize_quant_config,
    gptq_format,
    gptq_quant_config,
    layer_format,
    quantized_layers,
    split_layer_name,
)

Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"


def config(**changes):
    return gptq_quant_config(
        **{"wbits": 4, "groupsize": 128, "actorder": False, "sym": True, **changes}
    )


def bits(wbits: int = 4, groupsize: int = 128) -> LayerFormat:
    return gptq_format(wbits, groupsize)


def test_top_level_keys():
    assert config() == {
        "quant_method": "gptq",
        "bits": 4,
        "groupsize": 128,
        "group_size": 128,
        "actorder": False,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }


@pytest.mark.parametrize(
    "override", [{"mlp_wbits": 3}, {"mlp_groupsize": -1}, {"module_wbits": {Q_PROJ: 8}}]
)
def test_overrides_are_kept_and_make_the_method_mixed(override):
    mixed = config(**override)
    assert mixed["quant_method"] == "mixed_gptq"
    assert override.items() <= mixed.items()


def test_no_override_by_an_empty_mapping():
    assert config(module_wbits={}) == config()


def test_keys_added_at_save():
    start = config()
    final = finalize_quant_config(start, {UP_PROJ: bits(), Q_PROJ: bits()}, 3)
    entry = {"bits": 4, "method": "gptq", "params": {"group_size": 128}}
    assert final == {
        **start,
        "quantization_bits": [{"self_attn.q_proj": entry}, {}, {"mlp.up_proj": entry}],
        "modules_in_block_to_quantize": [Q_PROJ, UP_PROJ],
        "quantized_layer_names": [Q_PROJ, UP_PROJ],
        "rotated": False,
        "fp32_had": False,
    }
    assert start == config()


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {Q_PROJ: bits(), UP_PROJ: bits(3)}),
        ({}, {Q_PROJ: bits(), UP_PROJ: bits(4, 64)}),
        ({}, {"model.layers.0.mlp.experts.1.up_proj": bits()}),
        ({"rotated": True}, {Q_PROJ: bits()}),
    ],
)
def test_what_plain_gptq_kernels_would_read_wrongly_becomes_mixed(changes, layers):
    final = finalize_quant_config({**config(), **changes}, layers, 3)
    assert final["quant_method"] == "mixed_gptq"


def test_every_layer_reads_back():
    layers = {
        Q_PROJ: bits(3, -1),
        UP_PROJ: bits(8),
        "model.layers.1.mlp.experts.5.up_proj": bits(2),
    }
    final = finalize_quant_config(config(), layers, 3)
    assert quantized_layers(final, []) == layers


def test_layers_are_found_by_block_where_no_list_names_them():
    final = finalize_quant_config(config(), {Q_PROJ: bits(), UP_PROJ: bits(3)}, 3)
    del final["quantized_layer_names"]
    modules = ["model.layers.0.mlp.up_proj", Q_PROJ, "model.layers.2.mlp", UP_PROJ, "lm_head"]
    assert quantized_layers(final, modules) == {Q_PROJ: bits(), UP_PROJ: bits(3)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("model.decoder.layers.12.fc1", (12, "fc1")),
        ("transformer.h.0.attn.c_proj", (0, "attn.c_proj")),
        ("model.layers.3.mlp.experts.5.up_proj", (3, "mlp.experts.5.up_proj")),
        ("lm_head", None),
        ("model.layers2.x", None),
    ],
)
def test_the_block_index_is_read_from_the_name(name, expected):
    assert split_layer_name(name) == expected


def test_settings_resolve_by_name_then_mlp_then_model():
    mixed = config(mlp_wbits=3, mlp_groupsize=32, module_wbits={UP_PROJ: 8})
    assert layer_format(mixed, Q_PROJ) == bits()
    assert layer_format(mixed, "model.layers.1.mlp.up_proj") == bits(3, 32)
    assert layer_format(mixed, UP_PROJ) == bits(8, 32)


def test_a_layer_outside_the_blocks_needs_the_model_wide_setting():
    assert finalize_quant_config(config(), {"lm_head": bits()}, 1)["quantization_bits"] == [{}]
    with pytest.raises(ConfigError, match=r"lm_head: .*bits=8.* is outside the numbered blocks"):
        finalize_quant_config(config(), {"lm_head": bits(8)}, 1)


def test_number_of_blocks_is_needed_and_respected():
    with pytest.raises(ConfigError, match="num_hidden_layers=None"):
        finalize_quant_config(config(), {Q_PROJ: bits()}, None)
    with pytest.raises(ConfigError, match="is in block 2, but num_hidden_layers=2"):
        finalize_quant_config(config(), {UP_PROJ: bits()}, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"quant_method": "awq"},
            "quant_method='awq' is unknown. Known methods: autobit, dbf",
        ),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format='gptq_v2'"),
        ({"rotated": True}, "rotated=true"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(changes, text):
    check_quant_config(config(), "DIR")
    with pytest.raises(InputError, match=f"DIR: {text}"):
        check_quant_config({**config(), **changes}, "DIR")


def test_missing_bits_are_named():
    silent = config()
    del silent["bits"]
    with pytest.raises(InputError, match=f"no bits for {Q_PROJ}"):
        layer_format(silent, Q_PROJ)
