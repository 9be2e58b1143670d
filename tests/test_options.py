"""Options of recipes: YAML first, the command line over it, both typed alike, errors that name the known options."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from klas_hf.options import parse_options


@dataclass(frozen=True)
class Blur:
    radius: float = field(default=0.0, metadata={"help": "pixels"})
    range: tuple[float, float] | None = field(default=None, metadata={"help": "two"})


@dataclass
class Options:
    source: str = field(metadata={"help": "required"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "several"})
    data: str | None = field(default=None, metadata={"help": "optional"})
    steps: int | None = field(default=300, metadata={"help": "optional"})
    rules: list[str] = field(default_factory=lambda: ["klas"], metadata={"help": "several"})
    shares: list[float] | None = field(default=None, metadata={"help": "several or none"})
    precision: str = field(default="bf16", metadata={"help": "'no' or 'bf16'"})
    way: Literal["up", "down"] = field(default="up", metadata={"help": "a choice"})
    rate: float = field(default=0.1, metadata={"help": "number"})
    smoke: bool = field(default=False, metadata={"help": "flag"})
    blur: Blur | None = field(default=None, metadata={"help": "in it"})

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"got rate={self.rate}; expected 0 or more")


def read(tmp_path: Path, text: str, *argv: str) -> Options:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    (options,) = parse_options(Options, argv=["--config", str(path), *argv])
    return options


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    from klas_hf import TrainingConfig

    path = tmp_path / "run.yaml"
    path.write_text("source: small\nseeds: [1, 2]\nlearning_rate: 1.0e-3\ntrainable: full\n")
    options, training = parse_options(Options, TrainingConfig, argv=["--config", str(path), "--seeds", "5", "6"])
    assert options == Options("small", [5, 6])
    assert (training.learning_rate, training.trainable, training.epochs) == (1e-3, "full", TrainingConfig().epochs)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("precision: no", {"precision": "no"}),
        ("precision: 'no'", {"precision": "no"}),
        ("seeds: 0", {"seeds": [0]}),
        ("seeds: [3, 4]", {"seeds": [3, 4]}),
        ("rules: cka", {"rules": ["cka"]}),
        ("shares: [8e-2, 1.0]", {"shares": [0.08, 1.0]}),
        ("shares: [1, 2]", {"shares": [1.0, 2.0]}),
        ("shares: null", {"shares": None}),
        ("steps: null", {"steps": None}),
        ("steps:", {"steps": None}),
        ("rate: 1e-4", {"rate": 1e-4}),
        ("rate: 1", {"rate": 1.0}),
        ("data: 1", {"data": "1"}),
        ("data: null", {"data": None}),
        ("way: down", {"way": "down"}),
        ("smoke: true", {"smoke": True}),
        ("smoke: false", {"smoke": False}),
        ("radius: 2", {"blur": Blur(2.0)}),
        ("range: [0, 1]", {"blur": Blur(0.0, (0.0, 1.0))}),
        ("blur: {radius: 2}", {"blur": Blur(2.0)}),
        ("blur: null", {"blur": None}),
    ],
)
def test_values_of_a_file_are_typed(tmp_path: Path, line: str, expected: dict) -> None:
    found = read(tmp_path, f"source: small\n{line}\n")
    assert found == Options("small", **expected)
    (name, value), *_ = expected.items()
    assert type(getattr(found, name)) is type(value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--smoke"], {"smoke": True}),
        (["--smoke", "True"], {"smoke": True}),
        (["--smoke", "--rules", "a", "b"], {"smoke": True, "rules": ["a", "b"]}),
        (["--steps", "null"], {"steps": None}),
        (["--rate=-0.0"], {"rate": 0.0}),
        (["--radius", "2", "--range", "0", "1"], {"blur": Blur(2.0, (0.0, 1.0))}),
    ],
)
def test_words_are_typed(words: list[str], expected: dict) -> None:
    assert parse_options(Options, argv=["--source", "small", *words]) == (Options("small", **expected),)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("sauce: small", [], r"['sauce']"),
        ("sauce: small", [], "radius, range, rate, rules, seeds, shares, smoke, source"),
        ("seeds: [a]", [], "run.yaml"),
        ("steps: no", [], "steps"),
        ("way: left", [], "'up', 'down'"),
        ("smoke: perhaps", [], "smoke"),
        ("- 1", [], "with a list; expected a mapping"),
        ("blur: {radios: 2}", [], r"['radios']"),
        ("a: [", [], "which is not YAML"),
        ("rate: -1\nsource: a", [], "got rate=-1.0; expected 0 or more"),
        ("rate: 1", ["--rte", "2"], "--rte"),
        ("rate: 1", ["--seeds", "x"], "seeds"),
        ("rate: 1", [], "got no --source; expected required"),
    ],
)
def test_typos_end_in_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, words: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as end:
        read(tmp_path, text, *words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and expected in error and "Traceback" not in error
    assert len(error.splitlines()) < 15


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_options(Options, argv=["--config=nothing.yaml"])
    assert "nothing.yaml" in capsys.readouterr().err


def test_help_shows_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(Options, argv=["--help"], description="What it does.")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "What it does." in shown
    assert "optional (default: 300)" in shown and "several (default: 0)" in shown and "--radius" in shown


def test_the_papers_settings_parse() -> None:
    from klas_hf import TrainingConfig

    recipe = Path(__file__).parents[1] / "recipes" / "truthfulqa.py"
    spec = importlib.util.spec_from_file_location("truthfulqa_recipe", recipe)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = ["--config", str(recipe.with_suffix(".yaml"))]
    args, training = parse_options(module.TruthfulQAArguments, TrainingConfig, argv=argv)
    assert (args.source, args.target) == ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct")
    assert training.per_device_batch_size * training.gradient_accumulation_steps == 64
    assert (training.epochs, training.warmup_ratio, args.max_length) == (10, 0.1, 128)
