import pytest

from onecomp.errors import ConfigError
from onecomp.qep import QEPConfig


def test_documented_defaults():
    config = QEPConfig()
    assert vars(config) == {
        "general": False,
        "percdamp": 0.01,
        "perccorr": 0.5,
        "device": None,
        "exclude_layer_keywords": ["mlp.down_proj"],
    }


def test_which_layers_are_corrected():
    assert QEPConfig().corrects("layers.0.mlp.up_proj")
    assert not QEPConfig().corrects("layers.0.mlp.down_proj")
    assert QEPConfig(exclude_layer_keywords=[]).corrects("layers.0.mlp.down_proj")
    assert not QEPConfig(perccorr=0.0).corrects("layers.0.mlp.up_proj")


def test_values_out_of_range_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        QEPConfig(percdamp=0.0, perccorr=1.5)
    assert str(caught.value).splitlines() == [
        "QEPConfig: 2 problems",
        "  - percdamp=0.0: must be above 0.",
        "  - perccorr=1.5: must be from 0 to 1.",
    ]
