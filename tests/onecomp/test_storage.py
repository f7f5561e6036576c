"""Files in every kind of store, by the same functions."""

import os
import pickle
import re
from pathlib import Path

import pytest

from onecomp.errors import InputError
from onecomp.storage import (
    AnyPath,
    children,
    create_exclusively,
    local_directory,
    local_file,
    make_directory,
    move_file,
    move_tree,
    open_path,
    read_files,
    read_range,
    remove_tree,
    replacing,
    require_writable,
)

KINDS = ["local", "memory", "s3"]


@pytest.fixture(params=KINDS)
def place(request, tmp_path) -> AnyPath:
    """A directory that does not exist yet."""
    return somewhere(request.param, tmp_path, request)


def somewhere(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> AnyPath:
    if kind == "s3":
        return request.getfixturevalue("s3") / "some" / "folder"
    if kind == "memory":
        return open_path(f"memory://{os.urandom(4).hex()}/folder")
    return tmp_path / "some" / "folder"


def write(path: AnyPath, content: bytes) -> AnyPath:
    make_directory(path.parent)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("out", "{cwd}/out"),
        (Path("out"), "{cwd}/out"),
        ("~/out", "{home}/out"),
        ("/a/b", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("local:///a/b", "/a/b"),
    ],
)
def test_a_local_place_becomes_an_absolute_path(given, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = open_path(given)
    assert isinstance(path, Path)
    assert type(path) is type(Path())
    assert str(path) == expected.format(cwd=tmp_path, home=Path.home())


def test_a_url_stays_what_it_is_and_travels_without_credentials(s3):
    path = open_path(f"{s3}run")
    assert str(path) == f"{s3}run"
    assert str(path / "a" / "b.json") == f"{s3}run/a/b.json"
    travelled = pickle.dumps(path)
    assert b"secret" not in travelled
    assert pickle.loads(travelled) == path == open_path(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "nonesuch://bucket/run",
            "nonesuch://bucket/run: cannot be opened: Unsupported",
        ),
        ("s3://bucket/run*", "s3://bucket/run*: holds *, which no URL here may."),
        ("filecache::s3://bucket/run", "filecache::s3://bucket/run: holds ::, which no URL"),
    ],
)
def test_a_url_that_nothing_can_open_is_refused(url, message):
    with pytest.raises(InputError, match=re.escape(message)):
        open_path(url)


def test_a_store_that_is_not_installed_is_named_with_a_remedy():
    with pytest.raises(InputError, match=r"cannot be opened: Install adlfs .*every node"):
        open_path("abfs://container/run")


def test_a_bucket_that_does_not_exist_cannot_be_written(s3):
    with pytest.raises(InputError, match=r"FileNotFoundError: The specified bucket does not exist"):
        require_writable(open_path("s3://no-such-bucket/run"))
    require_writable(s3 / "run")
    assert children(s3) == []


def test_a_file_appears_whole_or_not_at_all(place):
    path = place / "x.bin"
    make_directory(place)
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        temporary.write_bytes((place / "missing").read_bytes())
    assert children(place) == []
    write(path, b"old")
    write(path, b"newer")
    assert read_files(children(place)) == [b"newer"]
    assert read_range(path, 1, 3) == b"ew"
    assert read_range(path, 3, 100) == b"er"


def test_one_of_several_creates_a_file(place):
    make_directory(place)
    create_exclusively(place / "x", b"first")
    with pytest.raises(FileExistsError):
        create_exclusively(place / "x", b"second")
    assert (place / "x").read_bytes() == b"first"


def test_a_directory_that_does_not_exist_has_no_children(place):
    assert children(place) == []
    write(place / "b" / "deep", b"")
    write(place / "a", b"")
    assert [path.name for path in children(place)] == ["a", "b"]
    assert children(place / "a") == []


def test_what_others_write_is_seen_at_once(s3):
    assert children(s3 / "run") == []
    other = pickle.loads(pickle.dumps(s3))
    write(other / "run" / "x", b"")
    assert [path.name for path in children(s3 / "run")] == ["x"]


def test_a_file_is_read_through_a_local_one(place):
    write(place / "x.bin", b"content")
    with local_file(place / "x.bin") as local:
        assert local.read_bytes() == b"content"
    assert (place / "x.bin").read_bytes() == b"content"
    assert local.exists() is isinstance(place, Path)


def test_a_directory_is_read_through_a_local_one(place):
    for name in "ab":
        write(place / name, name.encode())
    with local_directory(place) as local:
        assert {path.name: path.read_bytes() for path in local.iterdir()} == {"a": b"a", "b": b"b"}
    assert len(children(place)) == 2


@pytest.mark.parametrize("to", KINDS)
def test_a_file_moves_within_a_store_and_between_two(place, to, tmp_path, request):
    source = write(place / "x.bin", b"content")
    target = write(somewhere(to, tmp_path / "other", request) / "y" / "x.bin", b"old")
    move_file(source, target)
    assert target.read_bytes() == b"content"
    assert not source.exists()


def test_a_tree_moves_and_goes(place):
    write(place / "tree" / "deep" / "x", b"x")
    write(place / "tree" / "y", b"y")
    move_tree(place / "tree", place / "moved")
    assert not (place / "tree").exists()
    assert (place / "moved" / "deep" / "x").read_bytes() == b"x"
    assert (place / "moved" / "y").read_bytes() == b"y"
    write(place / "kept", b"")
    for _ in range(2):
        remove_tree(place / "moved")
        assert [path.name for path in children(place)] == ["kept"]
