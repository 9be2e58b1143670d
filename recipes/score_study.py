"""When does which score hold? Every stitch of several families, at several fine-tuning lengths, against every score.

    accelerate launch recipes/score_study.py
    accelerate launch recipes/score_study.py --families mobilenet --data imagenette --anchors SMALL LARGE
    accelerate launch recipes/score_study.py --families stories --stories LLAMA TRAIN.txt TEST.txt

Families of scikit-learn's digits (ViT, Swin, ResNet) and small Llamas on Python's documentation (of one width, of two)
need nothing but this; "mobilenet" stands for any image classifiers and images, "stories" for any small Llama and text.
Prints a table for each family and length, how the ranking of scores changes with the length, what halving loses, and
how little data functional KL needs; writes rows, tables and a figure. Runs into one folder add up: a family that was
measured before is read, not measured again.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import digits
import numpy as np
import small_llamas
from experiments.image_comparison import ComparisonSettings, ImageTask
from experiments.language_study import LanguageScoreStudy
from experiments.score_study import ImageScoreStudy, ScoreStudy, StudySettings
from experiments.study import (
    MeasuredStitch,
    ScoreOutcome,
    combined_values,
    format_halving,
    format_outcomes,
    halving_outcome,
    score_outcomes,
    with_score,
)

from klas_hf import TrainingConfig
from klas_hf.data.digits import load_digits_split
from klas_hf.data.image_data import ImageDataArguments, load_task
from klas_hf.maths.correlations import spearman
from klas_hf.options import input_read, parse_options
from klas_hf.plotting import Series, lines
from klas_hf.processes import process_state
from klas_hf.tables import markdown_table

COMBINED = ("theta", "functional", "dm")
SHOWN = ("functional, temperature 4", "functional", "functional_theta", "theta", "klas", "cost")
FAMILIES = (*digits.FAMILIES, *small_llamas.PAIRS, "mobilenet", "stories")
WITH_MIDDLE = (*digits.FAMILIES, "llama_across")  # families of three anchors


@dataclass
class StudyArguments:
    families: list[str] = field(
        default_factory=lambda: [*digits.FAMILIES, *small_llamas.PAIRS], metadata={"help": f"of {', '.join(FAMILIES)}"}
    )
    lengths: list[int] = field(default_factory=lambda: [0, 100, 1000], metadata={"help": "fine-tuning steps; 0: none"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the fine-tuning"})
    adapted_steps: list[int] = field(
        default_factory=lambda: [1, 5], metadata={"help": "functional KL is measured again after so many steps"}
    )
    alone: int = field(default=8, metadata={"help": "random stitches that are trained by themselves too, one seed"})
    middle: bool = field(
        default=False, metadata={"help": "the middle one of three anchors as the source: pairs that chose nothing"}
    )
    data: str | None = field(default=None, metadata={"help": "images of the family mobilenet"})
    anchors: list[str] | None = field(default=None, metadata={"help": "source and target of the family mobilenet"})
    labels: str | None = field(default="recipes/imagenette_labels.yaml", metadata={"help": "labels of its classes"})
    image_size: int | None = field(default=160, metadata={"help": "pixels of its images"})
    stories: list[str] | None = field(
        default=None, metadata={"help": "of the family stories: a Llama, a file to train on, a file to measure on"}
    )
    output_dir: str = field(default="outputs/score_study", metadata={"help": "where rows, tables and figures go"})
    cache_dir: str = field(default="outputs/study_anchors", metadata={"help": "where trained anchors are kept"})
    anchor_steps: int | None = field(default=None, metadata={"help": "training steps of each small anchor"})
    smoke: bool = field(default=False, metadata={"help": "two families, two short lengths: no result"})

    def __post_init__(self) -> None:
        check(self)


def main() -> None:
    (args,) = parse_options(StudyArguments, description=__doc__.split("\n")[0])
    if args.smoke:
        args.families, args.lengths, args.seeds, args.adapted_steps = args.families[:2], [0, 2], [0], [1]
        args.anchor_steps, args.alone = 3, min(args.alone, 1)
    output = Path(args.output_dir)
    settings = StudySettings(tuple(args.lengths), tuple(args.seeds), tuple(args.adapted_steps), args.alone)
    parts: list[str] = []
    families, variants = {}, {}
    for family in args.families:
        process_state().print(f"\n# {family}")
        study = study_of(family, args, settings)
        families[family] = {length: study.stitches(length) for length in args.lengths}
        variants[family] = {length: study.with_variants(length) for length in args.lengths}
        if args.alone:
            parts.append(f"## {family}: stitches alone\n\n" + "\n".join(alone(study, n) for n in args.lengths if n))
    outcomes = {}
    for family in args.families:
        for length in args.lengths:
            stitches = combined(families, family, length)
            outcomes[family, length] = score_outcomes(stitches)
            heading = f"## {family}, {length} steps, {len(stitches)} stitches"
            parts.append(f"{heading}\n\n{format_outcomes(outcomes[family, length])}")
    parts += [ranking(outcomes, args), halving(families, args), frugality(variants, args)]
    for part in parts:
        process_state().print(f"\n{part}")
    if process_state().is_main_process:
        (output / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        write_stitches(families, output / "stitches.jsonl")
        draw(outcomes, args, output)


def check(args: StudyArguments) -> None:
    """Raise ValueError for families that do not exist or lack their data."""
    if unknown := sorted(set(args.families) - set(FAMILIES)):
        raise ValueError(f"got the families {unknown}; expected some of {list(FAMILIES)}")
    if args.middle and (without := sorted(set(args.families) - set(WITH_MIDDLE))):
        raise ValueError(f"got --middle with the families {without}; expected some of {list(WITH_MIDDLE)}")
    if "mobilenet" in args.families and (args.data is None or args.anchors is None or len(args.anchors) != 2):
        raise ValueError("got the family mobilenet without its data or two anchors; expected --data and --anchors")
    if "stories" in args.families and (args.stories is None or len(args.stories) != 3):
        raise ValueError("got the family stories without a Llama and two files; expected --stories LLAMA TRAIN TEST")


def study_of(family: str, args: StudyArguments, settings: StudySettings) -> ScoreStudy:
    """The study of one family: the cheapest and the dearest of its anchors."""
    output, cache = Path(args.output_dir) / family, Path(args.cache_dir)
    if family in small_llamas.PAIRS or family == "stories":
        if family == "stories":
            assert args.stories is not None
            with input_read(args):
                models, text = small_llamas.sibling_pair(*args.stories, cache, args.anchor_steps)
        else:
            models, text, _ = small_llamas.documentation_pair(family, cache, args.anchor_steps, args.middle)
        fine_tuning = TrainingConfig(
            trainable="full", per_device_batch_size=16, gradient_accumulation_steps=1, learning_rate=1e-3,
            save_steps=1000,
        )  # fmt: skip
        return LanguageScoreStudy(family, models, text, fine_tuning, settings, output)
    if family == "mobilenet":
        assert args.data is not None and args.anchors is not None
        data = ImageDataArguments(
            args.data, args.anchors, test_split="val", labels=args.labels, image_size=args.image_size,
            validation_share=0.2,
        )  # fmt: skip
        training = replace(digits.DigitsTraining(), per_device_batch_size=32, learning_rate=2e-5)
        with input_read(args):
            task = load_task(data)
        anchors, names = list(args.anchors), [Path(anchor).name for anchor in args.anchors]
    else:
        train, validation, test = load_digits_split(scale=digits.SCALE.get(family, 1))
        task = ImageTask(train, validation, test, digits.MEAN, digits.STD)
        wanted = digits.DigitsArguments(anchor_steps=args.anchor_steps or digits.DigitsArguments().anchor_steps)
        configs = digits.FAMILIES[family]
        names, training = [list(configs)[1 if args.middle else 0], list(configs)[-1]], digits.DigitsTraining()
        place = cache / f"{family}-{wanted.anchor_steps}-steps"
        anchors = [digits.anchor(name, configs[name], task, wanted, place) for name in names]
    return ImageScoreStudy(family, anchors, names, task, ComparisonSettings(), training, settings, output)


def combined(families: dict[str, dict[int, list[MeasuredStitch]]], family: str, length: int) -> list[MeasuredStitch]:
    """A family's stitches with the combination of scores that the other families teach."""
    at_length = {name: found[length] for name, found in families.items()}
    if len(at_length) == 1:
        return at_length[family]
    return with_score(at_length[family], "combined", combined_values(at_length, family, COMBINED))


def alone(study: ScoreStudy, length: int) -> str:
    """How stitches trained alone compare with the same stitches in the supernet."""
    sign = 1.0 if study.higher_is_better else -1.0
    by_itself = {row.stitch: sign * row.metrics[study.metric] for row in study.alone_rows(length)}
    together = {(one.stitch.source_stop, one.stitch.target_start): one for one in study.stitches(length)}
    shared = [stitch for stitch in by_itself if stitch in together]
    pairs = np.array([(by_itself[stitch], together[stitch].quality) for stitch in shared])
    values = {name: [together[stitch].values[name] for stitch in shared] for name in SHOWN}
    means = "{:.4f} alone, {:.4f} in the supernet".format(*(sign * pairs.mean(axis=0)))
    text = f"- {length} steps, {len(pairs)} stitches: mean {study.metric} {means}"
    if len(pairs) < 3:
        return text + "."
    ranks = ", ".join(f"{name} {spearman(np.array(values[name]), -pairs[:, 0]):.2f}" for name in SHOWN)
    between = spearman(pairs[:, 0], pairs[:, 1])
    return f"{text}, Spearman between them {between:.2f}; of the scores with the drop alone: {ranks}."


def ranking(outcomes: dict[tuple[str, int], list[ScoreOutcome]], args: StudyArguments) -> str:
    """Mean relative regret of every score over the families, by length, and its worst."""
    found = {key: {one.score: one for one in ones} for key, ones in outcomes.items()}
    scores = set.intersection(*(set(ones) for ones in found.values()))
    heading = ["score", *(f"{n} steps" for n in args.lengths), "mean Spearman, by length", "worst"]
    rows = []
    for score in scores:
        by_length = [[found[family, n][score] for family in args.families] for n in args.lengths]
        regrets = [float(np.mean([one.relative_regret for one in ones])) for ones in by_length]
        correlations = [float(np.mean([one.spearman for one in ones])) for ones in by_length]
        worst = max(found, key=lambda key: found[key][score].relative_regret)
        cells = [
            score, *(f"{regret:.0%}" for regret in regrets), " / ".join(f"{one:.2f}" for one in correlations),
            f"{found[worst][score].relative_regret:.0%} ({worst[0]}, {worst[1]})",
        ]  # fmt: skip
        rows.append((sum(regrets), cells))
    return (
        "## What a choice loses, as a share of what a random one loses, mean over families, by fine-tuning length\n\n"
        + markdown_table([heading, *(cells for _, cells in sorted(rows))])
    )


def halving(families: dict[str, dict[int, list[MeasuredStitch]]], args: StudyArguments) -> str:
    """What is lost where Θ or 1 − R² leaves functional KL only some stitches of each bucket."""
    text = []
    for family in args.families:
        stitches = families[family][args.lengths[-1]]
        table = format_halving(
            halving_outcome(stitches, cheap, "functional", per_bucket=kept)
            for cheap in ("theta", "dm")
            for kept in (1, 2, 3, 5)
        )
        text.append(f"{family}, {args.lengths[-1]} steps, {len(stitches)} stitches:\n\n{table}")
    return "## Successive halving\n\n" + "\n\n".join(text)


def frugality(variants: dict[str, dict[int, list[MeasuredStitch]]], args: StudyArguments) -> str:
    """Functional KL on few samples, at other temperatures and on scrambled data, at the shortest fine-tuning."""
    length = next((n for n in args.lengths if n), args.lengths[0])
    text = []
    for family in args.families:
        stitches = variants[family][length]
        full = [one.values["functional"] for one in stitches]
        rows = [["functional KL", "Spearman with the full one", "Spearman with the drop", "of chance"]]
        for one in score_outcomes(stitches):
            same = spearman(np.array([stitch.values[one.score] for stitch in stitches]), np.array(full))
            rows.append([one.score, f"{same:.2f}", f"{one.spearman:.2f}", f"{one.relative_regret:.0%}"])
        text.append(f"{family}, {length} steps:\n\n{markdown_table(rows)}")
    return "## How little functional KL needs\n\n" + "\n\n".join(text)


def write_stitches(families: dict[str, dict[int, list[MeasuredStitch]]], path: Path) -> None:
    """One line per family, length and stitch: cost, quality (a loss counts negatively) and every score."""
    with path.open("w", encoding="utf-8") as file:
        for family, by_length in families.items():
            for length, stitches in by_length.items():
                for one in stitches:
                    pair = [one.stitch.source_stop, one.stitch.target_start]
                    line = {"family": family, "steps": length, "stitch": pair, "macs": one.macs}
                    file.write(json.dumps(line | {"quality": one.quality, "scores": dict(one.values)}) + "\n")


def draw(outcomes: dict[tuple[str, int], list[ScoreOutcome]], args: StudyArguments, output: Path) -> Any:
    """The figure of relative regret against the length, mean over families."""
    found = {key: {one.score: one.relative_regret for one in ones} for key, ones in outcomes.items()}
    series = [
        Series(
            score,
            list(range(len(args.lengths))),
            [100 * float(np.mean([found[family, n][score] for family in args.families])) for n in args.lengths],
        )
        for score in SHOWN
    ]
    return lines(
        series, "length of the fine-tuning, steps", "regret, % of a random choice's",
        f"what each score's choice loses, mean over {len(args.families)} families", output / "regret",
        x_names=[str(length) for length in args.lengths],
    )  # fmt: skip


if __name__ == "__main__":
    main()
