from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from onecomp.errors import LayerError
from onecomp.jobs import quantize_group
from onecomp.qep import QEPConfig
from onecomp.quantizer import GPTQ, RTN, QuantizationResult, Quantizer
from onecomp.quantizer.gptq import GPTQLinear
from onecomp.statistics import GroupStatistics


@dataclass
class Halver(Quantizer):
    """Rounds to multiples of 1/2: a user's quantizer with nothing but ``quantize_layer``."""

    def quantize_layer(
        self,
        module: nn.Module,
        input: object = None,  # noqa: A002 - documented name
        hessian: Tensor | None = None,
    ) -> Tensor:
        return (module.weight.data * 2).round() / 2


@dataclass
class NeedsHessian(Halver):
    flag_calibration: bool = True
    flag_hessian: bool = True

    def quantize_layer(
        self,
        module: nn.Module,
        input: object = None,  # noqa: A002 - documented name
        hessian: Tensor | None = None,
    ) -> QuantizationResult:
        name = self.module_to_name[module]
        return QuantizationResult(
            dequantized_weight=torch.full_like(module.weight, float(name)) @ hessian
        )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_model() -> nn.Module:
    block = {"q": nn.Linear(32, 32, bias=False), "mlp": nn.Linear(32, 32), "norm": nn.LayerNorm(32)}
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                [nn.ModuleDict(block), nn.ModuleDict({"q": nn.Linear(32, 32)})]
            ),
            "conv": nn.Conv1d(4, 4, 1),
            "lm_head": nn.Linear(32, 64),
        }
    )
    return model.requires_grad_(requires_grad=False)


ALL = ["layers.0.q", "layers.0.mlp", "layers.1.q"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ALL),
        ({"exclude_layer_names": []}, [*ALL, "lm_head"]),
        ({"target_layer_types": (nn.Conv1d,)}, ["conv"]),
        ({"target_layer_types": (nn.Linear, nn.Conv1d)}, [*ALL, "conv"]),
        (
            {"include_layer_names": ["layers.1.q", "layers.0.q", "none"]},
            ["layers.0.q", "layers.1.q"],
        ),
        ({"include_layer_names": ["q"]}, []),
        ({"include_layer_names": ["lm_head"]}, []),
        ({"include_layer_keywords": ["mlp", "1."]}, ["layers.0.mlp", "layers.1.q"]),
        ({"include_layer_keywords": ["q"], "include_layer_names": ["layers.0.mlp"]}, []),
        ({"exclude_layer_keywords": ["mlp"]}, ["layers.0.q", "layers.1.q"]),
        (
            {"include_layer_keywords": ["layers.0"], "exclude_layer_keywords": [".q"]},
            ["layers.0.mlp"],
        ),
        ({"exclude_layer_names": ["layers.0.q"], "include_layer_names": ["layers.0.q"]}, []),
        ({"num_layers": 2}, ALL[:2]),
        ({"num_layers": 1, "exclude_layer_keywords": ["0.q"]}, ["layers.0.mlp"]),
        ({"num_layers": 0}, []),
    ],
)
def test_layers_are_selected_by_every_rule_in_order(settings, expected):
    assert list(Halver(**settings).select_layers(small_model())) == expected


def test_setup_notes_the_targets_and_execute_post_processing_forgets_them():
    model, quantizer = small_model(), Halver()
    quantizer.setup(model)
    assert list(quantizer.module_to_name.values()) == ALL
    quantizer.execute_post_processing()
    assert quantizer.module_to_name == {}


def test_a_quantizer_with_only_quantize_layer_runs_as_a_job():
    weights = {"a": draw(4, 8), "b": draw(6, 8, seed=1)}
    results, fallbacks = quantize_group(Halver(calc_quant_error=True), weights, None, None)
    assert fallbacks == []
    for name, weight in weights.items():
        assert torch.equal(results[name].dequantize(), (weight * 2).round() / 2)
        assert results[name].weight_squared_error > 0
        assert results[name].quantization_time >= 0
        assert results[name].output_squared_error is None


def test_a_job_hands_the_hessian_and_the_names_to_quantize_layer():
    weights = {"1": draw(4, 8), "2": draw(6, 8, seed=1)}
    statistics = GroupStatistics.of(draw(50, 8), None)
    quantizer = NeedsHessian(hessian_dtype=torch.float32)
    results, _ = quantize_group(quantizer, weights, statistics, None)
    for name, weight in weights.items():
        expected = torch.full_like(weight, float(name)) @ statistics.hessian()
        assert torch.equal(results[name].dequantize(), expected)
    assert quantizer.module_to_name == {}


def test_a_job_corrects_the_weights_that_error_propagation_names():
    weights = {"a.q_proj": draw(4, 8), "a.mlp.down_proj": draw(6, 8, seed=1)}
    rows = draw(50, 8, seed=2)
    statistics = GroupStatistics.of(rows, rows + draw(50, 8, seed=3))
    qep = QEPConfig(perccorr=1.0)
    quantizer = GPTQ(wbits=8)
    corrected, plain = (quantize_group(quantizer, weights, statistics, q)[0] for q in (qep, None))
    same = {n: torch.equal(corrected[n].dequantize(), plain[n].dequantize()) for n in weights}
    assert same == {"a.q_proj": False, "a.mlp.down_proj": True}


def test_a_job_with_an_indefinite_hessian_corrects_nothing_rounds_and_says_so():
    weights = {"q_proj": draw(4, 16), "k_proj": draw(6, 16, seed=1)}
    gram = torch.diag(torch.tensor([-100.0, *[1.0] * 15]))
    statistics = GroupStatistics(2, [gram], draw(16, 16, seed=2))
    results, fallbacks = quantize_group(GPTQ(), weights, statistics, QEPConfig(perccorr=1.0))
    reasons = [fallback.split(" with ")[0] for fallback in fallbacks]
    assert reasons == [
        "weights not corrected: The Hessian is not positive definite",
        "round to nearest: The Hessian is not positive definite",
    ]
    rounded, _ = quantize_group(RTN(sym=True), weights, None, None)
    for name in weights:
        assert torch.equal(results[name].dequantize(), rounded[name].dequantize())


def test_a_job_without_tokens_rounds_to_nearest_and_says_so():
    weights = {"expert": draw(4, 32)}
    results, fallbacks = quantize_group(GPTQ(wbits=3), weights, None, None)
    assert fallbacks == ["round to nearest: no calibration token reached it"]
    rounded = RTN(wbits=3, sym=True)
    expected, _ = quantize_group(rounded, weights, None, None)
    assert torch.equal(results["expert"].dequantize(), expected["expert"].dequantize())


def test_a_job_names_the_layer_whose_weight_is_not_finite():
    weight = draw(4, 8)
    weight[1, 2] = torch.nan
    message = (
        "^layer: its weight holds 1 NaN or infinite values of 32. "
        "The checkpoint is damaged, or --dtype is too narrow for it.$"
    )
    with pytest.raises(LayerError, match=message):
        quantize_group(Halver(), {"layer": weight}, None, None)


def test_a_job_that_cannot_be_done_names_the_first_layer():
    with pytest.raises(LayerError, match=r"^layer: A scale of .* does not fit float16"):
        quantize_group(RTN(), {"layer": 1e9 * draw(4, 8)}, None, None)


class Reading(Mapping[str, QuantizationResult]):
    """Results that are made when they are read, as those of a run directory."""

    def __init__(self, names: list[str]):
        self.names, self.num_read = names, 0

    def __getitem__(self, name: str) -> QuantizationResult:
        if name not in self.names:
            raise KeyError(name)
        self.num_read += 1
        return QuantizationResult(quantization_time=float(self.num_read))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_the_hook_adds_to_the_results_of_a_run_and_reads_none_of_them():
    model, stored = small_model(), Reading(["layers.0.q", "other"])
    quantizer = RTN()
    quantizer.setup(model)
    quantizer.results = stored
    for name in ("layers.0.q", "layers.0.mlp"):
        quantizer.quantize(model.get_submodule(name), torch.ones(2, 32), None)
    assert set(quantizer.results) == {"layers.0.q", "other", "layers.0.mlp"}
    assert stored.num_read == 0
    for name in ("layers.0.q", "layers.0.mlp"):
        expected = RTN().quantize_layer(model.get_submodule(name))
        assert torch.equal(quantizer.results[name].dequantize(), expected.dequantize())
    assert quantizer.results["other"].quantization_time == 1.0


def test_results_replace_layers_of_a_model_in_place():
    model, quantizer = small_model(), RTN(wbits=8)
    quantizer.setup(model)
    for module, name in quantizer.module_to_name.items():
        quantizer.results[name] = quantizer.quantize_layer(module)
    bias = model["layers"][0]["mlp"].bias.clone()
    quantizer.apply_results_to_model(model, pack_weights=False)
    for name in ALL:
        layer = model.get_submodule(name)
        assert isinstance(layer, GPTQLinear)
        assert not layer.packed
        assert torch.equal(layer.dequantize(), quantizer.results[name].dequantize())
    assert torch.equal(model["layers"][0]["mlp"].bias, bias)
    assert isinstance(model["lm_head"], nn.Linear)


def test_a_layer_without_an_inference_layer_gets_its_dequantized_weight():
    model = small_model()
    quantizer = Halver(include_layer_names=["layers.0.q"])
    quantizer.setup(model)
    layer = model["layers"][0]["q"]
    quantizer.quantize(layer, torch.ones(2, 32), None)
    expected = (layer.weight.data * 2).round() / 2
    assert not torch.equal(layer.weight.data, expected)
    quantizer.apply_results_to_model(model)
    assert model["layers"][0]["q"] is layer
    assert torch.equal(layer.weight.data, expected)


def test_methods_without_a_checkpoint_format_say_so():
    quantizer = Halver()
    with pytest.raises(
        NotImplementedError, match=r"^Halver has no checkpoint format of its own\.$"
    ):
        quantizer.get_quant_config()
    with pytest.raises(
        NotImplementedError, match=r"^QuantizationResult has no inference layer of its own"
    ):
        quantizer.create_inference_layer(QuantizationResult(), nn.Linear(2, 2))
    assert quantizer.finalize_quant_config_for_save({"a": 1}, [], None) == {"a": 1}


def test_settings_leave_out_what_a_run_fills():
    settings = GPTQ(wbits=3).settings()
    assert settings["wbits"] == 3
    assert not {"results", "module_to_name"} & settings.keys()
    assert GPTQ(**settings) == GPTQ(wbits=3)
