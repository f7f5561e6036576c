"""Settings, shapes that have no room, the journal, and the way through a checkpoint."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor, nn

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError, LayerError, QuantizationError
from onecomp.executor import LocalExecutor
from onecomp.export.load import load_quantized_model
from onecomp.export.verify import verify_checkpoint
from onecomp.jobs import quantize_group
from onecomp.models import ModelConfig, ModelSource
from onecomp.quantizer.baseline import nearest_weight, sign_mean_weight
from onecomp.quantizer.dbf import DBF, DBFResult, DoubleBinaryLinear
from onecomp.quantizer.dbf import quantizer as settings
from onecomp.quantizer.dbf.rank import achievable_bits, bits_with_scales, is_clamped, rank_of
from onecomp.quantizer.factors import HessianFactors
from onecomp.runner import Runner
from onecomp.statistics import GroupStatistics
from onecomp.store import RunDirectory

FAST = DBF(target_bits=1.2, iters=4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(size: int) -> GroupStatistics:
    return GroupStatistics.of(draw(200, size, seed=1) @ draw(size, size, seed=2), None)


def test_defaults_and_names():
    assert DBF().name == "DBF_1.5bit"
    assert DBF(target_bits=2.0).name == "DBF_2bit"
    assert DBF().iters == 600
    assert dataclasses.replace(DBF(), target_bits=1.25).name == "DBF_1.25bit"


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        DBF(
            target_bits=0.0,
            iters=0,
            reg=-1.0,
            balance_iters=0,
            balance_alpha=0.0,
            balance_mode="l3",
            mlp_target_bits=0.5,
            module_target_bits={"a": math.nan},
        )
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "target_bits",
        "mlp_target_bits",
        "module_target_bits['a']",
        "iters",
        "reg",
        "balance_iters",
        "balance_alpha",
        "balance_mode",
    ]


def test_settings_of_balancing_are_of_no_account_without_it():
    assert DBF(use_balancing=False, balance_iters=0, balance_alpha=0.0, balance_mode="none")


def test_bits_of_a_layer_come_from_its_name_then_for_mlps_then_for_all():
    by_name = {"mlp.a": 1.75}
    assert DBF.resolve_bits("mlp.a", 1.5, 1.25, by_name) == 1.75
    assert DBF.resolve_bits("mlp.b", 1.5, 1.25, by_name) == 1.25
    assert DBF.resolve_bits("attn", 1.5, 1.25, by_name) == 1.5
    assert DBF.resolve_bits(None, 1.5, 1.25, by_name) == 1.5


@pytest.mark.parametrize(
    ("shape", "bits", "rank"),
    [
        ((4096, 4096), 1.5, 3072),
        ((4096, 14336), 1.0, 3185),
        ((14336, 4096), 2.0, 4096),  # clamped
        ((192, 576), 1.5, 192),  # clamped
        ((3, 5), 0.1, 1),
        ((100, 300), 1.1, 82),
    ],
)
def test_the_rank_is_the_largest_that_the_bits_allow(shape, bits, rank):
    out_features, in_features = shape
    assert rank_of(out_features, in_features, bits) == rank
    both = out_features + in_features
    plain = int(bits * in_features * out_features / both)
    assert rank == max(1, min(plain, *shape))
    assert is_clamped(*shape, bits) == (plain > min(shape))
    assert achievable_bits(*shape, bits) == pytest.approx(rank * both / math.prod(shape))


def test_stored_bits_are_those_of_the_tensors():
    quantizer = dataclasses.replace(FAST, target_bits=1.0)
    [result] = quantize_group(quantizer, {"a": draw(64, 32)}, statistics_of(32), None)[0].values()
    num_bits = sum(8 * t.numel() * t.element_size() for t in result.tensors().values())
    assert num_bits == bits_with_scales(64, 32, 1.0) * 64 * 32


def test_layers_without_room_are_told_once_with_what_they_get():
    shapes = {f"layers.{i}.mlp.up_proj": (14336, 4096) for i in range(5)} | {"q": (4096, 4096)}
    assert DBF(target_bits=1.2).remarks(shapes) == []
    assert DBF(target_bits=1.2).model_problems(shapes) == []
    [remark] = DBF(target_bits=1.5).remarks(shapes)
    assert remark.startswith("5 of 6 layers get fewer bits than asked")
    assert "layers.2.mlp.up_proj and 2 more of 14336 x 4096: 1.286 of 1.5." in remark
    assert DBF(target_bits=1.5).model_problems(shapes) == []


def test_bits_that_no_layer_has_room_for_are_refused():
    shapes = {"up": (14336, 4096), "v": (1024, 4096)}
    [problem] = DBF(target_bits=1.5).model_problems(shapes)
    assert problem == (
        "target_bits=1.5: no layer has room for so many, up of 14336 x 4096 holds 1.286, which is "
        "the most. Use target_bits=1.286 or less, or GPTQ."
    )
    assert DBF(target_bits=1.285).model_problems(shapes) == []


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.5])
def test_more_bits_lower_the_error_and_plain_rounding_is_beaten(bits):
    weights, statistics = {"a": draw(64, 64), "b": draw(64, 64, seed=5)}, statistics_of(64)
    quantizer = DBF(target_bits=bits, iters=12)
    results, fallbacks = quantize_group(quantizer, weights, statistics, None)
    more, _ = quantize_group(dataclasses.replace(quantizer, target_bits=bits + 0.4), weights,
                             statistics, None)  # fmt: skip
    for name in weights:
        error, less = (r[name].relative_output_squared_error for r in (results, more))
        assert less < 0.9 * error
    if bits >= 1:
        assert fallbacks == []


def test_plain_rounding_to_compare_with_has_no_more_bits():
    weight = draw(16, 16)
    by_name = DBF(target_bits=1.5, module_target_bits={"b": 2.5})
    assert torch.equal(by_name.baseline("a", weight), sign_mean_weight(weight))
    assert torch.equal(by_name.baseline("b", weight), nearest_weight(weight, wbits=2))
    wide = draw(8, 16)  # has room for 1.5
    assert torch.equal(by_name.baseline("b", wide), sign_mean_weight(wide))


def test_scales_beyond_float16_are_refused():
    with pytest.raises(LayerError, match=r"q: A scale of .* does not fit float16"):
        quantize_group(FAST, {"q": 1e12 * draw(16, 32)}, statistics_of(32), None)


def test_layers_of_several_shapes_keep_their_order_and_their_own_bits():
    weights = {"q": draw(32, 32), "k": draw(16, 32, seed=3), "v": draw(16, 32, seed=4)}
    quantizer = dataclasses.replace(FAST, module_target_bits={"v": 1.0})
    results, _ = quantize_group(quantizer, weights, statistics_of(32), None)
    assert list(results) == ["q", "k", "v"]
    ranks = {name: len(result.dbf_mid) for name, result in results.items()}
    assert ranks == {"q": 19, "k": 12, "v": 10}
    for name, result in results.items():
        assert result.dequantize().shape == weights[name].shape
        assert result.relative_output_squared_error < 0.6


def test_packed_and_plain_signs_are_the_same():
    weights, statistics = {"a": draw(24, 32)}, statistics_of(32)
    pair = [
        quantize_group(dataclasses.replace(FAST, bitpack_on_quantize=packed), weights, statistics,
                       None)[0]["a"]
        for packed in (True, False)
    ]  # fmt: skip
    assert pair[0].dbf_A.dtype == torch.uint8
    assert pair[0].dbf_A_original_shape == list(pair[1].dbf_A.shape)
    assert pair[1].dbf_A.dtype == torch.float16
    assert not pair[1].dbf_B_is_packed
    assert torch.equal(pair[0].dequantize(), pair[1].dequantize())


def test_a_search_that_fails_goes_on_with_the_diagonal_and_says_so(monkeypatch):
    whole = settings.dbf_quantize

    def fails(weight, hessian, *others):
        if hessian.count_nonzero() > len(hessian):
            raise QuantizationError("overflow.")
        return whole(weight, hessian, *others)

    monkeypatch.setattr(settings, "dbf_quantize", fails)
    factors = HessianFactors(statistics_of(32).hessian())
    result = FAST.quantize_weights({"a": draw(24, 32)}, factors)["a"]
    assert factors.fallbacks == ["diagonal of the Hessian: overflow."]
    assert result.dequantize().isfinite().all()


def test_weights_are_not_written_to():
    weight = draw(24, 32)
    kept = weight.clone()
    FAST.quantize_weights({"a": weight}, HessianFactors(statistics_of(32).hessian()))
    assert torch.equal(weight, kept)


def test_a_single_layer_is_quantized_from_its_input():
    layer = nn.Linear(32, 24, bias=False)
    result = FAST.quantize_layer(layer, draw(100, 32))
    assert isinstance(result, DBFResult)
    assert result.is_dbf_quantized
    assert (result.target_bits, result.iters, result.balance_mode) == (1.2, 4, "l1")


# Through a checkpoint


@pytest.fixture(scope="module")
def saved(tiny_model_dir, text, tmp_path_factory):
    """A run, and the checkpoint of it."""
    folder = tmp_path_factory.mktemp("dbf")
    model = tiny_model_dir("llama")
    runner = Runner(
        ModelConfig(path=str(model), dtype="float32", device="cpu"),
        dataclasses.replace(FAST, mlp_target_bits=1.0),
        calibration_config=CalibrationConfig(str(text), 48, 8, strategy="concat_chunk"),
        report_progress=False,
        executor=LocalExecutor(1),
        run_dir=folder / "run",
    )
    runner.run()
    runner.executor.stop()
    runner.save_quantized_model(folder / "out")
    return runner, model, folder


def test_a_checkpoint_loads_with_the_weights_of_the_results(saved):
    runner, _, folder = saved
    loaded, _ = load_quantized_model(folder / "out", device_map="cpu")
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, DoubleBinaryLinear)}
    assert layers.keys() == set(runner.quantizer.results)
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), runner.quantizer.results[name].dequantize())


def test_the_configuration_has_the_keys_of_the_format(saved):
    config = json.loads((saved[2] / "out" / "config.json").read_text())["quantization_config"]
    algorithm = {
        "iters": 4,
        "reg": 0.03,
        "use_balancing": True,
        "balance_iters": 40,
        "balance_alpha": 1.0,
        "balance_mode": "l1",
        "use_adaptive_rho": True,
    }
    assert config["quant_method"] == "dbf"
    assert config["bits"] == 1.2
    assert config["mlp_target_bits"] == 1.0
    assert {key: config[key] for key in algorithm} == algorithm
    entries = config["quantization_bits"][0]
    assert entries["self_attn.q_proj"] == {"bits": 1.2, "method": "dbf", "params": algorithm}
    assert entries["mlp.up_proj"] == {"bits": 1.0, "method": "dbf", "params": algorithm}


def test_verify_knows_the_format(saved):
    _, model, folder = saved
    found = verify_checkpoint(folder / "out", RunDirectory(folder / "run"), ModelSource.open(model))
    assert found.problems == []
    assert found.num_layers == 14
