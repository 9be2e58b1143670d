"""Docs: every public name is on the reference page and says what it is; README's and docs' lines name what exists.

The examples in docstrings are run by `--doctest-modules` (conftest.py at the root makes what they use).
"""

import ast
import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

import klas_hf
from klas_hf.curves import cascades

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference.md"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CASCADES = [name for name, thing in vars(cascades).items() if getattr(thing, "__module__", "") == cascades.__name__]
THINGS: dict[str, Any] = {name: getattr(klas_hf, name) for name in sorted(klas_hf.__all__)}
THINGS |= {f"cascades.{name}": getattr(cascades, name) for name in CASCADES if name[0] != "_"}


def test_the_reference_has_every_public_name_once() -> None:
    listed = re.findall(r"^::: klas_hf\.(\w+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(klas_hf.__all__)


def test_the_reference_has_every_module_that_loads_data() -> None:
    listed = re.findall(r"^::: (klas_hf\.data\.\w+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"klas_hf.data.text", "klas_hf.data.images"} <= set(listed)
    for name in listed:
        import_module(name)


def test_readme_is_short() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_s_python_imports_exists_with_the_keywords_it_gives(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        tree = ast.parse(code)
        names: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("klas_hf"):
                names |= {alias.name: getattr(import_module(str(node.module)), alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (called := named(node.func, names)) is not None:
                inspect.signature(called).bind_partial(**{word.arg: None for word in node.keywords if word.arg})


def named(function: ast.expr, names: dict[str, Any]) -> Any:
    """What `f(…)` or `f.method(…)` of an imported `f` calls; None: something else."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return getattr(names[function.value.id], function.attr) if function.value.id in names else None
    return names.get(function.id) if isinstance(function, ast.Name) else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)|<img src=\"([^\"]+)", text)
    run = re.findall(r"\b((?:recipes|benchmarks|tests)/[\w/.]+\.(?:py|yaml))", text)
    missing = [name for pair in linked for name in pair if name and not (page.parent / name).exists()]
    assert missing + [name for name in run if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", THINGS)
def test_a_public_name_is_described_with_arguments_results_and_an_example(name: str) -> None:
    assert not (wrong := faults(THINGS[name])), "\n".join(wrong)


# --- what is asked of a docstring ---


def faults(thing: Any) -> list[str]:
    """What the docstrings of a public name lack."""
    doc = own_doc(thing)
    if not doc:
        return ["no docstring"]
    wrong = [] if re.search(r"^Example:\n\s+>>> ", doc, re.MULTILINE) else ["no Example"]
    if not doc.splitlines()[0].endswith((".", ":")):
        wrong.append("the first line is no sentence")
    needed = arguments(thing)
    named = described(doc, "Args") | (described(doc, "Attributes") if inspect.isclass(thing) else set())
    wrong += [f"{name} is not described" for name in needed if name not in named | helped(thing)]
    if "kwargs" not in needed and not is_config(thing):
        wrong += [f"{name} is described but is no argument" for name in sorted(described(doc, "Args") - set(needed))]
    if not inspect.isclass(thing):
        returns = inspect.signature(thing).return_annotation not in (None, "None")
        return wrong + ["no Returns"] * (returns and "\nReturns:\n" not in doc)
    return wrong + [fault for name, member in vars(thing).items() for fault in member_faults(thing, name, member)]


def member_faults(kind: type, name: str, member: Any) -> list[str]:
    """What the docstring of a public method lacks; one that overrides a method of a library keeps its docstring."""
    method = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    if name.startswith("_") or not inspect.isfunction(method):
        return []
    doc = inspect.getdoc(getattr(kind, name))
    if not doc:
        return [f"{name}() has no docstring"]
    if any(name in vars(base) for base in kind.__mro__[1:]):
        return []
    return [f"{name}({one}) is not described" for one in parameters(method) if not re.search(rf"\b{one}\b", doc)]


def own_doc(thing: Any) -> str:
    """The docstring that was written for this very thing, not one that dataclasses made or a base has."""
    doc = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""
    return "" if doc.startswith(f"{thing.__name__}(") else inspect.cleandoc(doc)


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls", "args")]


def arguments(thing: Any) -> list[str]:
    """Names of the arguments of a function, or of a class whose construction is its own."""
    if not inspect.isclass(thing):
        return parameters(thing)
    if is_config(thing):
        return [name for name in parameters(thing) if name not in inspect.signature(PreTrainedConfig).parameters]
    if dataclasses.is_dataclass(thing) or "__init__" in vars(thing):
        return parameters(thing)
    return []


def is_config(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, PreTrainedConfig)


def helped(thing: Any) -> set[str]:
    """Fields that say themselves what they are, which the command line and the reference show."""
    if is_config(thing) or not dataclasses.is_dataclass(thing):
        return set()
    return {field.name for field in dataclasses.fields(thing) if field.metadata.get("help")}


def described(doc: str, title: str) -> set[str]:
    """The names that a section of a docstring describes."""
    section = re.search(rf"^{title}:\n((?:[ ]{{4}}.*\n?|\n)*)", doc, re.MULTILINE)
    heads = re.findall(r"^ {4}(\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return {name for head in heads for name in head.split(", ")}


def described_function(one: int, *, two: int = 0) -> int:
    """A sum.

    Args:
        one, two: numbers.

    Returns:
        The sum.

    Example:
        >>> described_function(1, two=2)
        3
    """
    return one + two


@pytest.mark.parametrize(
    ("removed", "instead", "fault"),
    [
        ("one, two:", "one:", "two is not described"),
        ("one, two:", "one, two, three:", "three is described but is no argument"),
        ("A sum.", "A sum", "the first line is no sentence"),
        ("Returns:", "", "no Returns"),
        (">>>", "", "no Example"),
    ],
)
def test_what_a_docstring_lacks_is_found(
    removed: str, instead: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert faults(described_function) == []
    monkeypatch.setattr(described_function, "__doc__", str(described_function.__doc__).replace(removed, instead))
    assert faults(described_function) == [fault]
