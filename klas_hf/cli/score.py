"""`klas-hf score`: the scores of all stitches between two anchors, as one safetensors file (KLAS Alg. 1 and 2)."""

from dataclasses import dataclass, field
from typing import Any

from klas_hf.cli.data import DataOptions, load_material, load_model, place
from klas_hf.cli.output import OVERWRITE, check_output, is_main_process, say, say_json
from klas_hf.cli.parsing import Command, flag, positional, two
from klas_hf.cli.select import described, table
from klas_hf.scores.values import NEEDED, SCORES, STITCHED


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(DataOptions):
    """Options of `klas-hf score`."""

    source: str = positional("the cheaper anchor: Hub id or folder")
    target: str = positional("the dearer anchor")
    output: str = field(metadata={"metavar": "FILE", "help": "where the scores go, as scores.safetensors"})
    score: str = field(
        default="functional", metadata={"help": f"{', '.join(SCORES)}; functional needs no probes and no labels"}
    )
    probes: list[str] | None = two("probes of both anchors; without them they are trained", str, ("FOLDER", "FOLDER"))
    split: str = field(default="validation", metadata={"help": "images to score on"})
    train_split: str = field(default="train", metadata={"metavar": "SPLIT", "help": "images that probes learn from"})
    dtype: str = field(default="auto", metadata={"help": "that the anchors run in"})
    overwrite: bool = flag(OVERWRITE)
    json: bool = flag("print JSON")


def run(options: ScoreOptions) -> int:
    """Run `klas-hf score`; its exit status."""
    if options.score not in SCORES:
        raise ValueError(f"got score={options.score!r}; expected one of {sorted(SCORES)}")
    if place(options.source) == place(options.target):
        raise ValueError(f"got {options.source} as the source and as the target; expected two different anchors")
    output = check_output(options.output, options.overwrite)

    from klas_hf.scores.driver import score_stitches
    from klas_hf.selection.klas import select_stitches

    material = load_material(options, [options.source, options.target], options.split)
    given = None if options.probes is None else [_saved_probes(folder, options) for folder in options.probes]
    anchors = load_model(options.source, options.dtype), load_model(options.target, options.dtype)
    probes = _trained_probes(options, anchors) if given is None else [one.to(anchors[0].device) for one in given]
    scores = score_stitches(*anchors, material.batches, probes=probes, score=options.score, tokens=options.length)
    if is_main_process():
        scores.save(output)
    best = select_stitches(scores).best_per_bucket()
    if options.json:
        figures = {"output": str(output), "score": scores.score, "sequences": scores.sequences, "tokens": scores.tokens}
        say_json({**figures, "available": list(scores.available), "stitches": described(best, scores)})
    else:
        say(table(best, scores))
        say(f"\nThe best of each cost bucket, of {len(scores.stitches)} stitches; all scores are in {output}")
    return 0


def _saved_probes(folder: str, options: ScoreOptions) -> Any:
    """Probes that were saved in a folder, or on the Hub.

    Raises:
        OSError: there are none.
    """
    from klas_hf.anchors.vision import is_vision
    from klas_hf.probes import ImageProbeNet, ProbeNet

    try:
        return (ImageProbeNet if is_vision(options.source) else ProbeNet).from_pretrained(folder)
    except OSError as error:
        raise OSError(f"could not load probes from {folder}: {error}") from error


def _trained_probes(options: ScoreOptions, anchors: tuple[Any, Any]) -> list[Any] | None:
    """Probes that learnt from images of the train split; None: none are needed, or text, where scoring makes them."""
    from klas_hf.anchors.vision import is_vision
    from klas_hf.probes.training import train_probes

    if not is_vision(options.source) or set(NEEDED[options.score]) <= set(STITCHED):
        return None
    learnt = load_material(options, [options.source, options.target], options.train_split).batches
    return [train_probes(anchor, learnt) for anchor in anchors]


COMMAND = Command("Score all stitches between two anchors; print the best of each cost bucket.", ScoreOptions, run)
