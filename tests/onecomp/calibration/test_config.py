from dataclasses import MISSING, FrozenInstanceError, fields, replace

import pytest

from onecomp.calibration.config import CalibrationConfig
from onecomp.errors import ConfigError

DOCUMENTED = [
    ("calibration_dataset", "c4"),
    ("max_length", 2048),
    ("num_calibration_samples", 512),
    ("strategy", "drop_rand"),
    ("seed", 0),
    ("batch_size", None),
    ("num_layers_per_group", 7),
    ("text_key", "text"),
    ("use_quality_filter", False),
    ("max_documents", 10000),
]


def test_documented_fields_come_first_in_order_with_their_defaults():
    positional = [(f.name, f.default) for f in fields(CalibrationConfig) if not f.kw_only]
    assert positional == DOCUMENTED


def test_every_addition_is_keyword_only_with_a_default():
    additions = [f for f in fields(CalibrationConfig) if f.kw_only]
    assert {f.name for f in additions} == {"dataset_subset", "dataset_split"}
    assert all(f.default is not MISSING for f in additions)


def test_none_means_c4():
    assert CalibrationConfig(None).dataset_name == CalibrationConfig().dataset_name == "c4"


def test_replace_of_nothing_is_equal_and_fields_are_frozen():
    config = CalibrationConfig("wikitext2", seed=3)
    assert replace(config) == config
    with pytest.raises(FrozenInstanceError):
        config.seed = 4  # pyrefly: ignore[read-only]


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        CalibrationConfig(max_length=0, strategy="drop", seed=-1, text_key=" ")
    assert caught.value.problems == [
        "max_length=0: must be a whole number of at least 1.",
        "seed=-1: must be a whole number from 0 to 2**63 - 1.",
        "strategy='drop': must be one of drop_head, drop_rand, concat_chunk, concat_chunk_align, "
        "concat_rand.",
        "text_key=' ': must be a non-empty string.",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("calibration_dataset", ""),
        ("max_length", True),
        ("num_calibration_samples", 0),
        ("strategy", "concat"),
        ("seed", 2**63),
        ("batch_size", 0),
        ("num_layers_per_group", 0),
        ("max_documents", -1),
        ("dataset_subset", ""),
        ("dataset_split", ""),
    ],
)
def test_a_bad_value_is_named_with_its_field(field, value):
    with pytest.raises(ConfigError, match=rf"CalibrationConfig: {field}="):
        CalibrationConfig(**{field: value})
