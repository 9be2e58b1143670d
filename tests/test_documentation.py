"""Docs of every public name: what it is, each argument, what comes back, what is raised, and an example that runs.

`python tests/test_documentation.py --write` writes docs/reference.md anew from the docstrings.
"""

import copy
import dataclasses
import doctest
import functools
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, ViTConfig, ViTForImageClassification

import klas_hf
from klas_hf import ResultRow, StitchScores, measure_stitch_costs
from klas_hf.rows import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Modules whose names are used through them: everything that they define without an underscore.
MODULES = ("cascades", "curve_comparison")

# Functions that refuse nothing.
HARMLESS = ("format_sweep", "to_rows")


def documented() -> dict[str, Any]:
    """Name → what is documented."""
    found = {name: getattr(klas_hf, name) for name in sorted(klas_hf.__all__)}
    for short in MODULES:
        module = import_module(f"klas_hf.{short}")
        own = {
            name: thing for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__
        }
        found |= {f"{short}.{name}": own[name] for name in sorted(own) if name[0] != "_"}
    return found


THINGS = documented()

# Where a name stands in docs/reference.md, by the longest module that its own begins with.
STEPS = {
    "Anchors": ("klas_hf.selection.anchors", "klas_hf.selection.anchor_distances", "klas_hf.cli"),
    "Stitches and costs": ("klas_hf.paths", "klas_hf.costs"),
    "Probes": ("klas_hf.probes",),
    "Scores": ("klas_hf.scores",),
    "Selection": (
        "klas_hf.selection.choice",
        "klas_hf.selection.klas",
        "klas_hf.selection.rivals",
        "klas_hf.selection.snnet",
    ),
    "Stitching": ("klas_hf.models", "klas_hf.stitching"),
    "Training": ("klas_hf.training", "klas_hf.errors"),
    "Evaluation": ("klas_hf.evaluation", "klas_hf.rows"),
    "Curves": (
        "klas_hf.curves.tradeoff",
        "experiments.curve_comparison",
        "klas_hf.curves.cascades",
        "experiments.regret",
    ),
    "Hub": ("klas_hf.hub",),
}

# What the examples may use beside the public names; each is made anew for every example.
GIVEN = {
    "source, target": "random Llamas of 3 and 4 blocks, 16 and 24 wide, with a vocabulary of 64",
    "batches": "four batches of random token ids: `input_ids`, `attention_mask` and `labels`, each `(4, 16)`",
    "examples": "eight examples to train on: lists `input_ids` and `labels` of 16 tokens",
    "small, large": "random ViTs of 3 and 4 blocks, 16 and 24 wide, for images of 16×16 pixels and 3 classes",
    "images": "five batches of random images: `pixel_values` `(4, 3, 16, 16)` and `labels` `(4,)`",
    "pictures": "eight such images to train on: a data set of `(pixels, label)` with all `labels`",
    "scores, costs": "`StitchScores` and `StitchCosts` of all stitches between `source` and `target`, made up",
    "rows": "a `ResultRow` of each such stitch and of both anchors, cheapest first, the `loss` made up",
    "folder": "an empty folder, a `pathlib.Path`",
    "np, torch": "NumPy and PyTorch",
}


@pytest.mark.parametrize("name", THINGS)
def test_a_public_name_is_described_with_arguments_results_errors_and_an_example(name: str) -> None:
    assert not (wrong := faults(THINGS[name])), "\n".join(wrong)


@pytest.mark.parametrize("name", THINGS)
def test_the_examples_of_a_public_name_run(name: str) -> None:
    ran = 0
    for example in doctest.DocTestFinder().find(THINGS[name], name, module=False):
        with namespace() as given:
            example.globs = given
            report: list[str] = []
            result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
        assert not result.failed, "".join(report)
        ran += sum(not one.options.get(doctest.SKIP, False) for one in example.examples)
    assert ran, f"{name} has no example that runs"


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tests/test_documentation.py --write"


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
        titles = ["Returns"] * returns + ["Raises"] * (thing.__name__ not in HARMLESS)
        return wrong + [f"no {title}" for title in titles if f"\n{title}:\n" not in doc]
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
    """Fields that say themselves what they are, which the command line and docs/reference.md show."""
    if is_config(thing) or not dataclasses.is_dataclass(thing):
        return set()
    return {field.name for field in dataclasses.fields(thing) if field.metadata.get("help")}


def described(doc: str, title: str) -> set[str]:
    """The names that a section of a docstring describes."""
    section = re.search(rf"^{title}:\n((?:[ ]{{4}}.*\n?|\n)*)", doc, re.MULTILINE)
    heads = re.findall(r"^ {4}(\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return {name for head in heads for name in head.split(", ")}


@dataclasses.dataclass(frozen=True)
class Described:
    """A value.

    Attributes:
        one: a number.

    Example:
        >>> Described(one=1, two=2).two
        2
    """

    one: int
    two: int = dataclasses.field(default=0, metadata={"help": "another number"})

    def plus(self, other: int) -> int:
        """The sum with `other`."""
        return self.one + other


def described_function(one: int, *, two: int = 0) -> int:
    """A sum.

    Args:
        one, two: numbers.

    Returns:
        The sum.

    Raises:
        TypeError: no numbers.

    Example:
        >>> described_function(1, two=2)
        3
    """
    return one + two


@pytest.mark.parametrize(
    ("thing", "removed", "instead", "fault"),
    [
        (Described, "one: a number", "", "one is not described"),
        (Described, "Example:", "", "no Example"),
        (Described, "A value.", "A value", "the first line is no sentence"),
        (Described.plus, "The sum with `other`.", "", "plus() has no docstring"),
        (Described.plus, "`other`", "another", "plus(other) is not described"),
        (described_function, "one, two:", "one:", "two is not described"),
        (described_function, "one, two:", "one, two, three:", "three is described but is no argument"),
        (described_function, "Returns:", "", "no Returns"),
        (described_function, "Raises:", "", "no Raises"),
        (described_function, ">>>", "", "no Example"),
    ],
)
def test_what_a_docstring_lacks_is_found(
    thing: Any, removed: str, instead: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Described if thing is Described.plus else thing
    assert faults(whole) == []
    monkeypatch.setattr(thing, "__doc__", thing.__doc__.replace(removed, instead))
    assert faults(whole) == [fault]


# --- what the examples may use ---


class Pictures:
    """Random images with labels, as `train_stitches` wants them."""

    def __init__(self, images: list[dict[str, torch.Tensor]]):
        self.pixels = torch.cat([batch["pixel_values"] for batch in images])
        self.labels = torch.cat([batch["labels"] for batch in images]).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.pixels[index], self.labels[index]


@functools.cache
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "intermediate_size": 32}
    words = {**sizes, "vocab_size": 64, "num_key_value_heads": 1, "eos_token_id": None}
    pixels = {**sizes, "image_size": 16, "patch_size": 8, "num_labels": 3}
    return {
        "source": LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=3, **words)).eval(),
        "target": LlamaForCausalLM(LlamaConfig(hidden_size=24, num_hidden_layers=4, **words)).eval(),
        "small": ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=3, **pixels)).eval(),
        "large": ViTForImageClassification(ViTConfig(hidden_size=24, num_hidden_layers=4, **pixels)).eval(),
    }


def data() -> dict[str, Any]:
    torch.manual_seed(1)
    batches = []
    for _ in range(4):
        ids = torch.randint(3, 64, (4, 16))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    images = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 3, (4,))} for _ in range(5)]
    lines = [line for batch in batches[:2] for line in batch["input_ids"].tolist()]
    return {
        "batches": batches,
        "examples": [{"input_ids": line, "labels": line} for line in lines],
        "images": images,
        "pictures": Pictures(images[:2]),
    }


def results(source: Any, target: Any) -> dict[str, Any]:
    """Scores, costs and rows of made-up figures: Θ grows with the distance in depth, the loss falls with cost."""
    costs = measure_stitch_costs(source, target)
    m, n = costs.macs.shape
    cross = 0.1 + np.abs(np.arange(1, m + 1)[:, None] / m - np.arange(1, n + 1) / n)
    capacity = np.linspace(0.2, 0.4, n - 1)
    errors = cross / 10, capacity / 10, cross[:, :-1] / capacity / 10
    scores = StitchScores("klas", cross, capacity, *errors, sequences=16, tokens=256, costs=costs)
    measured = [ResultRow("source", None, 0, costs.source_total, 4000, {"loss": 4.0})]
    for stitch in scores.stitches:
        macs, size = costs.of(stitch)
        loss = 4.0 - macs / costs.target_total + scores.value_of(stitch) / 10
        measured.append(ResultRow("all", (stitch.source_stop, stitch.target_start), 0, macs, size, {"loss": loss}))
    measured.append(ResultRow("target", None, 0, costs.target_total, 9000, {"loss": 3.0}))
    return {"scores": scores, "costs": costs, "rows": sorted(measured, key=lambda row: row.macs)}


@contextmanager
def namespace() -> Iterator[dict[str, Any]]:
    """The names that an example may use; its folder is removed afterwards."""
    made = copy.deepcopy(models())
    made |= data() | results(made["source"], made["target"])
    torch.manual_seed(2)
    public = {name.rpartition(".")[2]: thing for name, thing in THINGS.items()}
    with tempfile.TemporaryDirectory() as folder:
        yield public | made | {"folder": Path(folder), "np": np, "torch": torch}


def test_the_examples_are_given_what_the_reference_page_says() -> None:
    with namespace() as given:
        made = set(given) - {name.rpartition(".")[2] for name in THINGS}
    assert made == {name for names in GIVEN for name in names.split(", ")}


# --- docs/reference.md ---

HEAD = """# Reference

Every public name of `klas_hf` in the order of a study, with the first line of its docstring; `help(klas_hf.NAME)` gives
arguments, shapes, units, errors and an example. This page is written by `python tests/test_documentation.py --write`.
"""


def reference() -> str:
    sections = [HEAD]
    for step, names in by_step().items():
        lines = [["name", "what it is"]]
        lines += [[f"`{name}`", own_doc(THINGS[name]).splitlines()[0]] for name in names]
        sections.append(f"## {step}\n\n{markdown_table(lines)}\n")
    sections += [f"## Settings of `{name}`\n\n{settings(name)}\n" for name in THINGS if settings(name)]
    given = [["name", "what it is"], *([names_of(key), text] for key, text in GIVEN.items())]
    sections.append(
        "## What the examples use\n\nThe examples in the docstrings run in the tests, with the public names and these:"
        f"\n\n{markdown_table(given)}\n"
    )
    return "\n".join(sections)


def by_step() -> dict[str, list[str]]:
    """Public names by the step of a study; a module that no step has is an error."""
    places = {module: step for step, modules in STEPS.items() for module in modules}
    found: dict[str, list[str]] = {step: [] for step in STEPS}
    for name in THINGS:
        module = THINGS[name].__module__
        known = [place for place in places if f"{module}.".startswith(f"{place}.")]
        assert known, f"{name} is of {module}, which STEPS does not place"
        found[places[max(known, key=len)]].append(name)
    return {step: names for step, names in found.items() if names}


def settings(name: str) -> str:
    """The fields of a class that describe themselves, as a table; nothing for other names."""
    thing = THINGS[name]
    lines = [
        [f"`{field.name}`", f"`{default_of(field)!r}`", field.metadata["help"].replace("|", "\\|")]
        for field in (dataclasses.fields(thing) if helped(thing) else ())
    ]
    return markdown_table([["field", "default", "what it is"], *lines]) if lines else ""


def default_of(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def names_of(key: str) -> str:
    return ", ".join(f"`{name}`" for name in key.split(", "))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_documentation.py --write")
    PAGE.write_text(reference(), encoding="utf-8")
