"""What runs before the first block of AutoBit: survey, curvature, assignment, and what is saved."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared_cluster import FirstWorkers
from torch.nn import functional
from transformers import AutoModelForCausalLM

from onecomp import DBF, GPTQ, RTN, CalibrationConfig, LocalExecutor, ModelConfig, Runner
from onecomp.calibration.samples import CalibrationSamples
from onecomp.calibration.shards import cut_shards
from onecomp.errors import InputError
from onecomp.export.load import load_quantized_model
from onecomp.job import find_layers
from onecomp.losses import Patience
from onecomp.models import ModelSource, Skeleton
from onecomp.quantizer import AutoBitQuantizer
from onecomp.quantizer.autobit.heatmap import bits_by_place
from onecomp.session import Session
from onecomp.store import RunDirectory
from onecomp.survey import SurveyPlan, assign
from onecomp.survey.curvature import measure_curvature
from onecomp.worker import WorkerSettings

NUM_BLOCKS = 2


@pytest.fixture(scope="session")
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama", num_layers=NUM_BLOCKS, tie=True)


def method(target: float = 3.5, **options: object) -> AutoBitQuantizer:
    candidates = [GPTQ(wbits=bits, groupsize=32) for bits in (2, 3, 4, 8)]
    return AutoBitQuantizer(quantizers=candidates, target_bit=target, **options)


def runner(
    model: Path, text: Path, quantizer: AutoBitQuantizer, run: Path, workers: int = 1
) -> Runner:
    return Runner(
        ModelConfig(str(model), dtype="float32", device="cpu"),
        quantizer,
        calibration_config=CalibrationConfig(
            str(text), max_length=48, num_calibration_samples=16, strategy="concat_chunk"
        ),
        report_progress=False,
        executor=LocalExecutor(workers),
        run_dir=run,
        num_shards=5,
    )


def finished(*arguments: object, **options: object) -> Runner:
    made = runner(*arguments, **options)
    made.run()
    made.executor.stop()
    return made


def assignment(run: Path) -> dict:
    return json.loads((run / "assignment.json").read_text())


@pytest.fixture(scope="module")
def done(model: Path, text: Path, tmp_path_factory) -> Runner:
    return finished(model, text, method(), tmp_path_factory.mktemp("done") / "run")


def test_the_assignment_keeps_to_the_target_and_is_carried_out(done):
    found = assignment(done.run_dir)
    target = 3.5 + 19.5 / 32
    assert found["target_bits"] == pytest.approx(target)
    assert target - 0.05 <= found["average_bits"] <= target
    names = [f"model.layers.{block}.mlp.{name}" for block in range(2) for name in ("gate", "up")]
    assert len({found["layers"][f"{name}_proj"]["child"] for name in names[:2]}) == 1
    for name, choice in found["layers"].items():
        assert done.quantizer.results[name].wbits == (2, 3, 4, 8)[choice["child"]]
    assert len({choice["child"] for choice in found["layers"].values()}) > 1


def test_any_number_of_workers_decides_and_makes_the_same(done, model, text, tmp_path):
    other = finished(model, text, method(), tmp_path / "run", workers=3)
    first, second = (r.run_dir / "assignment.json" for r in (done, other))
    assert first.read_bytes() == second.read_bytes()
    for name, result in done.quantizer.results.items():
        assert torch.equal(result.qweight, other.quantizer.results[name].qweight)


@pytest.mark.ray
def test_a_cluster_decides_and_makes_the_same(done, model, text, tmp_path, ray_executor):
    other = runner(model, text, method(), tmp_path / "run")
    other.executor = FirstWorkers(ray_executor, 2)
    other.run()
    first, second = (r.run_dir / "assignment.json" for r in (done, other))
    assert first.read_bytes() == second.read_bytes()
    for name, result in done.quantizer.results.items():
        assert torch.equal(result.qweight, other.quantizer.results[name].qweight)


def test_a_resumed_run_keeps_to_the_stored_assignment(model, text, tmp_path):
    made = finished(model, text, method(), tmp_path / "run")
    stored = assignment(made.run_dir)
    for choice in stored["layers"].values():
        choice["child"] = 1
    (made.run_dir / "assignment.json").write_text(json.dumps(stored))
    for path in (made.run_dir / "blocks").iterdir():
        path.unlink()
    session = Session.reopen(made.run_dir)
    executor = LocalExecutor(2)
    session.quantize(executor, report_progress=False)
    executor.stop()
    results = session.run.results()
    assert {result.wbits for result in results.values()} == {3}
    assert len(results) == 7 * NUM_BLOCKS


def test_an_interrupted_survey_goes_on_with_what_it_has(model, text, tmp_path, done):
    """A file of the survey that was changed shows in what is decided: it was not made anew."""
    interrupted = finished(model, text, method(), tmp_path / "run")
    (interrupted.run_dir / "assignment.json").unlink()
    (interrupted.run_dir / "survey" / "blocks" / "00001.safetensors").unlink()
    survey = RunDirectory(interrupted.run_dir / "survey")
    block = survey.read_block(0)
    for result in block.values():
        result.errors *= 1e6
    survey.write_block(0, block)
    again = finished(model, text, method(), tmp_path / "run")
    found, before = assignment(again.run_dir), assignment(done.run_dir)
    assert found["layers"].keys() == before["layers"].keys()
    assert _mean_bits(found, 0) > _mean_bits(before, 0)
    assert _mean_bits(found, 1) <= _mean_bits(before, 1)


def _mean_bits(found: dict, block: int) -> float:
    bits = [c["bits"] for name, c in found["layers"].items() if f"layers.{block}." in name]
    return sum(bits) / len(bits)


def test_a_damaged_assignment_is_told(model, tmp_path):
    settings = settings_of(model, tmp_path / "run", 0)
    (tmp_path / "run" / "assignment.json").write_text("{}")
    executor = LocalExecutor(1)
    plan = SurveyPlan(lambda: None, None, executor, Patience(), silent=True)
    with pytest.raises(InputError, match=r"assignment\.json.*cannot be read"):
        assign(method(), settings, plan)


def settings_of(model: Path, run: Path, num_shards: int) -> WorkerSettings:
    skeleton = Skeleton.build(ModelSource.open(model), torch.float32)
    directory = RunDirectory(run)
    directory.begin({}, None)
    layout = find_layers(RTN(), skeleton)
    return WorkerSettings(
        skeleton.source, torch.float32, "cpu", layout, RTN(), None, num_shards, directory, None
    )


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_curvature_is_what_autograd_finds_in_the_whole_model(family, tiny_model_dir, tmp_path):
    path = tiny_model_dir(family)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (5, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[3, 15:] = 0
    shards = cut_shards(CalibrationSamples(ids, mask), 3)
    executor = LocalExecutor(2)
    settings = settings_of(path, tmp_path / "run", len(shards))
    found = measure_curvature(settings, shards, executor, Patience())
    executor.stop()

    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    name = next(n for n in settings.layout.layer_names if "layers.1" in n)
    total, count = 0, 0
    for sample, of_sample in zip(ids, mask, strict=True):
        length = int(of_sample.sum())
        kept = []
        handle = whole.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, kept=kept: kept.append(output) or output.retain_grad()
        )
        logits = whole(sample[None, :length]).logits[0, :-1].float()
        functional.cross_entropy(logits, sample[1:length], reduction="sum").backward()
        handle.remove()
        total = total + kept[0].grad.reshape(length, -1).square().sum(dim=0)
        count += length
    torch.testing.assert_close(found[name].float(), total / count, rtol=1e-4, atol=1e-9)
    assert set(found) == set(settings.layout.layer_names)


def test_without_curvature_the_activations_still_count(model, text, tmp_path, done):
    """Three different rules, not two of them under three names."""
    flat = finished(model, text, method(use_curvature_b=False), tmp_path / "flat")
    plain = finished(model, text, method(assignment_strategy="ilp"), tmp_path / "plain")
    errors = [
        [c["errors"] for c in assignment(run)["layers"].values()]
        for run in (done.run_dir, flat.run_dir, plain.run_dir)
    ]
    ratios = [
        [a[1] / b[1] for a, b in zip(first, second, strict=True)]
        for first, second in (errors[:2], errors[1:])
    ]
    for between in ratios:
        assert max(between) > 1.2 * min(between)
    assert not (tmp_path / "flat" / "survey" / "curvature").exists()


def test_gptq_alone_is_saved_as_mixed_gptq_and_loads(done, tmp_path):
    done.save_quantized_model(tmp_path / "out")
    loaded, _ = load_quantized_model(tmp_path / "out")
    config = loaded.config.quantization_config
    assert config["quant_method"] == "mixed_gptq"
    assert config["sym"] is True
    _require_equal(loaded, done)
    attention = {str(config["quantization_bits"][0][f"self_attn.{n}_proj"]) for n in "qkv"}
    assert len(attention) == 1  # as engines that join them ask


def test_asymmetric_codes_are_said_to_be(model, text, tmp_path):
    quantizer = AutoBitQuantizer(
        quantizers=[GPTQ(wbits=2, groupsize=32), RTN(wbits=4, groupsize=64), RTN(wbits=3)],
        target_bit=3.2,
        enable_fused_groups=False,
        save_path=str(tmp_path / "pictures"),
    )
    made = finished(model, text, quantizer, tmp_path / "run")
    assert {type(r).__name__ for r in quantizer.results.values()} == {"GPTQResult", "RTNResult"}
    made.save_quantized_model(tmp_path / "out")
    loaded, _ = load_quantized_model(tmp_path / "out")
    assert loaded.config.quantization_config["sym"] is False
    _require_equal(loaded, made)
    assert (tmp_path / "pictures" / "autobit_assignment.png").read_bytes()[1:4] == b"PNG"


def test_codes_and_binary_factors_are_saved_and_load(model, text, tmp_path):
    quantizer = AutoBitQuantizer(
        quantizers=[DBF(target_bits=1.3), GPTQ(wbits=2, groupsize=32), RTN(wbits=4, groupsize=32)],
        target_bit=3.4,
        target_bit_is_effective=True,
    )
    made = finished(model, text, quantizer, tmp_path / "run")
    kinds = {type(result).__name__ for result in quantizer.results.values()}
    assert {"DBFResult", "RTNResult"} <= kinds
    made.save_quantized_model(tmp_path / "out")
    loaded, _ = load_quantized_model(tmp_path / "out")
    assert loaded.config.quantization_config["quant_method"] == "autobit"
    _require_equal(loaded, made)
    assert torch.isfinite(loaded(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_target_too_low_for_codes_makes_a_dbf_checkpoint(model, text, tmp_path, caplog):
    made = finished(model, text, method(1.2, dbf_iters=4), tmp_path / "run")
    assert "is too low for the candidates: all layers get DBF_1.1874bit." in caplog.text
    assert "none nearer to it" not in caplog.text
    assert not (tmp_path / "run" / "survey").exists()
    made.save_quantized_model(tmp_path / "out")
    loaded, _ = load_quantized_model(tmp_path / "out")
    assert loaded.config.quantization_config["quant_method"] == "dbf"
    _require_equal(loaded, made)


def _require_equal(loaded: torch.nn.Module, made: Runner) -> None:
    for name, result in made.quantizer.results.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), result.dequantize()), name


def test_plain_errors_need_no_text(model, tmp_path):
    quantizer = AutoBitQuantizer(
        quantizers=[RTN(wbits=bits, groupsize=32) for bits in (2, 4)],
        target_bit=3,
        assignment_strategy="ilp",
    )
    made = finished(model, tmp_path / "no such file.txt", quantizer, tmp_path / "run")
    assert {result.wbits for result in made.quantizer.results.values()} == {2, 4}


def test_the_survey_may_have_a_text_of_its_own(model, text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(text.read_text().upper())
    quantizer = method(
        calibration_config=CalibrationConfig(str(own), max_length=32, num_calibration_samples=16)
    )
    made = finished(model, text, quantizer, tmp_path / "run")
    other = RunDirectory(made.run_dir / "survey").record()["calibration"]
    assert other != made._session.samples.content_hash()


def test_the_picture_has_a_row_for_each_kind_of_layer(done):
    kinds, bits = bits_by_place(done.quantizer.assignment)
    assert len(kinds) == 7
    assert {len(row) for row in bits} == {NUM_BLOCKS}
    assert bits[kinds.index("mlp.up_proj")] == bits[kinds.index("mlp.gate_proj")]
