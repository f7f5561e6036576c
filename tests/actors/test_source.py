"""Digests of installed code, in this process and on nodes that have another copy."""

import itertools
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import ray
from cluster_nodes import ROOT, in_own_process, nodes

from actors.source import PACKAGES, digest_of, package_folder, require_same_source, source_digest
from onecomp.errors import InputError


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "part").mkdir(parents=True)
    (folder / "code.py").write_text("x = 1\n")
    (folder / "part" / "page.html").write_text("<p>")
    return folder


def test_the_digest_covers_code_names_and_package_data(package):
    seen = {digest_of([package])}
    (package / "code.py").write_text("x = 2\n")
    seen.add(digest_of([package]))
    (package / "part" / "page.html").write_text("<b>")
    seen.add(digest_of([package]))
    (package / "code.py").rename(package / "other.py")
    seen.add(digest_of([package]))
    assert len(seen) == 4


def test_the_digest_is_the_same_wherever_the_package_lies(package, tmp_path):
    copy = tmp_path / "elsewhere" / "package"
    shutil.copytree(package, copy)
    assert digest_of([copy]) == digest_of([package])


def test_a_byte_that_moves_from_a_file_to_the_next_changes_the_digest(package):
    (package / "a.py").write_text("xy")
    (package / "b.py").write_text("z")
    before = digest_of([package])
    (package / "a.py").write_text("x")
    (package / "b.py").write_text("yz")
    assert digest_of([package]) != before


def test_what_python_and_editors_leave_does_not_count(package):
    before = digest_of([package])
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "code.cpython-311.pyc").write_bytes(b"1")
    (package / "code.py.swp").write_bytes(b"1")
    assert digest_of([package]) == before


def test_all_three_packages_are_covered():
    assert source_digest() == digest_of([ROOT / name for name in PACKAGES])
    assert set(PACKAGES) == {"onecomp", "cluster", "actors"}


def test_a_package_that_is_missing_is_named():
    with pytest.raises(InputError, match=r"no_such_package: is not installed on .*onecomp-ray"):
        package_folder("no_such_package")


def test_another_digest_is_refused_with_host_and_remedy():
    require_same_source(source_digest())
    with pytest.raises(InputError) as caught:
        require_same_source("f" * 64)
    error = pickle.loads(pickle.dumps(caught.value))
    message = (
        r"node .+: runs another version of onecomp \(digest [0-9a-f]{12} instead of f{12}\)\. "
    )
    assert re.fullmatch(
        message + "Install the same version on every node, or submit with --working-dir.",
        str(error),
    )


@ray.remote(num_cpus=1)
def check_source(expected: str) -> str:
    require_same_source(expected)
    return str(package_folder("onecomp"))


def check_on_both_nodes(mine: str, changed: str) -> None:
    other = {"resources": {"other": 1}, "env_vars": {"PYTHONPATH": changed}}
    with nodes(other):
        here = check_source.options(resources={"node:__internal_head__": 0.1})
        assert ray.get(here.remote(source_digest())) == str(Path(mine, "onecomp"))
        there = check_source.options(resources={"other": 1})
        with pytest.raises(InputError, match=r"node .+: runs another version of onecomp \(digest"):
            ray.get(there.remote(source_digest()))


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_with_another_copy_is_refused(tmp_path):
    """Both are copies: the checkout itself may be edited meanwhile."""
    ignored = shutil.ignore_patterns("__pycache__")
    for copy, name in itertools.product(("mine", "changed"), PACKAGES):
        shutil.copytree(ROOT / name, tmp_path / copy / name, ignore=ignored)
    with (tmp_path / "changed" / "actors" / "worker.py").open("a") as file:
        file.write("# changed\n")
    path = os.pathsep.join([str(tmp_path / "mine"), str(ROOT / "tests")])
    copies = [str(tmp_path / copy) for copy in ("mine", "changed")]
    in_own_process(check_on_both_nodes, *copies, environment={"PYTHONPATH": path})
