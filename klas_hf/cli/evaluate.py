"""`klas-hf evaluate`: loss on text or accuracy on images, with costs, of stitched models and anchors; rows as JSONL."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from klas_hf.anchors.language import anchor_config
from klas_hf.anchors.vision import is_vision
from klas_hf.anchors.weights import fingerprint
from klas_hf.cli.data import DataOptions, load_material, load_model
from klas_hf.cli.output import say, say_json
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.costs import measure_costs
from klas_hf.evaluation import evaluate
from klas_hf.models import StitchedConfig, StitchedVisionConfig
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile, format_table


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """Options of `klas-hf evaluate`."""

    folders: list[str] = positional("models, stitched or not: folders or Hub ids", metavar="FOLDER")
    split: str = field(default="validation", metadata={"help": "images to measure on"})
    rule: str = field(
        default="stitched", metadata={"metavar": "NAME", "help": "name of the stitched models' curve in the rows"}
    )
    rows: str | None = field(
        default=None, metadata={"metavar": "FILE", "help": "JSONL that rows are added to; those in it are not repeated"}
    )
    json: bool = flag("print JSON")


def run(options: EvaluateOptions) -> int:
    rows = None if options.rows is None else RowFile(options.rows, _shared(options))
    # Images are decoded once for all models, which must process them alike; a text is cut by each model's tokenizer.
    images = load_material(options, options.folders, options.split) if is_vision(options.folders[-1]) else None
    anchors = _anchors(options.folders)
    done: list[ResultRow] = []
    for folder in options.folders:
        model = load_model(folder)
        row = _identity(options, folder, model, anchors)
        known = _known([*done, *(rows or [])], row)
        if known is None:
            material = images or load_material(options, [folder], options.split)
            measured = evaluate(model, material.batches)
            known = replace(row, metrics=measured.metrics, details={**row.details, **measured.details})
            if rows is not None:
                rows.append(known, to_disk=process_state().is_main_process)
        done.append(known)
    if options.json:
        say_json([asdict(row) for row in done])
    else:
        say(format_table(done, list(done[0].metrics)))
    return 0


def _shared(options: EvaluateOptions) -> dict[str, Any]:
    """What all rows of a file have in common."""
    names = ("data", "split", "length", "samples", "labels")
    return {"command": "evaluate"} | {name: getattr(options, name) for name in names}


def _anchors(folders: list[str]) -> dict[str, str]:
    """Anchor → "source" or "target", of all stitched models among the folders."""
    roles: dict[str, str] = {}
    for config in map(anchor_config, folders):
        if isinstance(config, StitchedConfig | StitchedVisionConfig):
            roles |= {_place(config.source_name): "source", _place(config.target_name): "target"}
    return roles


def _place(name: str | None) -> str:
    """A folder by its whole path, a Hub id as it is."""
    return str(Path(name).resolve()) if name and Path(name).exists() else str(name)


def _identity(options: EvaluateOptions, folder: str, model: PreTrainedModel, anchors: dict[str, str]) -> ResultRow:
    """The row of a model, still without metrics.

    A stitched model stands under the options' rule; its anchors as source and target; another model under its name.
    """
    cost = measure_costs(model, tokens=options.length)
    details = {"folder": folder, "fingerprint": fingerprint(model), "kv_bytes_per_token": cost.kv_bytes_per_token}
    rule, stitch = anchors.get(_place(folder), Path(folder).name), None
    if isinstance(model.config, StitchedConfig | StitchedVisionConfig):
        rule, stitch = options.rule, (model.config.source_stop, model.config.target_start)
    return ResultRow(rule, stitch, 0, cost.macs, cost.parameters, {}, details)


def _known(rows: Iterable[ResultRow], row: ResultRow) -> ResultRow | None:
    """The same model's row, if it is there.

    Raises:
        ValueError: another model's row is there under the same rule and stitch.
    """
    found = next((one for one in rows if one.key == row.key), None)
    if found is not None and found.details["fingerprint"] != row.details["fingerprint"]:
        what = "no stitch" if row.stitch is None else f"the stitch {row.stitch}"
        raise ValueError(
            f"got {row.details['folder']}, but {found.details['folder']}, of other weights, already has the row of the "
            f"rule {row.rule!r} with {what}; expected one model for each. Measure this one apart with --rule, or into "
            "another file"
        )
    return found


COMMAND = Command("Measure models: loss on text (nats per token), accuracy on images, and costs.", EvaluateOptions, run)
