"""Options of recipes: YAML first, the command line over it, errors that name the known options."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from klas_hf import TrainingConfig
from klas_hf.options import parse_options


@dataclass
class Options:
    source: str = field(metadata={"help": "required"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "several"})
    data: str | None = field(default=None, metadata={"help": "optional"})


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("source: small\nseeds: [1, 2]\nlearning_rate: 1.0e-3\ntrainable: full\n")
    options, training = parse_options(Options, TrainingConfig, argv=["--config", str(path), "--seeds", "5", "6"])
    assert options == Options("small", [5, 6])
    assert (training.learning_rate, training.trainable, training.epochs) == (1e-3, "full", TrainingConfig().epochs)


def test_unknown_keys_and_missing_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sauce: small\n")
    with pytest.raises(ValueError, match=r"\['sauce'\].*'source'"):
        parse_options(Options, argv=[f"--config={path}"])
    with pytest.raises(SystemExit):
        parse_options(Options, argv=[])
    assert "--source" in capsys.readouterr().err


def test_the_papers_settings_parse() -> None:
    import importlib.util

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
