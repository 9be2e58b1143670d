"""Imports run downward, and in no circle of files: also those inside functions, and those given as strings.

import-linter reads import statements alone. This reads every string that names a module too, whatever it is handed to.
The order of rooms is import-linter's own, in setup.cfg. The package root knows every room: its table is left out.
"""

import ast
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTIONS = ("import_module", "__import__")


def rooms() -> dict[str, int]:
    """Room → its line in import-linter's contract, the uppermost 0."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["importlinter:contract:layers"]["layers"].split("\n")
    return {room.strip(): number for number, line in enumerate(lines) for room in line.split("|") if room.strip()}


def graph(package: Path) -> dict[str, set[str]]:
    """Module → the modules of its package that it names in imports or strings; the root's own are left out."""
    files = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {
        name: {one for one in _named(file, name, set(files)) if one != name}
        for name, file in files.items()
        if name != package.name
    }


def _named(file: Path, name: str, modules: set[str]) -> Iterator[str]:
    home = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _known(alias.name, modules)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), home)
            for alias in node.names:
                yield from _known(f"{base}.{alias.name}", modules)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in FUNCTIONS:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            words = [one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            for word in words[:1]:
                yield from _known(resolve_name(word, (*words[1:], home)[0]), modules)
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            start = str(node.values[0].value)  # of a name that ends in anything
            if start.endswith("."):
                yield from (one for one in modules if one.startswith(start) and not one.endswith(".__main__"))
        elif isinstance(node, ast.Constant) and "." in str(node.value) and id(node) not in prose:
            yield from {str(node.value)} & modules


def _known(name: str, modules: set[str]) -> Iterator[str]:
    """The module that an import of a name runs: the name may be of something inside it."""
    yield from [one for one in (name, name.rpartition(".")[0]) if one in modules][:1]


def offences(imports: dict[str, set[str]], order: dict[str, int]) -> list[str]:
    """Every import that does not run downward, and one circle of files, if there is any."""
    found = [f"{module} stands in no room" for module in imports if _room(module) not in order]
    for module, others in imports.items():
        here = _room(module)
        for other in others:
            there = _room(other)
            if here != there and order.get(there, -1) <= order.get(here, -1):
                found.append(f"{module} → {other}")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found.append("circle: " + " ← ".join(error.args[1]))
    return sorted(found)


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_imports_run_downward_and_in_no_circle() -> None:
    assert offences(graph(ROOT / "klas_hf"), rooms()) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import klas.high", "klas.high"),
        ("def late():\n    from klas.high.top import answer", "klas.high.top"),
        ("from importlib import import_module\nimport_module('klas.high')", "klas.high"),
        ("import importlib\nimportlib.import_module('.high', package='klas')", "klas.high"),
        ("__import__('klas.high')", "klas.high"),
        ("def load(name):\n    return __import__(name)\nload('klas.high')", "klas.high"),
        ("name = 'top'\n__import__(f'klas.high.{name}')", "klas.high.top"),
        ("from ..high import top", "klas.high.top"),
        ("import klas", "klas"),
        ("__import__('klas')", "klas"),
    ],
)
def test_an_import_that_runs_upward_is_found(code: str, found: str, tmp_path: Path) -> None:
    package = tmp_path / "klas"
    for name in ("", "high/", "low/"):
        (package / name).mkdir(parents=True, exist_ok=True)
        (package / name / "__init__.py").write_text("'''klas.high'''\n")
    (package / "high/top.py").write_text("from klas.low.one import answer\n")
    (package / "low/one.py").write_text("answer = 1\n")
    order = {"klas.high": 0, "klas.low": 1}
    assert offences(graph(package), order) == []
    (package / "low/two.py").write_text(code)
    assert offences(graph(package), order) == [f"klas.low.two → {found}"]


def test_a_circle_of_files_in_one_room_is_found(tmp_path: Path) -> None:
    package = tmp_path / "klas"
    (package / "low").mkdir(parents=True)
    (package / "low/one.py").write_text("import klas.low.two\n")
    (package / "low/two.py").write_text("def late():\n    __import__('klas.low.one')\n")
    (found,) = offences(graph(package), {"klas.low": 0})
    assert found.startswith("circle: klas.low.")
    (package / "low/two.py").write_text("from klas.nowhere import two\nfrom math import pi\n")
    (package / "attic.py").write_text("")
    assert offences(graph(package), {"klas.low": 0}) == ["klas.attic stands in no room"]
