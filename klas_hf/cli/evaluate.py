"""`klas-hf evaluate`: loss on text or accuracy on images, with costs, of stitched models and anchors; rows as JSONL."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


from klas_hf.cli.data import DataOptions, load_material, load_model, place
from klas_hf.cli.output import check_writable, is_main_process, say, say_json
from klas_hf.cli.parsing import Command, flag, positional
from klas_hf.cli.usage import UsageOptions
from klas_hf.rows import ResultRow, RowFile, untuned_beside_tuned
from klas_hf.tables import format_table


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(UsageOptions, DataOptions):
    """Options of `klas-hf evaluate`."""

    folders: list[str] = positional("models, stitched or not: folders or Hub ids", metavar="FOLDER")
    split: str = field(default="validation", metadata={"help": "images to measure on"})
    rule: str = field(
        default="stitched", metadata={"metavar": "NAME", "help": "name of the stitched models' curve in the rows"}
    )
    rows: str | None = field(
        default=None, metadata={"metavar": "FILE", "help": "JSONL that rows are added to; those in it are not repeated"}
    )
    timed: bool = flag("also time the models, for `plot --cost latency`")
    json: bool = flag("print JSON")


def run(options: EvaluateOptions) -> int:
    """Run `klas-hf evaluate`; its exit status."""
    from klas_hf.anchors.classes import mapped_classes
    from klas_hf.anchors.vision import is_vision
    from klas_hf.evaluation import evaluate

    if options.rows is not None:
        check_writable(Path(options.rows).expanduser())
    rows = None if options.rows is None else RowFile(options.rows, _shared(options))
    # Images are decoded once for all models, which must process them alike; a text is cut by each model's tokenizer.
    images = load_material(options, options.folders, options.split) if is_vision(options.folders[-1]) else None
    anchors = _anchors(options.folders)
    done: list[ResultRow] = []
    for folder in options.folders:
        model = load_model(folder)
        row = _identity(options, folder, model, anchors)
        known = next((one for one in [*done, *(rows or [])] if _same(one, row)), None)
        if known is None:
            material = images or load_material(options, [folder], options.split)
            among = mapped_classes(material.batches, model.config.num_labels)
            measured = evaluate(model, material.batches, classes=among)
            known = replace(row, metrics=measured.metrics, details={**row.details, **measured.details})
            if rows is not None:
                rows.append(known, to_disk=is_main_process())
        done.append(known)
    if options.json:
        say_json([asdict(row) for row in done])
    else:
        say(format_table(done, list(done[0].metrics)) + _fair(done, options))
    return 0


def _shared(options: EvaluateOptions) -> dict[str, Any]:
    """What all rows of a file have in common."""
    names = ("data", "split", "length", "samples", "labels")
    timed = ("prompt", "at_once", "weight_bits") if options.timed else ()
    return {"command": "evaluate"} | {name: getattr(options, name) for name in (*names, *timed)}


def _anchors(folders: list[str]) -> dict[str, tuple[str, str]]:
    """Anchor → its rule, "source" or "target", and its path, of all stitched models among the folders."""
    from klas_hf.anchors.language import anchor_config
    from klas_hf.models import StitchedConfig, StitchedVisionConfig

    roles: dict[str, tuple[str, str]] = {}
    for config in map(anchor_config, folders):
        if isinstance(config, StitchedConfig | StitchedVisionConfig):
            names = config.anchor_names or []
            rules = ["source", *(f"anchor {place}" for place in range(1, len(names) - 1)), "target"]
            roles |= {place(name): (rule, f"{k}[:]") for k, (name, rule) in enumerate(zip(names, rules, strict=False))}
    return roles


def _identity(
    options: EvaluateOptions, folder: str, model: "PreTrainedModel", anchors: dict[str, tuple[str, str]]
) -> ResultRow:
    """The row of a model, still without metrics.

    A stitched model stands under the options' rule; its anchors as source and target; another model under its name.
    """
    from klas_hf.anchors.weights import fingerprint
    from klas_hf.costs import measure_costs
    from klas_hf.models import StitchedConfig, StitchedVisionConfig

    cost = measure_costs(model, tokens=options.length, usage=options.usage() if options.timed else None)
    rule, path = anchors.get(place(folder), (Path(folder).name, None))
    if isinstance(model.config, StitchedConfig | StitchedVisionConfig):
        rule, path = options.rule, model.config.path
    training, seed = _training(model.config.to_dict().get("training"))
    return ResultRow(
        rule, path, seed, cost.macs, cost.parameters, {},
        {"folder": folder, "kv_bytes_per_token": cost.kv_bytes_per_token} | cost.details,
        training=training, made_from=[fingerprint(model)],
    )  # fmt: skip


def _training(record: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, int]:
    """What was done to a model, without what came out of it, such as losses; and its seed, which other runs vary."""
    if record is None:
        return None, 0
    kept = {name: value for name, value in record.items() if not name.endswith("_loss")}
    if kept.get("before"):
        kept["before"], _ = _training(kept["before"])
    settings = dict(kept.get("settings") or {})
    seed = settings.pop("seed", 0)
    return kept | {"settings": settings}, seed


def _same(one: ResultRow, other: ResultRow) -> bool:
    """Whether two rows are of one model and rule."""
    return (one.rule, one.measurement) == (other.rule, other.measurement)


def _fair(rows: list[ResultRow], options: EvaluateOptions) -> str:
    """What to do about anchors that were not fine-tuned beside models that were; empty where all are alike."""
    folders = [row.details["folder"] for row in untuned_beside_tuned(rows)]
    commands = [f"  klas-hf train {one} --data {options.data} --output {Path(one).name}-tuned" for one in folders]
    if not commands:
        return ""
    return (
        "\nNot a fair comparison: models above were fine-tuned, anchors were not. Fine-tune these the same way, with "
        "the settings and data of the others, and evaluate what comes out beside them:\n" + "\n".join(commands)
    )


COMMAND = Command("Measure models: loss on text (nats per token), accuracy on images, and costs.", EvaluateOptions, run)
