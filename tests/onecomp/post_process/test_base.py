"""What is recorded of processes, and which models they take."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError, InputError
from onecomp.models import ModelConfig
from onecomp.post_process.base import (
    PROCESSES_KEY,
    Outcome,
    PostQuantizationProcess,
    entry_of,
    quantization_config,
    record,
    records_of,
    require_trainable,
    run_and_record,
    settings_of,
)


@dataclass
class Shift(PostQuantizationProcess):
    """A user's own process, which records nothing."""

    by: float = 1.0
    layers: tuple[str, ...] = ("norm",)

    def run(self, quantized_model: nn.Module, model_config: ModelConfig) -> None:
        with torch.no_grad():
            quantized_model.get_parameter("model.norm.weight").add_(self.by)


@dataclass
class Recording(Shift):
    """One that records itself."""

    def run(self, quantized_model: nn.Module, model_config: ModelConfig) -> None:
        outcome = Outcome(executed=False, reason="it was fine", details={"tries": 3})
        record(quantized_model, self, outcome)


@dataclass
class Collection(Shift):
    """One with settings of every kind."""

    text: CalibrationConfig | None = None
    output: Path = Path("out")
    dtype: torch.dtype = torch.float16
    rates: dict = field(default_factory=dict)
    state: list = field(default_factory=list, init=False)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", num_layers=1)


@pytest.fixture
def config(tiny_model_dir) -> ModelConfig:
    return ModelConfig(path=str(tiny_model_dir()), dtype="float32", device="cpu")


def test_a_process_is_called_as_its_class_unless_it_is_named():
    assert Shift().name == "Shift"
    assert Shift("mine").name == "mine"
    with pytest.raises(TypeError, match="abstract"):
        PostQuantizationProcess()


def test_settings_are_plain_json():
    process = Collection(
        "mine",
        layers=("a", "b"),
        text=CalibrationConfig("text.txt", max_length=48),
        rates={1: Path("x"), "all": [0.5, (None, True)]},
    )
    found = settings_of(process)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["by", "layers", "text", "output", "dtype", "rates"]
    assert found["layers"] == ["a", "b"]
    assert found["text"]["max_length"] == 48
    assert (found["output"], found["dtype"]) == ("out", "torch.float16")
    assert found["rates"] == {"1": "x", "all": [0.5, [None, True]]}


def test_what_a_setting_consists_of_is_plain_json_too():
    @dataclass
    class Place:
        path: Path
        sizes: tuple[int, ...]

    found = settings_of(Collection(rates={"places": [Place(Path("x"), (1, 2))]}))
    assert found["rates"] == {"places": [{"path": "x", "sizes": [1, 2]}]}


def test_an_entry_leaves_out_what_is_empty_and_nothing_else():
    entry = entry_of(Shift(by=0.0), Outcome(executed=False, held_out_before=0.0))
    assert entry == {
        "name": "Shift",
        "class": "Shift",
        "config": {"by": 0.0, "layers": ["norm"]},
        "executed": False,
        "held_out_before": 0.0,
        "seconds": 0.0,
    }
    whole = Outcome(
        executed=True, reason="why", held_out_before=2.0, held_out_after=1.0, details={"epochs": 1}
    )
    entry = entry_of(Shift("mine"), whole)
    assert (entry["name"], entry["class"], entry["reason"]) == ("mine", "Shift", "why")
    assert (entry["held_out_after"], entry["details"]) == (1.0, {"epochs": 1})


def test_a_process_that_records_nothing_is_recorded(model, config):
    before = model.model.norm.weight.detach().clone()
    entry = run_and_record(Shift(by=2.0), model, config)
    assert torch.equal(model.model.norm.weight, before + 2)
    assert entry == records_of(model)[0]
    assert (entry["class"], entry["executed"], entry["config"]["by"]) == ("Shift", True, 2.0)


def test_a_process_that_records_itself_is_recorded_once(model, config):
    run_and_record(Recording(), model, config)
    [entry] = records_of(model)
    assert (entry["executed"], entry["reason"]) == (False, "it was fine")
    assert entry["details"] == {"tries": 3}


def test_records_are_kept_in_order_beside_what_the_configuration_says(model, config):
    model.config.quantization_config = {"bits": 3}
    for process in (Shift("first"), Recording("second"), Shift("third")):
        assert run_and_record(process, model, config)["name"] == process.name
    assert [entry["name"] for entry in records_of(model)] == ["first", "second", "third"]
    assert model.config.quantization_config["bits"] == 3
    assert json.loads(json.dumps(records_of(model))) == records_of(model)


def test_a_record_does_not_change_the_dict_that_was_there(model):
    shared = {"bits": 3, PROCESSES_KEY: []}
    model.config.quantization_config = shared
    record(model, Shift(), Outcome(executed=True))
    assert shared == {"bits": 3, PROCESSES_KEY: []}
    quantization_config(model).clear()
    assert len(records_of(model)) == 1


def test_a_model_made_by_hand_has_no_records(model):
    assert quantization_config(model) == {}
    assert records_of(model) == []
    model.config.quantization_config = None
    assert records_of(model) == []


def test_quantized_layers_are_found_by_their_full_names(subject):
    model = subject.load()
    layers = require_trainable(Shift(), model, subject.model_config)
    assert len(layers) == 14
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert "model.layers.1.mlp.down_proj" in layers


def test_models_that_cannot_be_trained_are_refused_by_the_processs_name(model, subject):
    with pytest.raises(InputError, match=r"^mine: the model has no quantized layers. Give one"):
        require_trainable(Shift("mine"), model, subject.model_config)
    rotated = subject.load()
    rotated.config.quantization_config["rotated"] = True
    with pytest.raises(ConfigError, match=r"^mine: the model is rotated, but .*RotatedModelConfig"):
        require_trainable(Shift("mine"), rotated, subject.model_config)
    rotated.config.quantization_config["rotated"] = False
    assert require_trainable(Shift("mine"), rotated, subject.model_config)
