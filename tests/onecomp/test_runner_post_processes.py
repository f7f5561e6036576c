"""`Runner(post_processes=[...])`: the quantized model is improved, saved and recorded."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from before_after import files_of, state_of, weights_of
from every_method import METHODS
from safetensors.torch import load_file

from onecomp import BlockWisePTQ, GlobalPTQ, PostProcessLoraSFT, PostQuantizationProcess
from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError, InputError
from onecomp.executor import LocalExecutor
from onecomp.export.load import load_quantized_model
from onecomp.export.save import has_format
from onecomp.models import ModelConfig
from onecomp.post_process.base import records_of
from onecomp.quantizer import GPTQ, RTN, Quantizer
from onecomp.quantizer.quant_linear import QuantLinear
from onecomp.runner import Runner
from onecomp.store import RunDirectory

Q_PROJ = "model.layers.0.self_attn.q_proj"
Processes = list[PostQuantizationProcess]


@pytest.fixture(scope="module")
def config(tiny_model_dir) -> ModelConfig:
    return ModelConfig(path=str(tiny_model_dir("llama")), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def words(text: Path) -> CalibrationConfig:
    return CalibrationConfig(str(text), 48, 9, strategy="concat_chunk")


@pytest.fixture(scope="module")
def make(config, words) -> Callable[..., Runner]:
    """``make(processes, run_dir=..., quantizer=...)``: a Runner that has run."""

    def made(
        processes: Processes, quantizer: Quantizer | None = None, run_dir: Path | None = None
    ) -> Runner:
        runner = Runner(
            config,
            quantizer or GPTQ(wbits=3, groupsize=32),
            calibration_config=words,
            report_progress=False,
            executor=LocalExecutor(),
            run_dir=run_dir,
            post_processes=processes,
        )
        runner.run()
        return runner

    return made


def two(words: CalibrationConfig) -> Processes:
    """One that works on files, and one that works on the live model."""
    return [
        BlockWisePTQ("first", epochs=1, num_workers=0, calibration_config=words),
        GlobalPTQ("second", epochs=1, gptq_lr=1e-4, calibration_config=words),
    ]


@pytest.fixture(scope="module")
def improved(make, words, tmp_path_factory) -> Runner:
    return make(two(words), run_dir=tmp_path_factory.mktemp("improved") / "run")


@pytest.fixture(scope="module")
def plain(make) -> Runner:
    """The same without post-processes."""
    return make([])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# In order


def test_processes_improve_the_model_one_after_the_other(improved: Runner):
    first, second = records_of(improved.quantized_model)
    assert (first["name"], second["name"]) == ("first", "second")
    assert (first["class"], second["class"]) == ("BlockWisePTQ", "GlobalPTQ")
    for entry in (first, second):
        assert entry["executed"]
        assert entry["held_out_after"] < entry["held_out_before"]
    assert second["held_out_before"] == pytest.approx(first["held_out_after"], rel=1e-4)


def test_the_journal_of_the_run_tells_of_them(improved: Runner):
    events = RunDirectory(improved.run_dir).events("post_process")
    expected = records_of(improved.quantized_model)
    pairs = zip(events, expected, strict=True)
    found = [{key: event[key] for key in entry} for event, entry in pairs]
    assert len(events) == 2
    assert found == expected


def test_without_processes_there_is_no_model_and_no_record(plain: Runner):
    assert plain.quantized_model is None
    model, _ = plain.create_quantized_model()
    assert records_of(model) == []


def test_results_stay_those_of_the_quantizer(improved: Runner, plain: Runner):
    for name, result in plain.quantizer.results.items():
        assert torch.equal(improved.quantizer.results[name].dequantize(), result.dequantize())


# Saving


@pytest.fixture(scope="module")
def saved(improved: Runner, tmp_path_factory) -> Path:
    return improved.save_quantized_model(tmp_path_factory.mktemp("saved") / "out")


def test_the_saved_checkpoint_is_the_trained_model(improved: Runner, plain: Runner, saved: Path):
    loaded, tokenizer = load_quantized_model(saved, device_map=None)
    assert_same(state_of(loaded), state_of(improved.quantized_model))
    assert records_of(loaded) == records_of(improved.quantized_model)
    assert tokenizer is not None
    before, _ = plain.create_quantized_model()
    changed = {
        name.rpartition(".")[2]
        for name, tensor in state_of(before).items()
        if not torch.equal(tensor, loaded.state_dict()[name])
    }
    assert changed == {"scales"}


def test_the_saved_checkpoint_has_the_files_of_any_other(plain: Runner, saved: Path, tmp_path):
    files, expected = files_of(saved), files_of(plain.save_quantized_model(tmp_path / "out"))
    assert files.keys() == expected.keys()
    differ = {name for name in files if files[name] != expected[name]}
    assert differ == {
        "config.json", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
    }  # fmt: skip


def test_a_trained_model_is_saved_packed_and_over_nothing(improved: Runner, saved: Path, tmp_path):
    with pytest.raises(ConfigError, match="pack_weights=False: models are packed when they are"):
        improved.save_quantized_model(tmp_path / "out", pack_weights=False)
    assert not (tmp_path / "out").exists()
    before = files_of(saved)
    with pytest.raises(InputError, match="already holds a checkpoint"):
        improved.save_quantized_model(saved)
    assert files_of(saved) == before


def test_dequantized_weights_are_those_of_the_results(improved: Runner, plain: Runner, tmp_path):
    """As is documented of them: processes train what a checkpoint stores."""
    path = improved.save_dequantized_model(tmp_path / "out")
    assert weights_of(path) == weights_of(plain.save_dequantized_model(tmp_path / "plain"))


def test_the_trained_model_is_what_is_evaluated(improved: Runner, plain: Runner, text: Path):
    sizes = {"dataset_name": str(text), "max_length": 64, "stride": 64, "max_samples": 20}
    before = state_of(improved.quantized_model)
    original, dequantized, trained = improved.calculate_perplexity(**sizes)
    assert (original, dequantized) == (None, None)
    assert_same(state_of(improved.quantized_model), before)
    assert trained != plain.calculate_perplexity(**sizes)[2]


def test_adapters_are_saved_beside_the_model(make, plain: Runner, text: Path, tmp_path):
    process = PostProcessLoraSFT(
        data_files=str(text), max_length=32, max_train_samples=12, epochs=1, lr=3e-3, lora_r=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    path = make([process]).save_quantized_model(tmp_path / "out")
    assert {file.name for file in (path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    model = {n: c for n, c in weights_of(path).items() if not n.startswith("adapter")}
    assert model == weights_of(plain.save_quantized_model(tmp_path / "plain"))


# Going on


def test_a_run_that_is_repeated_ends_with_the_same_bytes(
    improved: Runner, make, words, saved: Path, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(improved.run_dir, run_dir)
    blocks = {path: path.stat().st_mtime_ns for path in (run_dir / "blocks").iterdir()}
    again = make(two(words), run_dir=run_dir)
    assert {path: path.stat().st_mtime_ns for path in blocks} == blocks
    path = again.save_quantized_model(tmp_path / "out")
    assert weights_of(path) == weights_of(saved)


# A user's own


@dataclass
class Doubling(PostQuantizationProcess):
    """Doubles the scales, and notes what it was given."""

    factor: float = 2.0
    given: list[object] = field(default_factory=list, init=False, repr=False)

    def run(self, quantized_model, model_config):
        layers = [m for m in quantized_model.modules() if isinstance(m, QuantLinear)]
        devices = {tensor.device.type for tensor in quantized_model.state_dict().values()}
        self.given += [len(layers), devices, quantized_model.training, model_config]
        for layer in layers:
            layer.scales.mul_(self.factor)


def test_a_process_of_the_users_own_works_and_is_recorded(
    make, config, plain: Runner, words, tmp_path
):
    mine = Doubling()
    runner = make([mine, Doubling("again", 0.5), Doubling("thrice", 3.0)], run_dir=tmp_path / "run")
    assert mine.given == [14, {"cpu"}, False, config]
    records = records_of(runner.quantized_model)
    assert [(entry["name"], entry["config"]) for entry in records] == [
        ("Doubling", {"factor": 2.0}), ("again", {"factor": 0.5}), ("thrice", {"factor": 3.0}),
    ]  # fmt: skip
    assert all(entry["executed"] for entry in records)
    events = RunDirectory(tmp_path / "run").events("post_process")
    assert [event["name"] for event in events] == ["Doubling", "again", "thrice"]
    shard = "model-00002-of-00003.safetensors"
    old = load_file(plain.save_quantized_model(tmp_path / "plain") / shard)
    new = load_file(runner.save_quantized_model(tmp_path / "out") / shard)
    assert torch.equal(new[f"{Q_PROJ}.scales"], old[f"{Q_PROJ}.scales"] * 3)
    assert torch.equal(new[f"{Q_PROJ}.qweight"], old[f"{Q_PROJ}.qweight"])


def test_a_process_that_fails_leaves_what_was_quantized(make, config, words, tmp_path):
    few = CalibrationConfig(words.calibration_dataset, 48, 1, strategy="concat_chunk")
    made = make([], run_dir=tmp_path / "run")
    made.post_processes = [GlobalPTQ(epochs=1, calibration_config=few)]
    with pytest.raises(ConfigError, match=r"1 sample\(s\): one is held out"):
        made.run()
    with pytest.raises(ConfigError, match="post_processes have not run to their end"):
        made.save_quantized_model(tmp_path / "out")
    made.post_processes = []
    made.save_quantized_model(tmp_path / "out")
    run = RunDirectory(tmp_path / "run")
    assert len(run.results()) == 14
    assert run.events("post_process") == []


# What is refused


def problems_of(runner: Runner) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        runner.run()
    assert not runner.run_dir.exists()
    return caught.value.problems


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_without_layers_of_their_own_are_refused_before_any_work(config, tmp_path, method):
    quantizer = METHODS[method]()
    runner = Runner(config, quantizer, run_dir=tmp_path / "run", post_processes=[Doubling()])
    if has_format(quantizer):
        runner.check()
        return
    assert problems_of(runner) == [
        f"post_processes need quantized layers, and {quantizer.name} has none. Use GPTQ, RTN, "
        "JointQ, AutoBit, DBF or Onebit."
    ]


def test_what_is_no_process_is_refused_and_all_of_it_named(config, tmp_path):
    runner = Runner(config, GPTQ(), run_dir=tmp_path / "run")
    runner.post_processes = ["global_ptq", Doubling(), GlobalPTQ]  # tests check annotated calls
    assert problems_of(runner) == [
        "post_processes has 'global_ptq': must be PostQuantizationProcess objects.",
        f"post_processes has {GlobalPTQ!r}: must be PostQuantizationProcess objects.",
    ]


def test_several_quantizers_have_no_model_to_improve(config, tmp_path):
    runner = Runner(
        config, quantizers=[GPTQ(), RTN()], run_dir=tmp_path / "run", post_processes=[Doubling()]
    )
    [problem] = problems_of(runner)
    assert problem.startswith("post_processes improve one quantized model, but quantizers make")
