"""`klas-hf train`: fine-tuning with the settings of the recipes; an interrupted run is resumed."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from klas_hf.anchors.vision import is_vision
from klas_hf.cli.data import DataOptions, Material, load_material, load_model
from klas_hf.cli.output import OVERWRITE, check_output, save_model, say
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.processes import process_state
from klas_hf.training import ImageTrainingConfig, TrainingConfig, train_stitches

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Options of `klas-hf train`, beside the training settings."""

    folder: str = positional("the stitched model")
    output: str = field(metadata={"metavar": "FOLDER", "help": "where the trained model goes"})
    split: str = field(default="train", metadata={"help": "images to learn from"})
    teacher: str | None = field(default=None, metadata={"help": "model to distil from: Hub id or folder"})
    overwrite: bool = flag(OVERWRITE)


def run(options: TrainOptions, settings: Mapping[str, Any]) -> int:
    if Path(options.folder).absolute() == Path(options.output).absolute():
        raise ValueError(f"got {options.folder} as the model and as the output; expected another output")
    config = training_config(is_vision(options.folder), settings)
    output = check_output(options.output, options.overwrite, resumable=CHECKPOINTS)
    material = load_material(options, [options.folder], options.split)
    if material.image_moments is not None and isinstance(config, ImageTrainingConfig):
        mean, std = material.image_moments
        config = ImageTrainingConfig(**{"mean": list(mean), "std": list(std)} | dict(settings))
    model = load_model(options.folder)
    teacher = None if options.teacher is None else load_model(options.teacher)
    result = train_stitches(model, material.examples, config, teacher=teacher, output_dir=output / CHECKPOINTS)
    _finish(model, material, output)
    say(f"{result.steps} steps, loss {result.losses[0]:.4f} → {result.losses[-1]:.4f}. Saved in {output}")
    return 0


def training_config(vision: bool, settings: Mapping[str, Any]) -> TrainingConfig | ImageTrainingConfig:
    """The settings of this kind of model.

    Raises:
        ValueError: settings of the other kind, or wrong values.
    """
    kind = ImageTrainingConfig if vision else TrainingConfig
    known = {one.name for one in fields(kind)}
    if foreign := sorted(settings.keys() - known):
        what = "an image classifier" if vision else "a language model"
        raise ValueError(f"got the settings {foreign} for {what}; expected some of {sorted(known)}")
    return kind(**settings)


def _finish(model: Any, material: Material, output: Path) -> None:
    """Save the model; what was kept for resuming has then done its work."""
    save_model(model, material.processor, output)
    if process_state().is_main_process:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


COMMAND = Command(
    "Fine-tune a stitched model. The same command goes on with an interrupted run.",
    TrainOptions,
    run,
    settings=(ImageTrainingConfig, TrainingConfig),
)
