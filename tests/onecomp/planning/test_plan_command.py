"""``onecomp plan``: the options of quantize, one JSON object or tables, and what is refused."""

import json
import shutil

import click
import pytest
import typer
from typer.testing import CliRunner

from onecomp.cli import app


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def values(*arguments: object) -> dict:
    """The one JSON object on standard output."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def refused(*arguments: object) -> str:
    done = invoke(*arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == ""
    return " ".join(done.stderr.split())


def test_plan_takes_every_option_of_quantize():
    commands = typer.main.get_command(app).commands
    options = {
        name: {tuple(parameter.opts) for parameter in commands[name].params}
        for name in ("quantize", "plan")
    }
    assert options["quantize"] - options["plan"] == set()
    assert isinstance(commands["plan"], click.Command) or commands["plan"].name == "plan"


def test_a_plan_of_the_largest_llama_names_what_does_not_fit(llama_405b):
    found = values(llama_405b, "--gpu", "H100", "--num-workers", 8, "--price", 2)
    assert found["workers"] == 8
    assert found["model"]["blocks"] == 126
    assert found["fits"] is False
    assert "the smallest GPU (a H100) has 80.0 GiB" in found["shortages"][0]
    assert found["remedies"]
    assert found["cost"] == pytest.approx(16 * found["time"]["wall_s"] / 3600)
    assert {phase["name"] for phase in found["phases"]} >= {"read", "forward", "sums", "solve"}


def test_experts_do_not_fail(deepseek_v3):
    found = values(deepseek_v3, "--gpu", "b200", "--num-workers", 16)
    assert [kind["blocks"] for kind in found["kinds"]] == [3, 58]
    assert any("are fused" in note for note in found["notes"])


def test_tables_say_the_same(llama_405b):
    arguments = (llama_405b, "--gpu", "H100", "--num-workers", 8)
    text, found = invoke(*arguments).stdout, values(*arguments)
    device = found["memory"]["device_bytes_per_worker"]
    assert f"{device / 2**30:.1f} GiB" in text
    assert "DOES NOT FIT" in text
    assert "mlp.gate_proj, up_proj" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_default_group_size_is_that_of_quantize(tiny_model_dir, llama_405b):
    assert values(tiny_model_dir("llama"), "--num-workers", 0)["method"]["groupsize"] == 64
    assert values(llama_405b)["method"]["groupsize"] == 128


def test_options_change_what_they_say(tiny_model_dir):
    directory = tiny_model_dir("llama")
    rtn = values(directory, "--quantizer", "rtn", "--num-workers", 0)
    assert (rtn["text"], rtn["qep"], rtn["method"]["name"]) == (None, False, "RTN")
    small = values(directory, "--num-calibration-samples", 8, "--max-length", 64, "--no-qep")
    assert (small["text"]["tokens"], small["qep"]) == (512, False)
    assert values(directory, "--wbits", 3)["method"]["wbits"] == 3


def test_a_file_of_options_for_quantize_serves_plan(tiny_model_dir, tmp_path):
    (tmp_path / "options.yaml").write_text("output: out\nwbits: 3\noverwrite: true\n")
    found = values(tiny_model_dir("llama"), "--config", tmp_path / "options.yaml")
    assert found["method"]["wbits"] == 3


def test_a_disk_without_room_is_noticed(llama_405b, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    found = values(llama_405b, "--gpu", "H200", "--num-workers", 8, "--run-dir", tmp_path / "run")
    needs = found["disk"]["run_directory_bytes"]
    assert any("of run directory" in text for text in found["shortages"]) == (needs > free)


def test_a_probe_is_part_of_the_object(tiny_model_dir):
    found = values(
        tiny_model_dir("llama"), "--probe", "--num-calibration-samples", 4, "--max-length", 128,
        "--num-workers", 0,
    )  # fmt: skip
    assert found["probe"]["forward"]["seconds"] > 0
    assert "Rates: measured on this machine." in found["notes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H9000"), "H9000: is not a known kind of GPU. Known: H100"),
        (("--num-workers", "-1"), "num_workers='-1': must be N"),
        (("--wbits", 9), "wbits=9"),
        (("--groupsize", 48), "groupsize=48 must divide in_features"),
        (("--max-length", 0), "max_length=0"),
        (("--hardware", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("--gpu", "H100", "--probe"), "a probe measures this machine"),
    ],
)
def test_bad_input_ends_with_status_2(tiny_model_dir, arguments, message):
    assert message in refused(tiny_model_dir("llama"), *arguments)


def test_a_directory_without_a_model_is_refused(tmp_path):
    assert "holds no config.json" in refused(tmp_path)
