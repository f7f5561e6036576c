"""What putting a checkpoint in its place moves, removes, leaves alone and refuses."""

import shutil
from pathlib import Path

import pytest

from onecomp.errors import InputError
from onecomp.export.install import (
    install_checkpoint,
    require_apart,
    require_directory,
    require_no_checkpoint,
)

NEW = {"config.json": "new", "model-00001-of-00002.safetensors": "1", "tokenizer.json": "t"}


def write(directory: Path, contents: dict[str, str]) -> Path:
    directory.mkdir()
    for name, text in contents.items():
        (directory / name).write_text(text)
    return directory


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_everything_complete_is_moved(tmp_path):
    torn = {".tmpX1": "", ".model-00002-of-00002.safetensors.7.tmp": ""}
    staging = write(tmp_path / "staging", NEW | torn)
    install_checkpoint(staging, tmp_path / "deep" / "out")
    assert contents(tmp_path / "deep" / "out") == NEW
    assert not staging.exists()


def test_nothing_of_the_old_checkpoint_is_read_with_the_new_one(tmp_path):
    old = ["model.safetensors", "model-00001-of-00009.safetensors", "added_tokens.json"]
    old += ["tokenizer.model", "vocab.json", "adapter_config.json", "generation_config.json"]
    mine = {"notes.txt": "mine", "results.json": "mine", "other.safetensors": "mine"}
    output = write(tmp_path / "out", dict.fromkeys(old, "old") | {"config.json": "old"} | mine)
    install_checkpoint(write(tmp_path / "staging", NEW), output)
    assert contents(output) == NEW | mine


def test_an_interrupted_install_leaves_no_configuration_and_can_be_repeated(tmp_path):
    output = write(tmp_path / "out", {"config.json": "old", "model.safetensors": "old"})
    name = "model-00001-of-00002.safetensors"
    (output / name / name).mkdir(parents=True)  # stands in the way
    with pytest.raises(shutil.Error):
        install_checkpoint(write(tmp_path / "staging", NEW), output)
    assert not (output / "config.json").exists()
    shutil.rmtree(output / name)
    install_checkpoint(tmp_path / "staging", output)
    assert contents(output) == NEW


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_directory_with_a_model_is_refused(tmp_path, name):
    require_no_checkpoint(tmp_path)
    require_no_checkpoint(tmp_path / "missing")
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"already holds a checkpoint"):
        require_no_checkpoint(tmp_path)


def test_a_directory_cannot_lie_in_a_file(tmp_path):
    require_directory(tmp_path / "new" / "newer")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"cannot be a directory: \S+file is a file"):
            require_directory(path)


@pytest.mark.parametrize(
    ("output", "run", "problem"),
    [
        ("model", "run", "the output would lie in the model's own directory"),
        ("model/w4", "run", "the output would lie in the model's own directory"),
        ("out", "model", "the run directory would lie in the model's own directory"),
        (None, "model/run", "the run directory would lie in the model's own directory"),
        ("run", "run", "the output would lie in the run directory"),
        ("run/out", "run", "the output would lie in the run directory"),
    ],
)
def test_places_are_apart(tmp_path, output, run, problem):
    model = tmp_path / "model"
    require_apart(tmp_path / "out", tmp_path / "out" / "run", model)
    with pytest.raises(InputError, match=problem):
        require_apart(output and tmp_path / output, tmp_path / run, model)
