"""`klas-hf train`: fine-tuning with the settings of the recipes; an interrupted run is resumed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from klas_hf.cli.data import DataOptions, Material, load_material, load_model
from klas_hf.cli.output import OVERWRITE, check_output, is_main_process, save_model, say
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.files import remove_folder, understood, write_atomically
from klas_hf.options import filled, names

CHECKPOINTS = "checkpoints"
RECORD = "klas_hf_train.json"  # of a finished run: its options and settings


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Options of `klas-hf train`, beside the training settings."""

    folder: str = positional("the stitched model")
    output: str = field(metadata={"metavar": "FOLDER", "help": "where the trained model goes"})
    split: str = field(default="train", metadata={"help": "images to learn from"})
    teacher: str | None = field(default=None, metadata={"help": "model to distil from: Hub id or folder"})
    overwrite: bool = flag(OVERWRITE)


def run(options: TrainOptions, settings: Mapping[str, Any]) -> int:
    """Run `klas-hf train`; its exit status."""
    if Path(options.folder).absolute() == Path(options.output).absolute():
        raise ValueError(f"got {options.folder} as the model and as the output; expected another output")
    record = asdict(options) | {"settings": dict(settings)}
    record = {name: value for name, value in record.items() if name not in ("output", "overwrite")}
    if not options.overwrite and _finished(Path(options.output)) == json.loads(json.dumps(record)):
        say(f"{options.output} holds the model of this run, which is finished; nothing to do")
        return 0
    output = check_output(options.output, options.overwrite, resumable=CHECKPOINTS)

    from klas_hf.training.config import Augmentation, TrainingConfig
    from klas_hf.training.loop import train_stitches

    material = load_material(options, [options.folder], options.split)
    if material.image_moments is None:
        if of_images := sorted(names(Augmentation) & settings.keys()):
            raise ValueError(f"got the settings {of_images} for a language model; they are for images: leave them out")
    else:
        mean, std = material.image_moments
        settings = {"mean": list(mean), "std": list(std)} | dict(settings)
    config = filled(TrainingConfig, settings)
    model = load_model(options.folder)
    teacher = None if options.teacher is None else load_model(options.teacher)
    result = train_stitches(model, material.examples, config, teacher=teacher, output_dir=output / CHECKPOINTS)
    _finish(model, material, output, record)
    say(f"{result}. Saved in {output}")
    return 0


def _finished(output: Path) -> Any:
    """Options and settings of the run that left its model in this folder; None: there was none."""
    record = output / RECORD
    if not record.is_file():
        return None
    with understood(record, "what klas-hf train writes; add --overwrite to begin anew"):
        return json.loads(record.read_text(encoding="utf-8"))


def _finish(model: Any, material: Material, output: Path, record: Mapping[str, Any]) -> None:
    """Save the model, then the record of the run; what was kept for resuming has then done its work."""
    (output / RECORD).unlink(missing_ok=True)  # with --overwrite, of the model that goes
    save_model(model, material.processor, output)
    if is_main_process():
        write_atomically(output / RECORD, lambda path: path.write_text(json.dumps(record), encoding="utf-8"))
        if (output / CHECKPOINTS).is_dir():
            remove_folder(output / CHECKPOINTS)


def _settings() -> type:
    from klas_hf.training.config import TrainingConfig

    return TrainingConfig


COMMAND = Command(
    "Fine-tune a stitched model. The same command goes on with an interrupted run.",
    TrainOptions,
    run,
    settings=_settings,
)
