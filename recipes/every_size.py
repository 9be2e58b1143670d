"""Which model of every size is best? The search beside pruning, stitching and the anchors, all healed the same way.

    accelerate launch recipes/every_size.py --family quickstart --lengths 0 100 300 --seeds 0 1 2
    accelerate launch recipes/every_size.py --family stories --anchors LLAMA --data TRAIN.txt TEST.txt
    accelerate launch recipes/every_size.py --family images --anchors SMALL LARGE --data FOLDER --labels LABELS.yaml

By itself a family is healed and measured on what its anchors learnt; `--data` brings Llamas, `--mirrored` digits, a new
domain.

For each of ten sizes, from a fifth of the dear anchor's MACs to all of them, every rule names a path of that cost; all
are healed with the same data, steps and sweep of rates, under every seed, and measured on text or digits held out.
Writes rows as they come, a report and a picture per length; the same command goes on where it was interrupted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments.every_size import RIVALS, EverySize, StudySettings
from experiments.every_size_report import report
from families import FamilyArguments, family_of

from klas_hf import SearchConfig
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state

SMOKE = 32  # sequences or images of each part


@dataclass
class EverySizeArguments:
    lengths: list[int] = field(
        default_factory=lambda: [0, 100, 300], metadata={"help": "optimiser steps of healing; 0, the start, always is"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the healing"})
    buckets: int = field(default=10, metadata={"help": "sizes, from a fifth of the dear anchor's MACs to all of them"})
    rivals: list[str] = field(default_factory=lambda: list(RIVALS), metadata={"help": f"some of {', '.join(RIVALS)}"})
    contenders: int = field(default=4, metadata={"help": "paths of each size that the search names"})
    output_dir: str = field(default="outputs/every_size", metadata={"help": "where rows, report and pictures go"})
    smoke: bool = field(default=False, metadata={"help": "barely trained anchors, one size, one step: no result"})

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> StudySettings:
        """What is compared, as the study wants it."""
        search = SearchConfig(joints=2, forwards=5_000) if self.smoke else SearchConfig()
        return StudySettings(
            tuple(self.lengths), tuple(self.seeds), self.buckets, tuple(self.rivals), search, self.contenders
        )


def main() -> None:
    chosen, args = parse_options(FamilyArguments, EverySizeArguments, description=__doc__.split("\n")[0])
    if args.smoke:
        args.lengths, args.seeds, args.buckets, chosen.anchor_steps = [0, 1], args.seeds[:1], 1, 3
    settings = args.settings()
    process_state().print(f"# {chosen.family}")
    with input_read(chosen):
        family = family_of(chosen, SMOKE if args.smoke else None)
    study = EverySize(family, settings, Path(args.output_dir) / family.name)
    for place, length in enumerate(settings.lengths, 1):
        study.run(length)
        text = report(study, settings.lengths[:place])
    process_state().print(f"\n{text}\nMade: {study.output / 'report.md'}")


if __name__ == "__main__":
    main()
