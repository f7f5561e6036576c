"""The documents say nothing that is not there: paths, commands, links, examples."""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from tiny_models import sample_text

import onecomp
from onecomp.cli import app
from onecomp.job_options import SWITCHES, USUAL_WBITS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app)
LONGEST_README = 210


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language ("" for none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for named, block in found if named == language]


def tree_paths(tree: str) -> Iterator[str]:
    """Paths of an indented tree: two blanks a level, a folder before what lies in it."""
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        yield "".join(folders)


def command_lines(text: str) -> list[list[str]]:
    """Words behind ``onecomp`` of every command line in the blocks without a language."""
    lines = "\n".join(blocks(text, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("onecomp ")]


def parsing_problem(words: list[str]) -> str | None:
    """Why the command line does not parse; None if it does. Nothing is run."""
    name, *arguments = words
    if name not in COMMANDS.commands:
        return f"no command {name}"
    command = COMMANDS.commands[name]
    for parameter in command.params:
        parameter.callback = None  # would read files
    try:
        command.make_context(name, arguments)
    except Exception as error:  # noqa: BLE001 - whatever the parser says, the line is wrong
        return f"{type(error).__name__}: {error}"
    return None


def known_options() -> set[str]:
    parameters = [p for command in COMMANDS.commands.values() for p in command.params]
    return {option for p in parameters for option in (*p.opts, *p.secondary_opts)} | {"--help"}


def mentioned_options(text: str) -> set[str]:
    """Options in inline code: ``--wbits``, ``onecomp quantize --help``."""
    inline = re.findall(r"`([^`\n]+)`", without_blocks(text))
    return {word for code in inline for word in code.split() if word.startswith("--")}


def mentioned_commands(text: str) -> set[str]:
    inline = re.findall(r"`onecomp ([^`\n]+)`", without_blocks(text))
    return {code.split()[0] for code in inline}


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def mentioned_paths(text: str) -> set[str]:
    """Paths below the root in inline code: ``onecomp/cli.py``, ``tests/contract/``."""
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] != ".")
    return set(re.findall(rf"`((?:{folders})/[\w./]+)`", without_blocks(text)))


def links(text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))
    return [target for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path, text: str) -> list[str]:
    broken = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def identifier(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_path_of_the_tree_exists():
    [tree] = [block for block in blocks(README.read_text(), "text") if "pipeline.py" in block]
    paths = list(tree_paths(tree))
    assert "onecomp/quantizer/gptq/" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    wrong_kind = [path for path in paths if path.endswith("/") != (ROOT / path).is_dir()]
    assert wrong_kind == []


def test_the_tree_shows_every_module_and_folder_at_the_top_of_the_library():
    [tree] = [block for block in blocks(README.read_text(), "text") if "pipeline.py" in block]
    shown = {path.rstrip("/") for path in tree_paths(tree)}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "onecomp").iterdir()
        if path.is_dir() or path.suffix == ".py"
        if not path.name.startswith("__")
    }
    assert there - shown == set()


def test_every_line_of_the_tree_says_what_it_is():
    [tree] = [block for block in blocks(README.read_text(), "text") if "pipeline.py" in block]
    assert [line for line in tree.splitlines() if not re.search(r"\S {2,}\S", line)] == []


def test_the_reading_list_is_five_files_and_starts_with_the_loop():
    section = README.read_text().split("## Read five files in this order")[1]
    files = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    assert len(files) == 5
    assert files[0] == "onecomp/pipeline.py"
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_readme_stays_short():
    assert len(README.read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_command_lines_parse(document):
    found = {
        shlex.join(words): parsing_problem(words) for words in command_lines(document.read_text())
    }
    assert {line: problem for line, problem in found.items() if problem} == {}


def test_the_readme_shows_every_command():
    shown = {words[0] for words in command_lines(README.read_text())}
    assert shown == set(COMMANDS.commands)


@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_options_and_commands_in_the_text_exist(document):
    text = document.read_text()
    assert mentioned_options(text) - known_options() == set()
    assert mentioned_commands(text) - set(COMMANDS.commands) == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_paths_in_the_text_exist(document):
    assert [p for p in mentioned_paths(document.read_text()) if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=identifier)
def test_links_resolve(document):
    assert broken_links(document, document.read_text()) == []


def test_make_targets_in_the_documents_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text()
        named = re.findall(r"(?:^|`)make ([a-z-]+)(?= *#|`|$)", text, re.MULTILINE)
        assert set(named) <= targets, document


def test_the_table_of_defaults_is_the_command_lines():
    command = COMMANDS.commands["quantize"]
    defaults = {p.opts[0]: p.default for p in command.params}
    rows = re.findall(r"^\| `(--[\w-]+)` \| ([^|]+) \|", README.read_text(), re.MULTILINE)
    shown = {option: value.strip(" `") for option, value in rows}
    switches = {option.partition("/")[0] for option in SWITCHES.values()}  # on unless turned off
    assert shown["--sym"] == "on"
    assert {option for option, value in shown.items() if value == "on"} == {
        option for option in shown if defaults[option] is True or option in switches
    }
    assert shown["--wbits"] == str(USUAL_WBITS)
    plain = ("--quantizer", "--calibration-dataset", "--dtype")
    assert {option: shown[option] for option in plain} == {
        option: str(defaults[option]) for option in plain
    }
    assert "| 128 of 2048 tokens |" in README.read_text()
    assert (defaults["--num-calibration-samples"], defaults["--max-length"]) == (128, 2048)


def test_names_in_the_examples_are_public():
    for block in blocks(README.read_text(), "python"):
        imported = [
            alias.name
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.ImportFrom) and node.module == "onecomp"
            for alias in node.names
        ]
        assert imported
        assert set(imported) <= set(onecomp.__all__)


def test_the_python_example_runs(tiny_model_dir, tmp_path, monkeypatch):
    [example] = blocks(README.read_text(), "python")
    model = tiny_model_dir("llama", hidden_size=128)
    example = example.replace("path/to/model", str(model)).replace(" 512, 128,", " 64, 8,")
    monkeypatch.chdir(tmp_path)
    Path("calibration.txt").write_text(sample_text(500))
    exec(compile(example, "README.md", "exec"), {})
    loaded, tokenizer = onecomp.load_quantized_model("quantized")
    assert loaded.config.quantization_config["bits"] == 4
    assert tokenizer is not None


def test_every_public_name_has_a_docstring():
    assert [name for name in onecomp.__all__ if not inspect.getdoc(getattr(onecomp, name))] == []


@pytest.mark.parametrize(
    ("words", "is_right"),
    [
        ("quantize m --output d --asym --no-mse", True),
        ("quantize m --output d --groupsise 64", False),
        ("quantize m --output d --wbits four", False),
        ("quantize m", False),
        ("quantise m --output d", False),
        ("resume", False),
    ],
)
def test_the_parser_tells_right_from_wrong(words, is_right):
    assert (parsing_problem(words.split()) is None) is is_right


def test_the_readers_find_what_is_wrong(tmp_path):
    (tmp_path / "there.md").write_text("# A `b` heading: c\n")
    text = "[a](there.md#a-b-heading-c) [b](there.md#gone) [c](gone.md) [d](https://example.org)"
    assert broken_links(tmp_path / "x.md", text) == ["there.md#gone", "gone.md"]
    assert list(tree_paths("a/  x\n  b/  x\n    c.py  x\n  d.py  x\ne  x")) == [
        "a/",
        "a/b/",
        "a/b/c.py",
        "a/d.py",
        "e",
    ]
    assert command_lines("```\nonecomp eval d \\\n  --ppl t  # why\nmake x\n```\n") == [
        ["eval", "d", "--ppl", "t"]
    ]
    assert mentioned_options("`--wbits`, `x --y 3`, --z\n```\n`--not`\n```\n") == {"--wbits", "--y"}
