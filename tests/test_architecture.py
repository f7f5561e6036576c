"""Who imports whom, how large things are, and what no file may say; read from the sources."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("onecomp", "cluster", "actors")
FORBIDDEN = {
    "onecomp": {"ray", "cluster", "actors", "deploy", "tests"},
    "cluster": {"onecomp", "actors", "deploy", "tests"},
    "actors": {"deploy", "tests"},
}
"""Top-level names a package never imports, at its top or inside a function."""
DOORS = {
    ("onecomp/executor.py", "default_executor"),
    ("onecomp/commands.py", None),
    ("onecomp/cli.py", "submit"),
    ("onecomp/post_process/gang.py", "default_gang"),
}
"""File and function (None: any) that may import `cluster` and `actors`, at call time only."""
BANNED_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
LONG_FUNCTIONS: dict[str, str] = {}
"""``file::function`` that may be longer, and why."""
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|Users|home/(?!ray\b)\w+)/|\.\./shared\b")
"""Places of one machine, or beside a checkout; /home/ray is the home in Ray's container images."""
SKIPPED_FOLDERS = {"build", "dist", "__pycache__"}

Import = tuple[str, str | None]
"""A module that is imported, and the function in which it is (None: at the top of the file)."""


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, function: str | None = None) -> Iterator[Import]:
    """Every import below ``tree``, those by `importlib.import_module` of a constant included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", function) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield (ast.literal_eval(node.args[0]) if is_constant(node) else "?"), function
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, node.name if is_function else function)


def is_constant(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Constant)


def forbidden_imports(file: str, source: str) -> list[str]:
    """What ``file``, a path below the root, imports against the rules."""
    package = file.split("/")[0]
    return [
        f"{file}: {module} in {function or 'the module'}"
        for module, function in imports(ast.parse(source))
        if module.split(".")[0] in FORBIDDEN[package] and not is_door(file, module, function)
    ]


def is_door(file: str, module: str, function: str | None) -> bool:
    """Whether this import is one of the places where `onecomp` reaches for Ray."""
    return (
        module.split(".")[0] in {"cluster", "actors"}
        and function is not None
        and bool({(file, function), (file, None)} & DOORS)
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    found = [
        line
        for path in sources(package)
        for line in forbidden_imports(relative(path), path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("file", "source", "is_allowed"),
    [
        ("onecomp/pipeline.py", "import ray", False),
        ("onecomp/pipeline.py", "def run():\n    if True:\n        from ray import get", False),
        ("onecomp/pipeline.py", "from cluster.connect import connect", False),
        ("onecomp/pipeline.py", "import importlib\nimportlib.import_module('actors.x')", False),
        ("onecomp/executor.py", "def default_executor():\n    from actors.executor import X", True),
        ("onecomp/executor.py", "def default_executor():\n    import ray", False),
        ("onecomp/executor.py", "from actors.executor import RayExecutor", False),
        ("onecomp/executor.py", "def other():\n    from actors.executor import X", False),
        ("onecomp/commands.py", "def submit():\n    from cluster.jobs import submit_job", True),
        ("onecomp/commands.py", "from cluster.jobs import submit_job", False),
        ("onecomp/cli.py", "def submit():\n    from actors.submission import x", True),
        ("onecomp/cli.py", "def other():\n    from actors.submission import x", False),
        ("cluster/pool.py", "import ray\nimport rayleigh", True),
        ("cluster/pool.py", "from onecomp.errors import UserError", False),
        ("actors/executor.py", "import ray\nfrom onecomp import Runner\nimport cluster.pool", True),
        ("actors/executor.py", "import deploy", False),
    ],
)
def test_the_rules_tell_right_from_wrong(file, source, is_allowed):
    assert (forbidden_imports(file, source) == []) is is_allowed


def test_third_party_imports_are_declared_dependencies():
    declared = {normalized(name) for name in declared_dependencies()}
    distributions = packages_distributions()
    for path in sources(*PACKAGES):
        for module, _ in imports(ast.parse(path.read_text())):
            name = module.split(".")[0]
            if name in sys.stdlib_module_names or name in PACKAGES:
                continue
            owners = {normalized(owner) for owner in distributions.get(name, [name])}
            assert owners & declared, f"{relative(path)} imports {name}, not in pyproject.toml"


def declared_dependencies() -> list[str]:
    """Names in the list ``dependencies`` of pyproject.toml (Python 3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block
    return re.findall(r'^\s*"([\w.-]+)', block[1], re.MULTILINE)


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_modules_import_each_other_without_cycles():
    modules = {module_name(path): path for path in sources(*PACKAGES)}
    graph = {}
    for name, path in modules.items():
        top = [module for module, function in imports(ast.parse(path.read_text())) if not function]
        graph[name] = {owner for module in top if (owner := owning_module(module, modules))} - {
            name
        }
    order = list(TopologicalSorter(graph).static_order())  # a cycle raises and is named
    assert set(order) == set(modules)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def owning_module(imported: str, modules: dict[str, Path]) -> str | None:
    """The module of ours that ``imported`` is or lies in."""
    parent = imported.rpartition(".")[0]
    return imported if imported in modules else parent if parent in modules else None


def test_no_module_has_a_name_that_says_nothing():
    named = [relative(path) for path in sources(*PACKAGES) if BANNED_NAMES & set(path_words(path))]
    assert named == []


def path_words(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


def test_files_and_functions_stay_small():
    too_long = []
    for path in sources(*PACKAGES, "tests", "deploy", "benchmarks"):
        source = path.read_text()
        if (num_lines := len(source.splitlines())) > MAX_FILE_LINES:
            too_long.append(f"{relative(path)}: {num_lines} lines")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name, num_lines = f"{relative(path)}::{node.name}", node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES and name not in LONG_FUNCTIONS:
                too_long.append(f"{name}: {num_lines} lines")
    assert too_long == []


def test_no_file_names_a_place_of_one_machine():
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in project_files(ROOT)
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def project_files(folder: Path) -> Iterator[Path]:
    """Files of the project, without what tools write."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            is_tool = path.name.startswith(".") and path.name != ".ci"
            if not is_tool and path.name not in SKIPPED_FOLDERS:
                yield from project_files(path)
        elif not path.is_symlink() and path.stat().st_size < 500_000:
            yield path


@pytest.mark.parametrize(
    ("text", "is_place"),
    [
        (f"see {'/wo'}rk/main/onecomp", True),
        (f"open('{'/ro'}ot/model')", True),
        (f"{'/ho'}me/someone/model", True),
        (f"{'..'}/shared/notes", True),
        ("/home/ray/anaconda3", False),
        ("https://example.org/work/this", False),
        ("a/work/b and ./root/x", False),
    ],
)
def test_the_pattern_finds_places(text, is_place):
    assert bool(MACHINE_PATH.search(text)) is is_place
