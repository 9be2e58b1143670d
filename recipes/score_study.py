"""When does which score hold? Every stitch of several families, at several fine-tuning lengths, against every score.

    accelerate launch recipes/score_study.py
    accelerate launch recipes/score_study.py --families mobilenet --data imagenette --anchors SMALL LARGE

Families of scikit-learn's digits (ViT, Swin, ResNet) need nothing but this; "mobilenet" stands for any image
classifiers and images. Prints a table for each family and length, and over all families how the ranking of scores
changes with the length; writes rows, tables and a figure.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import digits
import numpy as np

from klas_hf.options import parse_options
from klas_hf.plotting import Series, lines
from klas_hf.processes import process_state
from klas_hf.study import combined_values, format_outcomes, score_outcomes, with_score
from klas_hf.tasks.digits import load_digits_split
from klas_hf.tasks.image_comparison import ComparisonSettings, ImageTask
from klas_hf.tasks.image_data import ImageDataArguments, load_task
from klas_hf.tasks.score_study import ImageScoreStudy, StudySettings

COMBINED = ("theta", "functional", "dm")


@dataclass
class StudyArguments:
    families: list[str] = field(
        default_factory=lambda: list(digits.FAMILIES), metadata={"help": "vit, swin, resnet (digits) and mobilenet"}
    )
    lengths: list[int] = field(default_factory=lambda: [0, 100, 1000], metadata={"help": "fine-tuning steps; 0: none"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds of the fine-tuning"})
    adapted_steps: list[int] = field(
        default_factory=lambda: [1, 5], metadata={"help": "functional KL is measured again after so many steps"}
    )
    alone: int = field(default=0, metadata={"help": "random stitches that are trained by themselves too"})
    data: str | None = field(default=None, metadata={"help": "images of the family mobilenet"})
    anchors: list[str] | None = field(default=None, metadata={"help": "source and target of the family mobilenet"})
    labels: str | None = field(default="recipes/imagenette_labels.yaml", metadata={"help": "labels of its classes"})
    image_size: int | None = field(default=160, metadata={"help": "pixels of its images"})
    output_dir: str = field(default="outputs/score_study", metadata={"help": "where rows, tables and figures go"})
    cache_dir: str = field(default="outputs/digits_anchors", metadata={"help": "where trained anchors are kept"})
    anchor_steps: int = field(default=400, metadata={"help": "training steps of each digits anchor"})
    smoke: bool = field(default=False, metadata={"help": "one family, two short lengths: no result"})


def main() -> None:
    (args,) = parse_options(StudyArguments, description=__doc__.split("\n")[0])
    if unknown := sorted(set(args.families) - {*digits.FAMILIES, "mobilenet"}):
        raise ValueError(f"got the families {unknown}; expected some of {[*digits.FAMILIES, 'mobilenet']}")
    if "mobilenet" in args.families and (args.data is None or args.anchors is None or len(args.anchors) != 2):
        raise ValueError("got the family mobilenet without its data or two anchors; expected --data and --anchors")
    if args.smoke:
        args.families, args.lengths, args.adapted_steps, args.anchor_steps = args.families[:1], [0, 2], [1], 3
    studies = {family: study_of(family, args) for family in args.families}
    parts, regrets = [], {}
    for length in args.lengths:
        families = {name: study.stitches(length) for name, study in studies.items()}
        for name, study in studies.items():
            stitches = families[name]
            if len(families) > 1:
                stitches = with_score(stitches, "combined", combined_values(families, name, COMBINED))
            outcomes = score_outcomes(stitches)
            regrets[name, length] = {one.score: one.regret for one in outcomes}
            text = f"## {name}, {length} steps, {outcomes[0].stitches} stitches\n\n{format_outcomes(outcomes)}"
            if length and args.alone:
                text += f"\n\n{alone_agreement(study, length)}"
            process_state().print(f"\n{text}")
            parts.append(text)
    parts.append(ranking(regrets, args))
    process_state().print(f"\n{parts[-1]}")
    if process_state().is_main_process:
        output = Path(args.output_dir)
        (output / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        draw(regrets, args, output)


def study_of(family: str, args: StudyArguments) -> ImageScoreStudy:
    """The study of one family: the cheapest and the dearest of its anchors."""
    settings = StudySettings(tuple(args.lengths), tuple(args.seeds), tuple(args.adapted_steps), args.alone)
    if family == "mobilenet":
        assert args.data is not None and args.anchors is not None
        data = ImageDataArguments(
            args.data, args.anchors, test_split="val", labels=args.labels, image_size=args.image_size,
            validation_share=0.2,
        )  # fmt: skip
        training = replace(digits.DigitsTraining(), per_device_batch_size=32, learning_rate=2e-5)
        anchors, task, names = list(args.anchors), load_task(data), [Path(anchor).name for anchor in args.anchors]
    else:
        train, validation, test = load_digits_split(scale=digits.SCALE.get(family, 1))
        task = ImageTask(train, validation, test, digits.MEAN, digits.STD)
        cache = Path(args.cache_dir) / f"{family}-{args.anchor_steps}-steps"
        configs = digits.FAMILIES[family]
        names = [list(configs)[0], list(configs)[-1]]
        training = digits.DigitsTraining()
        wanted = digits.DigitsArguments(anchor_steps=args.anchor_steps)
        anchors = [digits.anchor(name, configs[name], task, wanted, cache) for name in names]
    output = Path(args.output_dir) / family
    return ImageScoreStudy(family, anchors, names, task, ComparisonSettings(), training, settings, output)


def alone_agreement(study: ImageScoreStudy, length: int) -> str:
    """How the accuracies of stitches trained alone go with those of the same stitches in the supernet."""
    alone = {row.stitch: row.metrics["accuracy"] for row in study.alone_rows(length)}
    together = {(one.stitch.source_stop, one.stitch.target_start): one.quality for one in study.stitches(length)}
    pairs = np.array([(alone[stitch], together[stitch]) for stitch in alone if stitch in together])
    return (
        f"{len(pairs)} stitches alone: mean accuracy {pairs[:, 0].mean():.4f}, in the supernet "
        f"{pairs[:, 1].mean():.4f}, correlation {np.corrcoef(pairs.T)[0, 1]:.2f}."
    )


def ranking(regrets: dict[tuple[str, int], dict[str, float]], args: StudyArguments) -> str:
    """Mean regret of every score over the families, by length."""
    scores = sorted(set.intersection(*(set(found) for found in regrets.values())))
    means = {
        score: [float(np.mean([regrets[family, length][score] for family in args.families])) for length in args.lengths]
        for score in scores
    }
    rows = [f"| score | {' | '.join(f'{length} steps' for length in args.lengths)} | worst family, any length |"]
    rows.append("|---" * (len(args.lengths) + 2) + "|")
    for score in sorted(scores, key=lambda score: sum(means[score])):
        worst = max(found[score] for found in regrets.values())
        rows.append(f"| {score} | {' | '.join(f'{mean:.4f}' for mean in means[score])} | {worst:.4f} |")
    return "## Mean regret over families, by length of the fine-tuning\n\n" + "\n".join(rows)


def draw(regrets: dict[tuple[str, int], dict[str, float]], args: StudyArguments, output: Path) -> None:
    """Mean regret against the length."""
    shown = ("klas", "klas_staged", "theta", "dm", "functional", "stitched_loss")
    series = [
        Series(
            score,
            list(range(len(args.lengths))),
            [float(np.mean([regrets[family, n][score] for family in args.families])) for n in args.lengths],
        )
        for score in shown
    ]
    labels = ", ".join(str(length) for length in args.lengths)
    title = "regret of each score, mean over families"
    x = f"length of the fine-tuning: {labels} steps"
    lines(series, x, "mean regret (accuracy)", title, output / "regret", integer_x=True)


if __name__ == "__main__":
    main()
