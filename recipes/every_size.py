"""Which model of every size is best? The search beside pruning, stitching and the anchors, all healed the same way.

    accelerate launch recipes/every_size.py --family quickstart --lengths 0 100 300 --seeds 0 1 2
    accelerate launch recipes/every_size.py --family stories --data LLAMA TRAIN.txt TEST.txt

For each of ten sizes, from a fifth of the dear anchor's MACs to all of them, every rule names a path of that cost; all
are healed with the same data, steps and sweep of rates, under every seed, and measured on text or digits held out.
Writes rows as they come, a report and a picture per length; the same command goes on where it was interrupted.
"""

from dataclasses import dataclass, field
from pathlib import Path

import digits
import quickstart
import small_llamas
from experiments.every_size import RIVALS, EverySize, Family, StudySettings
from experiments.every_size_report import report
from experiments.language_study import TextTask

from klas_hf import SearchConfig
from klas_hf.data.digits import load_digits_split
from klas_hf.data.images import image_batches
from klas_hf.data.text import TextBatches, held_out, python_documentation, text_examples, text_sequences
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state

FAMILIES = ("quickstart", *small_llamas.PAIRS, "stories", *digits.FAMILIES)
FITTED, BATCH = 256, 16  # sequences that joints are fitted to, and of a batch where nothing is trained
SMOKE = 32  # sequences or images of each part


@dataclass
class EverySizeArguments:
    family: str = field(default="quickstart", metadata={"help": f"one of {', '.join(FAMILIES)}"})
    data: list[str] | None = field(
        default=None, metadata={"help": "of the family stories: a Llama, a file to train on, a file to measure on"}
    )
    lengths: list[int] = field(
        default_factory=lambda: [0, 100, 300], metadata={"help": "optimiser steps of healing; 0, the start, always is"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the healing"})
    buckets: int = field(default=10, metadata={"help": "sizes, from a fifth of the dear anchor's MACs to all of them"})
    rivals: list[str] = field(default_factory=lambda: list(RIVALS), metadata={"help": f"some of {', '.join(RIVALS)}"})
    output_dir: str = field(default="outputs/every_size", metadata={"help": "where rows, report and pictures go"})
    cache_dir: str = field(default="outputs/study_anchors", metadata={"help": "where trained anchors are kept"})
    anchor_steps: int | None = field(default=None, metadata={"help": "training steps of each anchor; None: its own"})
    smoke: bool = field(default=False, metadata={"help": "barely trained anchors, one size, one step: no result"})

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"got family={self.family!r}; expected one of {list(FAMILIES)}")
        if (self.family == "stories") != (self.data is not None) or (self.data and len(self.data) != 3):
            raise ValueError(
                f"got family={self.family!r} and data={self.data}; expected a Llama, a file to train on and one to "
                "measure on for the family stories, and data for no other"
            )
        self.settings()

    def settings(self) -> StudySettings:
        """What is compared, as the study wants it."""
        search = SearchConfig(joints=2, forwards=5_000) if self.smoke else SearchConfig()
        return StudySettings(tuple(self.lengths), tuple(self.seeds), self.buckets, tuple(self.rivals), search)


def main() -> None:
    (args,) = parse_options(EverySizeArguments, description=__doc__.split("\n")[0])
    if args.smoke:
        args.lengths, args.seeds, args.buckets, args.anchor_steps = [0, 1], args.seeds[:1], 1, 3
    settings = args.settings()
    process_state().print(f"# {args.family}")
    with input_read(args):
        family = family_of(args)
    study = EverySize(family, settings, Path(args.output_dir) / args.family)
    for place, length in enumerate(settings.lengths, 1):
        study.run(length)
        text = report(study, settings.lengths[:place])
    process_state().print(f"\n{text}\nMade: {study.output / 'report.md'}")


def family_of(args: EverySizeArguments) -> Family:
    """The two anchors of a family, from the cache or trained now, and their data."""
    cache = Path(args.cache_dir)
    if args.family in digits.FAMILIES:
        return digits_family(args.family, cache, args.anchor_steps, SMOKE if args.smoke else None)
    if args.family == "stories":
        assert args.data is not None
        models, task = small_llamas.sibling_pair(*args.data, cache, args.anchor_steps)
    elif args.family == "quickstart":
        models, task = quickstart_pair(cache / "quickstart", args.anchor_steps)
    else:
        models, task = small_llamas.documentation_pair(args.family, cache, args.anchor_steps)
    return text_family(args.family, models, task, SMOKE if args.smoke else None)


def text_family(name: str, models: list, task: TextTask, count: int | None) -> Family:
    """Two Llamas, and all of the text or so many sequences of each part."""
    train, validation, test = (part[:count] for part in (task.train, task.validation, task.test))
    device = process_state().device
    return Family(
        name, (models[0].to(device), models[1].to(device)), text_examples(train), text_examples(validation[:64]),
        TextBatches(train[:: max(1, len(train) // FITTED)], BATCH), TextBatches(validation, BATCH),
        TextBatches(test, 2 * BATCH), tokens=task.length,
        healing={"per_device_batch_size": 8 // process_state().num_processes or 1},
    )  # fmt: skip


def quickstart_pair(cache: Path, steps: int | None) -> tuple[list, TextTask]:
    """The quickstart's two Llamas and its text."""
    arguments = quickstart.QuickstartArguments(cache_dir=str(cache))
    if steps is not None:
        arguments.small_steps = arguments.large_steps = steps
    train_texts, test_texts = held_out(python_documentation())
    small, large, tokenizer = quickstart.anchors(arguments, train_texts, process_state())
    parts = (train_texts, test_texts[::2], test_texts[1::2])
    train, validation, test = (text_sequences(texts, tokenizer, quickstart.LENGTH) for texts in parts)
    return [small, large], TextTask(train, validation[:128], test[:256], quickstart.LENGTH)


def digits_family(name: str, cache: Path, steps: int | None, count: int | None) -> Family:
    """The cheapest and the dearest of a family's classifiers, and all digits or so many; their accuracy counts."""
    parts = load_digits_split(scale=digits.SCALE.get(name, 1))
    train, validation, test = (part.select(list(range(len(part)))[:count]) for part in parts)
    task = digits.ImageTask(train, validation, test, digits.MEAN, digits.STD)
    arguments = digits.DigitsArguments() if steps is None else digits.DigitsArguments(anchor_steps=steps)
    folder = cache / f"{name}-{arguments.anchor_steps}-steps"
    configs = list(digits.FAMILIES[name].items())
    small, large = (
        digits.anchor(one, config, task, arguments, folder).to(process_state().device)
        for one, config in (configs[0], configs[-1])
    )
    fitting, scored, measured = (image_batches(part, 64, digits.MEAN, digits.STD) for part in (train, validation, test))
    return Family(
        name, (small, large), train, validation, fitting, scored, measured, metric="accuracy",
        image_size=digits.SIZE * digits.SCALE.get(name, 1), probing={"validation": scored},
        healing={"per_device_batch_size": 64, "mean": list(digits.MEAN), "std": list(digits.STD), "weight_decay": 0.05},
    )  # fmt: skip


if __name__ == "__main__":
    main()
