import re

import pytest
import torch
from torch import nn

from onecomp.errors import ConfigError, LayerError
from onecomp.quantizer import RTN
from onecomp.quantizer.gptq import GPTQLinear


def layer_of(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight = nn.Parameter(torch.tensor(rows), requires_grad=False)
    return layer


def random_layer(in_features: int = 64, out_features: int = 32) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return layer.requires_grad_(requires_grad=False)


def test_a_row_by_hand():
    result = RTN(wbits=2).quantize_layer(layer_of([[-1.0, 0.0, 0.4, 2.0], [0.0, 0.6, 1.4, 3.0]]))
    assert result.scale.tolist() == [[1.0], [1.0]]
    assert result.zero.tolist() == [[1.0], [0.0]]
    assert result.quantized_weight.tolist() == [[0, 1, 1, 3], [0, 1, 1, 3]]
    assert result.dequantize().tolist() == [[-1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 3.0]]
    assert result.compute_dequantized_weight().dtype == torch.float16


def test_groups_have_their_own_scales():
    result = RTN(wbits=2, groupsize=2).quantize_layer(layer_of([[0.0, 3.0, -6.0, 0.0]]))
    assert result.scale.tolist() == [[1.0, 2.0]]
    assert result.zero.tolist() == [[0.0, 3.0]]
    assert result.dequantize().tolist() == [[0.0, 3.0, -6.0, 0.0]]


@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
@pytest.mark.parametrize("groupsize", [-1, 32])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_results_are_saved_in_the_layout_of_gptq(wbits, groupsize, sym, mse):
    layer = random_layer()
    quantizer = RTN(wbits=wbits, groupsize=groupsize, sym=sym, mse=mse)
    result = quantizer.quantize_layer(layer)
    inference = quantizer.create_inference_layer(result, layer)
    assert isinstance(inference, GPTQLinear)
    assert inference.packed
    assert torch.equal(inference.dequantize(), result.dequantize())
    config = quantizer.get_quant_config()
    assert (config["quant_method"], config["bits"]) == ("gptq", wbits)
    assert (config["group_size"], config["sym"], config["desc_act"]) == (groupsize, sym, False)


def test_the_search_lowers_the_error():
    layer = random_layer()
    plain, searched = (
        (layer.weight - RTN(wbits=3, mse=mse, norm=2.0).quantize_layer(layer).dequantize())
        for mse in (False, True)
    )
    assert searched.square().sum() < plain.square().sum()


def test_no_calibration_is_asked_for():
    assert not RTN().flag_calibration
    assert not RTN().flag_hessian
    assert RTN(groupsize=64).name == "RTN_4bit_gs64"


def test_problems_are_listed_and_layers_named():
    with pytest.raises(ConfigError, match="2 problems"):
        RTN(wbits=0, groupsize=0)
    message = "layer: groupsize=48 must divide in_features, but layer has in_features=64"
    quantizer, layer = RTN(groupsize=48), random_layer()
    quantizer.module_to_name = {layer: "layer"}
    with pytest.raises(LayerError, match=re.escape(message)):
        quantizer.quantize_layer(layer)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"wbits": True}, "wbits=True: must be a whole number from 1 to 8."),
        ({"wbits": "4"}, "wbits='4': must be a whole number from 1 to 8."),
        ({"groupsize": 1.5}, "groupsize=1.5: must be -1 (one group a row) or at least 1."),
        ({"groupsize": None}, "groupsize=None: must be -1 (one group a row) or at least 1."),
        ({"mse": True, "grid": "9"}, "grid='9': must be a whole number, at least 1."),
        ({"grid": 9.5}, "grid=9.5: must be a whole number, at least 1."),
        ({"mse": True, "norm": "x"}, "norm='x': must be above 0."),
    ],
)
def test_a_value_of_the_wrong_type_is_a_problem_like_one_out_of_range(settings, problem):
    quantizer = RTN()
    vars(quantizer).update(settings)  # by a constructor the tests' type checks would be first
    with pytest.raises(ConfigError, match=f"^RTN: {re.escape(problem)}$"):
        quantizer.validate_params()
