"""The steps of `klas-hf make`: each reads what the one before it left in the folder, and leaves its own."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from klas_hf.cli.data import DataOptions, Material, load_material, load_model
from klas_hf.cli.output import OVERWRITE, is_main_process, save_model
from klas_hf.cli.parsing import flag, positional
from klas_hf.cli.usage import UsageOptions
from klas_hf.rows import ResultRow, RowFile

if TYPE_CHECKING:
    from klas_hf.budgets import Budget
    from klas_hf.scores.path_scores import PathScores

WORK = "making"  # what is only there to go on with
SEARCHED = 256  # sequences or images, spread over the data
HELD_OUT = 10  # every tenth sequence of a text is measured on and never learnt from


@dataclass(frozen=True, kw_only=True)
class MakeOptions(UsageOptions, DataOptions):
    """Options of `klas-hf make`."""

    anchors: list[str] = positional("one or more anchors: Hub ids or folders", metavar="ANCHOR")
    budget: str = field(
        metadata={
            "metavar": "SIZE",
            "help": "60%% (of MACs), 2B, 4GB, 20ms, or '4GB, 20ms'",
        }
    )
    output: str = field(metadata={"metavar": "FOLDER", "help": "where the model goes, with its card and rows.jsonl"})
    steps: int = field(default=300, metadata={"metavar": "N", "help": "of healing; 0: none"})
    contenders: int = field(default=4, metadata={"metavar": "N", "help": "paths to heal; the best is kept"})
    batch_size: int = field(default=8, metadata={"metavar": "N", "help": "sequences or images at once"})
    split: str = field(default="train", metadata={"help": "images to search on and to learn from"})
    test_split: str = field(default="validation", metadata={"metavar": "SPLIT", "help": "images to measure on"})
    dry_run: bool = flag("say what would be read, run and searched; load nothing")
    overwrite: bool = flag(OVERWRITE)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 0), ("contenders", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"got {name}={getattr(self, name)}; expected {least} or more")


@dataclass(frozen=True)
class MakeData:
    """Examples to learn from, and batches to search, to calibrate and to measure on."""

    material: Material
    searched: Any
    calibration: Any
    examples: Any
    held_out: Any


def read_data(options: MakeOptions) -> MakeData:
    """Read the data; of a text, every tenth sequence is held out.

    Raises:
        ValueError: a text too short to hold some out.
    """
    from klas_hf.data.text import TextBatches

    material = load_material(options, options.anchors, options.split)
    if material.image_moments is not None:
        held_out = load_material(options, options.anchors, options.test_split).batches
        return MakeData(material, material.batches, material.batches, material.examples, held_out)
    sequences = [example["input_ids"] for example in material.examples]
    held = sequences[HELD_OUT - 1 :: HELD_OUT]
    kept = [one for number, one in enumerate(sequences) if number % HELD_OUT != HELD_OUT - 1]
    if len(kept) < 2 * HELD_OUT:
        raise ValueError(
            f"got {options.data} with {len(sequences)} sequences of {options.length} tokens; expected at least "
            f"{3 * HELD_OUT}, of which some are held out. Give more text, or a smaller --length"
        )
    learnt = TextBatches(kept, options.batch_size)
    searched = TextBatches(kept, options.batch_size, count=SEARCHED)
    return MakeData(material, searched, learnt, learnt.examples, TextBatches(held, options.batch_size))


def searched(options: MakeOptions, budget: "Budget", data: MakeData, output: Path) -> "PathScores":
    """The paths that were found, now or before."""
    from klas_hf.scores.path_scores import PathScores
    from klas_hf.selection.search import search_paths

    file = output / "paths.safetensors"
    if file.exists():
        return PathScores.load(file)
    anchors = [load_model(anchor) for anchor in options.anchors]
    found = search_paths(
        anchors, data.searched, tokens=options.length, usage=options.usage(budget), budget=budget,
        output=output / WORK / "search.jsonl",
    )  # fmt: skip
    if is_main_process():
        found.save(file)
    return found


def healed(
    options: MakeOptions, budget: "Budget", reference: int, found: "PathScores", data: MakeData, output: Path
) -> str:
    """Make the best path within the budget and heal it, or the best of several; save it; tells what healing did."""
    from klas_hf.paths import Path as AnchorPath
    from klas_hf.processes import process_state
    from klas_hf.stitching.assembly import assemble_best
    from klas_hf.training import heal_best, healing_config

    assembly: dict[str, Any] = {} if options.image_size is None else {"image_size": options.image_size}
    assembly |= {"calibration": data.calibration, "device_map": {"": process_state().device}}
    if not options.steps or found.best(budget) == AnchorPath.parse(f"{reference}[:]"):  # itself: nothing to learn
        model, told = assemble_best(options.anchors, found, budget, **assembly), "not healed"
    else:
        settings: dict[str, Any] = {"per_device_batch_size": options.batch_size}
        if data.material.image_moments is not None:
            settings |= dict(zip(("mean", "std"), map(list, data.material.image_moments), strict=True))
        contest = heal_best(
            options.anchors, found, budget, data.examples, contenders=options.contenders,
            teacher=load_model(options.anchors[reference]), config=healing_config(options.steps, **settings),
            output_dir=output / WORK / "checkpoints", **assembly,
        )  # fmt: skip
        model, healing = contest.model, contest.healing
        told = (
            f"healed in {healing.training.steps:,} steps at the rate {healing.learning_rate:.2g}, "
            f"{healing.distillation_weight:.0%} of the loss distilled, validation loss {healing.start:.4f} → "
            f"{healing.end:.4f}, the best of {len(contest.contenders)}"
        )
    save_model(model, data.material.processor, output)
    return told


def measured(
    options: MakeOptions, budget: "Budget", reference: int, found: "PathScores", data: MakeData, output: Path
) -> list[ResultRow]:
    """Rows of the anchors and, last, of the model, on what was held out."""
    from klas_hf.anchors.classes import mapped_classes
    from klas_hf.evaluation import Measurement, evaluate, evaluate_anchor, evaluate_stitches

    usage = options.usage(budget)

    def measure(model: Any) -> Measurement:
        found = evaluate(model, data.held_out, classes=mapped_classes(data.held_out, model.config.num_labels))
        if usage is not None:
            return found
        size = model.num_parameters() * model.dtype.itemsize  # which a usage counts
        return replace(found, details={**found.details, "weight_bytes": size})

    shared = {"data": options.data, "split": options.test_split, "samples": options.samples, "labels": options.labels}
    run = {"command": "make", "cost": budget.cost} | shared
    file, count = RowFile(output / "rows.jsonl", run), len(options.anchors)
    about: dict[str, Any] = {"rows": file, "tokens": options.length, "usage": usage}
    rows = []
    for place, anchor in enumerate(options.anchors):
        rule = "target" if place == reference else "source" if count == 2 else f"anchor {place}"
        rows.append(
            evaluate_anchor(
                load_model(anchor), measure, rule=rule, position=place, image_size=options.image_size, **about
            )
        )
    model = load_model(str(output))
    return rows + evaluate_stitches(
        [model.config.path], lambda _: model, measure, rule="made", training=model.config.training,
        anchors=found.provenance["anchors"], **about,
    )  # fmt: skip


def described(options: MakeOptions, budget: "Budget", rows: list[ResultRow], found: "PathScores", output: Path) -> None:
    """Pictures and card, over what the budget names; without a card, where licences do not allow it, the rest stays."""
    from klas_hf.hub import model_card
    from klas_hf.hub.folder import draw_picture
    from klas_hf.hub.subjects import describe

    if not is_main_process():
        return
    model = load_model(str(output))
    found.plot(output / "paths", over=budget.cost)
    draw_picture(output, model, describe(model), rows, None, budget.cost)
    try:
        card = model_card(model, output.name, rows=rows, cost=budget.cost, dataset=options.data, picture="curve.png")
    except (ValueError, OSError) as error:
        warn(f"no card was written: {error}. `klas-hf card` writes one later", stacklevel=2)
    else:
        card.save(output / "README.md")
