"""`onecomp postprocess`: from a checkpoint that `quantize` wrote to a better one."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from before_after import files_of, weights_of
from command_line import done, invoke
from driver_process import start_driver
from tiny_models import sample_text

from onecomp.export.load import load_quantized_model
from onecomp.post_process.base import records_of
from onecomp.store import RunDirectory

GLOBAL = ["--process", "global_ptq", "--epochs", 2, "--set", "gptq_lr=0.0003"]
BLOCKWISE = ["--process", "blockwise_ptq", "--epochs", 1, "--num-workers", 0]
KINDS = {"GlobalPTQ": GLOBAL, "BlockWisePTQ": BLOCKWISE}


def refused(*arguments: object) -> str:
    """The one message of a command that is refused as bad input."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), (result.output, result.exception)
    assert result.stderr.count("error: ") == 1
    assert result.stderr.startswith("error: ")
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def words(text: Path) -> list[object]:
    """Options of a short text."""
    return [
        "--calibration-dataset", text, "--num-calibration-samples", 9, "--max-length", 48,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def made(model: Path, words: list[object], tmp_path_factory) -> Path:
    """A checkpoint of 3 bits; its run directory is beside it."""
    output = tmp_path_factory.mktemp("made") / "q"
    options = ["--wbits", 3, "--groupsize", 32, "--no-mse", "--num-workers", 0]
    done("quantize", model, "--output", output, *options, *words)
    return output


@pytest.fixture
def command(made: Path, words: list[object], tmp_path: Path) -> list[object]:
    """The command without its process."""
    return ["postprocess", made, "--output", tmp_path / "out", *words]


# What it makes


@pytest.mark.parametrize("kind", KINDS)
def test_a_better_checkpoint_is_written_and_the_old_one_stays(
    command, made, model, tmp_path, caplog, kind
):
    before = files_of(made.parent)
    with caplog.at_level(logging.INFO):
        assert done(*command, *KINDS[kind]) == f"{tmp_path / 'out'}\n"
    assert files_of(made.parent) == before

    loaded, _ = load_quantized_model(tmp_path / "out", device_map=None)
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    [entry] = records_of(loaded)
    assert (entry["class"], entry["executed"]) == (kind, True)
    assert entry["held_out_after"] < entry["held_out_before"]
    assert weights_of(tmp_path / "out") != weights_of(made)
    assert (
        f"held-out loss {entry['held_out_before']:.4f} -> {entry['held_out_after']:.4f} in "
    ) in caplog.text

    [event] = RunDirectory(tmp_path / "out.run").events("post_process")
    assert {key: event[key] for key in entry} == entry
    record = json.loads((tmp_path / "out.run" / "postprocess.json").read_text())
    assert record["model"]["id"] == str(model.resolve())


def test_options_of_the_process_and_of_the_text_reach_it(command, tmp_path):
    lines = (json.dumps({"body": sample_text(300, seed=n), "text": ""}) for n in range(3))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    given = ["--calibration-dataset", tmp_path / "text.jsonl", "--text-key", "body", "--seed", 3]
    sizes = ["--num-calibration-samples", 6, "--max-length", 40]
    settings = ["--set", "batch_size=2", "--set", "targets=student", "--set", "gptq_lr=0.0005"]
    done(*command, *BLOCKWISE, *given, *sizes, *settings)
    [event] = RunDirectory(tmp_path / "out.run").events("post_process")
    found = event["config"]
    assert (found["epochs"], found["batch_size"], found["targets"]) == (1, 2, "student")
    assert (found["gptq_lr"], found["num_workers"]) == (5e-4, 0)
    text = found["calibration_config"]
    expected = {
        "calibration_dataset": str(tmp_path / "text.jsonl"),
        "text_key": "body",
        "seed": 3,
        "num_calibration_samples": 6,
        "max_length": 40,
        "strategy": "concat_chunk",
    }
    assert {name: text[name] for name in expected} == expected


def test_options_can_come_from_a_file(command, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text(
        "process: blockwise_ptq\nepochs: 7\nnum-workers: 0\nset: [batch_size=2, targets=student]\n"
    )
    done(*command, "--config", config, "--epochs", 1)
    [event] = RunDirectory(tmp_path / "out.run").events("post_process")
    found = event["config"]
    assert (found["epochs"], found["batch_size"], found["targets"]) == (1, 2, "student")


def test_a_process_that_does_not_help_says_so_and_the_weights_stay(command, made, tmp_path, caplog):
    options = ["--process", "global_ptq", "--epochs", 1, "--set", "gptq_lr=10.0"]
    assert done(*command, *options) == f"{tmp_path / 'out'}\n"
    assert "GlobalPTQ: no state was better on held-out samples than the beginning" in caplog.text
    assert weights_of(tmp_path / "out") == weights_of(made)


def test_the_original_can_be_named(command, made, model, tmp_path):
    """As of a checkpoint that came without its run directory."""
    shutil.copytree(made, tmp_path / "alone")
    command[1] = tmp_path / "alone"
    done(*command, *BLOCKWISE, "--model", model)
    record = json.loads((tmp_path / "out.run" / "postprocess.json").read_text())
    assert record["model"]["id"] == str(model.resolve())


def test_what_was_improved_can_be_improved_again(command, tmp_path):
    done(*command, *BLOCKWISE)
    command[1], command[3] = tmp_path / "out", tmp_path / "second"
    done(*command, *GLOBAL)
    loaded, _ = load_quantized_model(tmp_path / "second", device_map=None)
    assert [entry["class"] for entry in records_of(loaded)] == ["BlockWisePTQ", "GlobalPTQ"]


def test_the_working_directory_can_be_the_checkpoint(command, made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    command[1] = "."
    assert done(*command, *BLOCKWISE) == f"{tmp_path / 'out'}\n"


# What goes on


def test_the_same_command_goes_on_where_it_was_cut_off(command, tmp_path):
    done(*command, *BLOCKWISE)
    patches = tmp_path / "out.run" / "patches"
    times = {path: path.stat().st_mtime_ns for path in patches.iterdir()}
    weights = weights_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert done(*command, *BLOCKWISE) == f"{tmp_path / 'out'}\n"
    assert {path: path.stat().st_mtime_ns for path in patches.iterdir()} == times
    assert weights_of(tmp_path / "out") == weights


def test_the_same_command_goes_on_from_another_working_directory(
    command, made, tmp_path, monkeypatch
):
    monkeypatch.chdir(made.parent)
    command[1] = made.name
    done(*command, *BLOCKWISE)
    shutil.rmtree(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    command[1] = made
    assert done(*command, *BLOCKWISE) == f"{tmp_path / 'out'}\n"


def test_overwrite_begins_anew(command, tmp_path):
    done(*command, *BLOCKWISE)
    done(*command, *GLOBAL, "--overwrite")
    assert not (tmp_path / "out.run" / "patches").exists()
    [event] = RunDirectory(tmp_path / "out.run").events("post_process")
    assert event["class"] == "GlobalPTQ"
    loaded, _ = load_quantized_model(tmp_path / "out", device_map=None)
    assert [entry["class"] for entry in records_of(loaded)] == ["GlobalPTQ"]


# What it refuses


@pytest.fixture
def nothing_is_made(tmp_path: Path):
    """No output and no run directory is there afterwards."""
    yield
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--process", "gptq"],
            "postprocess: process='gptq': must be one of blockwise_ptq, global_ptq, ",
        ),
        (
            [*GLOBAL, "--set", "rate=1"],
            "global_ptq: --set rate=1: must be FIELD=VALUE with a field of binary_lr, dbf_lr, ",
        ),
        (
            [*GLOBAL, "--set", "w_distill=0.0", "--set", "w_ntp=0.0"],
            "w_distill and w_ntp are both 0: nothing would be trained. Raise one of them.",
        ),
        ([*GLOBAL, "--epochs", 0], "epochs=0: must be a whole number, at least 1."),
        ([*BLOCKWISE, "--num-workers", -1], "Invalid value for '--num-workers'"),
        ([*GLOBAL, "--dtype", "float8"], "dtype='float8': must be one of"),
        ([*GLOBAL, "--calibration-dataset", "absent.txt"], "absent.txt"),
        ([*GLOBAL, "--num-calibration-samples", 1], "1 sample(s): one is held out, so that at"),
        (
            [*BLOCKWISE, "--num-calibration-samples", 4],
            "3 training samples are fewer than batch_size=4. Use more samples, or a smaller",
        ),
        ([*GLOBAL, "--model", "absent"], "absent: is not a directory, and the Hub has no such"),
        (["--process", "lora_sft"], "8 training samples are fewer than the 16 of one step"),
    ],
)
def test_options_that_do_not_do(command, options, message):
    result = invoke(*command, *options)
    assert (result.exit_code, result.stdout) == (2, ""), (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.split())


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_directory_without_a_checkpoint_is_refused(command, tmp_path, options):
    (tmp_path / "empty").mkdir()
    command[1] = tmp_path / "empty"
    assert f"error: {tmp_path / 'empty'}: holds no config.json" in refused(*command, *options)
    command[1] = tmp_path / "absent"
    assert f"error: {tmp_path / 'absent'}: is not a directory" in refused(*command, *options)


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_model_that_is_not_quantized_is_refused(command, model, options):
    command[1] = model
    said = refused(*command, *options, "--model", model)
    assert f"error: {model}: is not quantized: it has no layers that a post-process could" in said
    assert "Give the directory that `onecomp quantize` wrote." in said


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_unknown_original_is_refused(command, made, tmp_path, options):
    shutil.copytree(made, tmp_path / "alone")
    command[1] = tmp_path / "alone"
    said = refused(*command, *options)
    assert said.startswith(f"error: {tmp_path / 'alone'}: the original model is not known: there")
    assert said.endswith("Name it with --model.")


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_rotated_checkpoint_of_a_plain_model_is_refused(command, made, model, tmp_path, options):
    shutil.copytree(made, tmp_path / "rotated")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["rotated"] = True
    (tmp_path / "rotated" / "config.json").write_text(json.dumps(config))
    command[1] = tmp_path / "rotated"
    assert "rotated" in refused(*command, *options, "--model", model)


def test_an_output_that_is_there_is_kept(command, tmp_path):
    done(*command, *BLOCKWISE)
    before = files_of(tmp_path)
    said = refused(*command, *BLOCKWISE)
    assert f"error: {tmp_path / 'out'}: already holds a checkpoint. Give another" in said
    assert "--overwrite" in said
    assert files_of(tmp_path) == before


def test_a_run_directory_of_another_job_is_kept(command, tmp_path):
    done(*command, *BLOCKWISE)
    shutil.rmtree(tmp_path / "out")
    before = files_of(tmp_path)
    for other in (["--set", "batch_size=2"], ["--epochs", 2], ["--seed", 5]):
        said = refused(*command, *BLOCKWISE, *other)
        assert f"error: {tmp_path / 'out.run'}: belongs to another post-process" in said
        assert said.endswith("Give another --output, or --overwrite to begin anew.")
    assert files_of(tmp_path) == before


def test_a_value_of_another_type_is_refused_where_no_types_are_checked(command, tmp_path):
    """In a process of its own, in which annotations are not checked as they are in tests."""
    given = [*command, *GLOBAL, "--set", "use_mixed_precision=False"]
    process = start_driver([str(word) for word in given], tmp_path / "log")
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2, said
    assert "error: global_ptq: --set use_mixed_precision=False: must be true or false." in said
    assert "Traceback" not in said
    assert not (tmp_path / "out.run").exists()
