"""The command line: what it makes, what it says, and what it refuses."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from command_line import done, invoke
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import sample_text
from transformers import AutoModelForCausalLM

from onecomp.export.load import load_quantized_model
from onecomp.store import RunDirectory

DOWN_PROJ = "model.layers.1.mlp.down_proj"


def refused(*arguments: object, status: int = 2) -> str:
    """What a command says that ends with ``status``, on one line."""
    done = invoke(*arguments)
    assert done.exit_code == status, (done.exit_code, done.output, done.exception)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.stdout == ""
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def small(text: Path) -> list[object]:
    """Options of a quick run in this process."""
    counts = ["--num-calibration-samples", 8, "--max-length", 48]
    return ["--calibration-dataset", text, *counts, "--num-workers", 0]


@pytest.fixture(scope="module")
def made(model, small, tmp_path_factory) -> Path:
    """A checkpoint with everything at its defaults; its run directory is beside it."""
    output = tmp_path_factory.mktemp("made") / "out"
    assert done("quantize", model, "--output", output, *small) == f"{output}\n"
    return output


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    shutil.copytree(made, tmp_path / "out")
    shutil.copytree(made.with_name("out.run"), tmp_path / "out.run")
    return tmp_path / "out"


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# What it makes


def test_the_defaults_are_the_ones_that_serve_the_user(made):
    record = RunDirectory(made.with_name("out.run")).record()
    quantizer = record["quantizer"]
    assert quantizer["method"] == "GPTQ"
    assert (quantizer["wbits"], quantizer["groupsize"]) == (4, 64)
    assert all(quantizer[name] for name in ("sym", "mse", "actorder", "static_groups"))
    assert record["qep"] is not None
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 64)
    assert config["desc_act"] is False
    loaded, tokenizer = load_quantized_model(made)
    assert tokenizer.decode(tokenizer("a text").input_ids) == "a text"
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert (made.with_name("out.run") / "report.html").is_file()


def test_help_does_not_wait_for_torch():
    code = "import sys, onecomp.cli as cli; cli.app(['--help'], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "Quantize a model and write a checkpoint." in answer.stdout


@pytest.mark.parametrize(("hidden", "groupsize"), [(128, 128), (96, 32)])
def test_the_groupsize_is_the_largest_that_fits_every_layer(
    tiny_model_dir, small, tmp_path, caplog, hidden, groupsize
):
    model = tiny_model_dir("llama", hidden_size=hidden)
    with caplog.at_level(logging.INFO):
        done("quantize", model, "--output", tmp_path / "out", "--quantizer", "rtn", *small)
    record = RunDirectory(tmp_path / "out.run").record()
    assert record["quantizer"]["groupsize"] == groupsize
    assert f"groupsize {groupsize}: the largest of 128, 64, 32 that divides" in caplog.text


def test_round_to_nearest_and_evaluation(model, small, text, tmp_path, caplog):
    options = ["--quantizer", "rtn", "--wbits", 8, "--asym", "--eval", text]
    with caplog.at_level(logging.INFO):
        done("quantize", model, "--output", tmp_path / "out", *options, *small)
    found = {e["what"]: e["perplexity"] for e in events(tmp_path / "out.run", "evaluation")}
    assert found.keys() == {"original", "quantized"}
    assert found["quantized"] == pytest.approx(found["original"], rel=0.02)
    assert found["quantized"] != found["original"]
    for what, perplexity in found.items():
        assert f"perplexity of the {what} model: {perplexity:.4f}" in caplog.text


def test_a_method_without_a_format_writes_an_ordinary_model(model, small, tmp_path, caplog):
    options = ["--quantizer", "qbb", "--wbits", 2]
    with caplog.at_level(logging.INFO):
        done("quantize", model, "--output", tmp_path / "out", *options, *small)
    assert "QBB_2bit has no checkpoint format: the checkpoint holds dequantized" in caplog.text
    assert "load it with transformers.AutoModelForCausalLM.from_pretrained(" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, result in RunDirectory(tmp_path / "out.run").results().items():
        weight = loaded.get_submodule(name).weight
        assert torch.equal(weight, result.dequantize().to(weight.dtype))
    done("verify", tmp_path / "out", "--run-dir", tmp_path / "out.run")


def test_the_column_of_the_text_can_be_named(model, small, tmp_path):
    lines = (json.dumps({"foo": sample_text(300), "text": ""}) for _ in range(3))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    given = ["--calibration-dataset", tmp_path / "text.jsonl", "--text-key", "foo"]
    done("quantize", model, "--output", tmp_path / "out", "--no-mse", *small, *given)
    assert RunDirectory(tmp_path / "out.run").record()["calibration"]["text_key"] == "foo"


def test_resume_makes_up_for_evaluations_that_were_cut_off(model, small, text, tmp_path):
    output, run = tmp_path / "out", tmp_path / "out.run"
    options = ["--quantizer", "rtn", "--eval", text]
    done("quantize", model, "--output", output, *options, *small)
    original, quantized = events(run, "evaluation")
    journal = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(journal[: journal.index(json.dumps(quantized)) + 9])
    assert done("resume", run) == f"{output}\n"
    kept, again = RunDirectory(run).events("evaluation")
    assert kept == original
    assert again["perplexity"] == quantized["perplexity"]


def test_the_dtype_is_the_checkpoints_and_the_text_can_be_the_models_own(model, tmp_path):
    output = tmp_path / "out"
    options = ["--dtype", "bfloat16", "--calibration-dataset", "self", "--num-workers", 0]
    counts = ["--num-calibration-samples", 4, "--max-length", 16]
    done("quantize", model, "--output", output, *options, *counts)
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(output / "model-00001-of-00003.safetensors", framework="pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    samples = RunDirectory(tmp_path / "out.run").samples()
    assert samples.input_ids.shape == (4, 16)


def test_verify_compares_everything_and_finds_a_flipped_bit(copied):
    said = done("verify", copied)
    assert re.fullmatch(r"14 quantized layers and \d+ other tensors compared, 0 differ\n", said)
    shard = copied / "model-00003-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    with safe_open(shard, framework="pt") as file:
        assert f"{DOWN_PROJ}.qweight" in file.keys()  # noqa: SIM118
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first, _ = header[f"{DOWN_PROJ}.qweight"]["data_offsets"]
    content[8 + int.from_bytes(content[:8], "little") + first] ^= 1
    shard.write_bytes(content)
    failed = invoke("verify", copied, "--json")
    assert failed.exit_code == 1
    found = json.loads(failed.stdout)
    assert found["ok"] is False
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(f"{DOWN_PROJ}: differs from the run's result")


def test_verify_finds_another_embedding(copied):
    shard = copied / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    failed = invoke("verify", copied)
    assert failed.exit_code == 1
    assert "model.embed_tokens.weight: differs from the original model's." in failed.stdout


def test_eval_measures_original_and_quantized_models(made, model, text):
    found = {}
    for directory in (model, made):
        said = done("eval", directory, "--ppl", text, "--max-length", 64, "--stride", 64, "--json")
        found[directory] = json.loads(said)
        assert found[directory]["model"] == str(directory)
    assert found[model]["num_tokens"] == found[made]["num_tokens"] > 1000
    assert found[model]["perplexity"] != found[made]["perplexity"]
    first = done("eval", model, "--ppl", text, "--max-length", 64, "--max-tokens", 200, "--json")
    assert json.loads(first)["num_tokens"] < 200
    line = done("eval", made, "--ppl", text, "--max-length", 64, "--stride", 64)
    assert line.startswith(f"perplexity {found[made]['perplexity']:.4f}  {made}  text {text}  ")


def test_a_file_of_options_is_used_and_the_command_line_wins(model, small, text, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text(f"quantizer: rtn\nwbits: 3\nsym: false\ngroupsize: 32\neval: {text}\n")
    output = tmp_path / "out"
    done("quantize", model, "--output", output, "--config", config, "--wbits", 5, *small)
    quantizer = RunDirectory(tmp_path / "out.run").record()["quantizer"]
    assert quantizer["method"] == "RTN"
    assert [quantizer[name] for name in ("wbits", "sym", "groupsize")] == [5, False, 32]
    assert len(events(tmp_path / "out.run", "evaluation")) == 2


def test_a_run_can_be_resumed_from_another_working_directory(model, small, tmp_path, monkeypatch):
    monkeypatch.chdir(model.parent)
    given = ["--quantizer", "rtn", "--output", tmp_path / "out"]
    done("quantize", model.name, *given, *small)
    assert RunDirectory(tmp_path / "out.run").record()["model"]["id"] == str(model)
    (tmp_path / "out" / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert done("resume", "out.run", "--num-workers", 0) == f"{tmp_path / 'out'}\n"


# What it refuses


@pytest.fixture
def nothing_is_made(tmp_path: Path):
    """No output and no run directory is there afterwards."""
    yield
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


def changed(model: Path, target: Path, name: str, value: float) -> Path:
    """A copy of a model directory, one tensor filled with a value."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].fill_(value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def without_safetensors(model: Path, target: Path) -> str:
    shutil.copytree(model, target)
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    return f"{target}: holds no .safetensors files; other weight formats are not read. Save the"


def truncated(model: Path, target: Path) -> str:
    shutil.copytree(model, target)
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return f"{path}: is truncated or corrupt ("


def without_blocks(model: Path, target: Path) -> str:
    shutil.copytree(model, target)
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 258}
    (target / "config.json").write_text(json.dumps(config))
    return "has no list of blocks with linear layers, so it cannot be quantized block by block."


def missing(model: Path, target: Path) -> str:
    return f"{target}: is not a directory, and the Hub has no such model or cannot be reached"


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("damage", [missing, without_safetensors, truncated, without_blocks])
def test_models_that_cannot_be_read(model, small, tmp_path, damage):
    message = damage(model, tmp_path / "model")
    said = refused("quantize", tmp_path / "model", "--output", tmp_path / "out", *small)
    assert message in said
    assert said.startswith("error: ")


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--wbits": 0}, "wbits=0: must be"),
        ({"--wbits": 9}, "wbits=9: must be"),
        ({"--groupsize": 0}, "groupsize=0: must be -1 "),
        ({"--groupsize": -2}, "groupsize=-2: must be -1 "),
        ({"--groupsize": 48}, "groupsize=48 must divide in_features, but model.layers.0."),
        ({"--quantizer": "gtpq"}, "'gtpq' is not one of 'gptq', 'rtn'"),
        (
            {"--num-workers": -1},
            "num_workers='-1': must be N (0 for this process) or MIN:MAX, 1 or more.",
        ),
        ({"--gpus-per-worker": -1}, "gpus_per_worker=-1: must be 0 or more."),
        ({"--address": "ray://head:10001"}, "names a cluster. Drop one."),
        ({"--dtype": "float8"}, "dtype='float8': must be one of"),
        ({"--max-length": 0}, "max_length=0: must be a whole number of at least 1."),
        ({"--eval": "missing.txt"}, "missing.txt"),
        ({"--seed": -1}, "seed=-1: must be a whole number"),
    ],
)
def test_options_out_of_range(model, small, tmp_path, options: Mapping[str, object], message):
    given = [value for pair in options.items() for value in pair]
    said = refused("quantize", model, "--output", tmp_path / "out", *small, *given)
    assert message in said


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt"),
        ("short.txt", "Too short for a sample.", "48"),
        ("other.jsonl", '{"foo": "words"}\n{"foo": "more"}\n', "no column holds text: found foo,"),
        ("absent.txt", None, "absent.txt"),
    ],
)
def test_calibration_files_that_do_not_do(model, small, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    given = ["--calibration-dataset", path]
    said = refused("quantize", model, "--output", tmp_path / "out", *small, *given)
    assert said.startswith("error: ")
    assert name in said
    assert message in said


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("wbit: 4\n", "unknown options: wbit. Known: actorder, address, "),
        ("- 4\n", "must hold lines of 'option: value'."),
        ("a: [\n", "cannot be read"),
        ("wbits: four\n", "Invalid value for '--wbits': Input should be a valid integer"),
    ],
)
def test_files_of_options_that_do_not_do(model, small, tmp_path, content, message):
    config = tmp_path / "options.yaml"
    config.write_text(content)
    said = refused("quantize", model, "--output", tmp_path / "out", "--config", config, *small)
    assert message in said


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{DOWN_PROJ}.weight", torch.nan, f"{DOWN_PROJ}: its weight holds"),
        (
            "model.layers.0.input_layernorm.weight",
            3e38,
            "model.layers.0.self_attn.q_proj: its calibration inputs hold NaN or infinite values",
        ),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run(model, small, tmp_path, name, value, message):
    broken = changed(model, tmp_path / "model", name, value)
    said = refused("quantize", broken, "--output", tmp_path / "out", *small, status=1)
    assert f"error: {message}" in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_there_is_kept(copied, model, small):
    before = contents(copied.parent)
    said = refused("quantize", model, "--output", copied, *small)
    assert f"error: {copied}: already holds a checkpoint. Give another directory;" in said
    assert contents(copied.parent) == before


def test_overwriting_replaces_the_checkpoint_and_nothing_else(copied, model, small):
    (copied / "notes.md").write_text("mine")
    (copied / "model.safetensors").write_text("older")
    (copied / "model-00001-of-00009.safetensors").write_text("older")
    quantizer = ["--quantizer", "rtn", "--wbits", 3, "--overwrite"]
    done("quantize", model, "--output", copied, *quantizer, *small)
    assert (copied / "notes.md").read_text() == "mine"
    shards = sorted(path.name for path in copied.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert json.loads((copied / "config.json").read_text())["quantization_config"]["bits"] == 3
    assert "0 differ" in done("verify", copied)


def test_overwriting_that_fails_leaves_the_old_checkpoint(copied, model, small, tmp_path):
    run = copied.with_name("out.run")
    before, run_before = contents(copied), contents(run)
    broken = changed(model, tmp_path / "model", f"{DOWN_PROJ}.weight", torch.nan)
    for _attempt in range(2):
        refused("quantize", broken, "--output", copied, "--overwrite", *small, status=1)
        assert contents(copied) == before
        assert contents(run / "replaced") == run_before
    done("quantize", model, "--output", copied, "--overwrite", *small)
    assert not (run / "replaced").exists()


def test_a_run_of_another_configuration_is_named_field_by_field(copied, model, small, tmp_path):
    run = tmp_path / "out.run"
    before = contents(run)
    given = ["--output", tmp_path / "other", "--run-dir", run, "--wbits", 3, "--no-qep"]
    said = refused("quantize", model, *given, *small)
    assert f"error: {run}: belongs to another configuration (" in said
    assert "quantizer.wbits: 4 -> 3" in said
    assert "qep" in said
    assert "Give another --run-dir, or --overwrite to begin anew." in said
    assert contents(run) == before
    assert not (tmp_path / "other").exists()


def test_an_output_that_is_a_file_is_kept(model, small, tmp_path):
    (tmp_path / "out").write_text("mine")
    said = refused("quantize", model, "--output", tmp_path / "out", *small)
    assert f"{tmp_path / 'out'}: cannot be a directory" in said
    assert (tmp_path / "out").read_text() == "mine"


def test_the_original_model_is_not_overwritten(model, small, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    before = contents(tmp_path / "model")
    for places in (
        ["--output", "model", "--run-dir", "run"],
        ["--output", "o", "--run-dir", "model"],
    ):
        places = [tmp_path / place if place[0] != "-" else place for place in places]
        said = refused("quantize", tmp_path / "model", *places, "--overwrite", *small)
        assert "would lie in the model's own directory" in said
    assert contents(tmp_path / "model") == before


@pytest.mark.parametrize(
    ("file", "content"), [("run.json", '{"model": {}}'), ("calibration.safetensors", "junk")]
)
def test_a_damaged_run_directory_is_named(copied, file, content):
    run = copied.with_name("out.run")
    (run / file).write_text(content)
    assert f"error: {run / file}: " in refused("resume", run)


@pytest.mark.parametrize("command", [["resume"], ["report"], ["verify", "--run-dir"]])
def test_a_directory_without_a_run_is_refused(made, tmp_path, command):
    arguments = (
        [*command, tmp_path] if len(command) == 1 else ["verify", made, *command[1:], tmp_path]
    )
    assert f"error: {tmp_path}: is not a run directory" in refused(*arguments)


# As a program


def run_program(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "onecomp", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_json_is_all_that_reaches_standard_output(made):
    ran = run_program("verify", made, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["ok"] is True
    assert ran.stdout.count("\n") == 1
