"""Options of the command line become methods; those that a method lacks are refused."""

from typing import get_args

import pytest
from every_method import METHODS as EVERY_METHOD

from onecomp import cli
from onecomp.errors import ConfigError
from onecomp.job_options import METHODS, JobOptions
from onecomp.models import ModelConfig, Skeleton
from onecomp.quantizer import DBF, GPTQ, AutoBitQuantizer, JointQ


def options(method: str, **more: object) -> JobOptions:
    values: dict = {
        "model": "m", "dtype": "auto", "trust_remote_code": False, "quantizer": method,
        "wbits": None, "target_bits": None, "groupsize": None, "sym": None, "mse": None,
        "actorder": None, "static_groups": None, "qep": True, "calibration_dataset": "c4",
        "text_key": "text", "max_length": 64, "num_calibration_samples": 4, "seed": 0,
    }  # fmt: skip
    return JobOptions(**values | more)


@pytest.fixture(scope="module")
def skeleton(tiny_model_dir) -> Skeleton:
    config = ModelConfig(str(tiny_model_dir("llama")))
    return Skeleton.build(config.source, config.torch_dtype)


def test_the_command_line_offers_every_method():
    offered = set(get_args(get_args(cli.Method)[0]))
    assert offered == set(METHODS) == {*EVERY_METHOD, "autobit"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_made_from_the_defaults(skeleton, method):
    made = options(method).method(lambda: skeleton)
    assert made.name
    for name, layer in made.select_layers(skeleton.model).items():
        assert made.layer_problems(name, layer.in_features, layer.out_features) == []


def test_bits_and_groups_are_handed_on(skeleton):
    made = options("jointq", wbits=3, groupsize=32).method(lambda: skeleton)
    assert isinstance(made, JointQ)
    assert (made.bits, made.group_size, made.symmetric) == (3, 32, True)
    assert made.actorder is False
    assert options("jointq", actorder=True, groupsize=32).method(lambda: skeleton).actorder
    assert options("jointq", groupsize=-1).method(lambda: skeleton).group_size is None
    assert options("cq").method(lambda: skeleton).groupsize == -1
    assert options("cq", groupsize=32).method(lambda: skeleton).groupsize == 32
    made = options("dbf", target_bits=1.25).method(lambda: skeleton)
    assert isinstance(made, DBF)
    assert made.target_bits == 1.25
    made = options("autobit", target_bits=3.5, groupsize=32).method(lambda: skeleton)
    assert isinstance(made, AutoBitQuantizer)
    assert made.target_bit == 3.5
    assert {(c.wbits, c.groupsize) for c in made.quantizers if isinstance(c, GPTQ)} == {
        (bits, 32) for bits in (2, 3, 4, 8)
    }


@pytest.mark.parametrize(
    ("method", "more", "problem"),
    [
        ("onebit", {"wbits": 2}, "--wbits is no option of onebit. Leave it out; it stores one bit"),
        ("dbf", {"wbits": 2}, "its bits are chosen with --target-bits"),
        ("gptq", {"target_bits": 3.5}, "its bits are chosen with --wbits"),
        ("quip", {"groupsize": 64}, "--groupsize is no option of quip"),
        ("rtn", {"actorder": False}, "--actorder is no option of rtn. Leave it out."),
        ("arb", {"sym": True}, "--sym/--asym is no option of arb. Leave it out."),
    ],
)
def test_options_that_a_method_lacks_are_refused(skeleton, method, more, problem):
    with pytest.raises(ConfigError, match=problem):
        options(method, **more).method(lambda: skeleton)
