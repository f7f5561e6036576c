"""Several methods in one go are the same as each alone."""

import pytest
import torch
from torch import Tensor

from onecomp.errors import ConfigError
from onecomp.job import quantizer_from_record, quantizer_record
from onecomp.jobs import quantize_group
from onecomp.quantizer import GPTQ, RTN
from onecomp.quantizer.several import ResultsOf, Several
from onecomp.statistics import GroupStatistics

WEIGHTS = {"a.q_proj": 300, "a.mlp.up_proj": 130}
SIZE = 48


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def methods() -> list[GPTQ | RTN]:
    """Two orders of columns and two dampings, one that measures, one without a Hessian."""
    return [
        GPTQ(groupsize=16),
        GPTQ(wbits=2, groupsize=16, actorder=True, percdamp=50.0, name="ordered"),
        RTN(groupsize=16, calc_quant_error=True),
    ]


def test_each_method_makes_what_it_makes_alone():
    statistics = GroupStatistics.of(draw(400, SIZE, seed=7) @ draw(SIZE, SIZE, seed=8), None)
    weights = {name: draw(rows, SIZE, seed=rows) for name, rows in WEIGHTS.items()}
    together, lines = quantize_group(Several(quantizers=methods()), weights, statistics, None)
    assert len(together) == 6
    expected_lines = []
    for method in methods():
        alone, alone_lines = quantize_group(method, weights, statistics, None)
        expected_lines += [f"{method.name}: {line}" for line in alone_lines]
        found = ResultsOf(together, method.name)
        assert list(found) == list(WEIGHTS)
        for name, result in alone.items():
            assert torch.equal(found[name].dequantize(), result.dequantize())
            expected, numbers = result.get_statistics(), found[name].get_statistics()
            assert numbers.pop("quantization_time") > 0 < expected.pop("quantization_time")
            assert numbers == expected
    assert lines == expected_lines
    assert any(line.startswith("ordered: round to nearest: ") for line in lines)


@pytest.mark.parametrize(
    ("quantizers", "problem"),
    [
        ([], r"quantizers=\[\]: must be a list of Quantizers"),
        ([GPTQ(), GPTQ(percdamp=0.1)], "two methods are named 'GPTQ_4bit_perchannel'"),
        ([GPTQ(), RTN(num_layers=3)], "RTN_4bit_perchannel has another num_layers than GPTQ"),
    ],
)
def test_lists_that_cannot_run_are_refused(quantizers, problem):
    with pytest.raises(ConfigError, match=problem):
        Several(quantizers=quantizers)


def test_a_layer_that_one_of_them_cannot_take_is_refused_by_its_name():
    several = Several(quantizers=[GPTQ(groupsize=16), RTN(groupsize=5)])
    [problem] = several.layer_problems("a.q_proj", 48, 300)
    assert problem.startswith("RTN_4bit_gs5: groupsize=5 must divide in_features, but a.q_proj")


def test_what_is_to_be_made_can_be_written_down_and_read_back():
    several = Several(
        quantizers=methods(),
    )
    assert quantizer_from_record(quantizer_record(several)) == several
