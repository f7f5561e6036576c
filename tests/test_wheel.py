"""The wheel holds the three packages and nothing else. Three generic names must not bring more."""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIST_INFO = "onecomp_ray-0.1.0.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from the checkout by the installed hatchling: nothing is downloaded."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    [path] = directory.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_top_level_is_the_three_packages(wheel):
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert top_level == {"onecomp", "cluster", "actors", DIST_INFO}


def test_every_module_is_in_the_wheel(wheel):
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("onecomp", "cluster", "actors")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources == {name for name in wheel.namelist() if not name.startswith(DIST_INFO)}


def test_every_package_folder_has_an_init(wheel):
    modules = {name for name in wheel.namelist() if name.endswith(".py")}
    folders = {name.rpartition("/")[0] for name in modules}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in modules} == set()


def test_metadata_tells_name_version_licence_and_command(wheel):
    metadata = Parser().parsestr(wheel.read(f"{DIST_INFO}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("onecomp-ray", "0.1.0")
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.10")
    assert f"{DIST_INFO}/licenses/LICENSE" in wheel.namelist()
    entry_points = wheel.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert re.search(r"^onecomp = onecomp\.cli:main$", entry_points, re.MULTILINE)
