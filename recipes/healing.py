"""Which healing is best? Labels, distillation, both, and matching of states before; everything or LoRA learns.

    accelerate launch recipes/healing.py --family quickstart --lengths 100 300 --seeds 0 1 2

Heals two paths of a family, or those of `--paths`, by every method with the same steps and sweep of rates: the best
one within a budget, and the best stitch of the two anchors there. Writes rows as they come, and a report; the same
command goes on where it was interrupted.
"""

from dataclasses import dataclass, field
from pathlib import Path as Folder

from experiments.every_size import Family
from experiments.healing_study import HealingStudy
from families import FamilyArguments, family_of

from klas_hf import FunctionalScoring, Path, SearchConfig, search_paths
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state

SMOKE = 32  # sequences or images of each part


@dataclass
class HealingArguments:
    paths: list[str] | None = field(default=None, metadata={"help": "that are healed; None: the search chooses two"})
    budget: float = field(default=0.6, metadata={"help": "share of the dear anchor's MACs, where the search chooses"})
    lengths: list[int] = field(default_factory=lambda: [100, 300], metadata={"help": "optimiser steps of healing"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the healing"})
    trainable: list[str] = field(default_factory=lambda: ["full", "lora"], metadata={"help": "what learns"})
    output_dir: str = field(default="outputs/healing", metadata={"help": "where rows and report go"})
    smoke: bool = field(default=False, metadata={"help": "barely trained anchors, three steps: no result"})

    def __post_init__(self) -> None:
        if not self.seeds or not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"got lengths={self.lengths} and seeds={self.seeds}; expected at least one step and seed")
        if not self.trainable or not set(self.trainable) <= {"full", "lora"}:
            raise ValueError(f"got trainable={self.trainable}; expected full, lora or both")


def main() -> None:
    chosen, args = parse_options(FamilyArguments, HealingArguments, description=__doc__.split("\n")[0])
    if args.smoke:
        args.lengths, args.seeds, chosen.anchor_steps = [3], args.seeds[:1], 3
    process_state().print(f"# {chosen.family}")
    with input_read(chosen):
        family = family_of(chosen, SMOKE if args.smoke else None)
    paths = [Path.parse(text) for text in args.paths] if args.paths else best_paths(family, args.budget)
    output = Folder(args.output_dir) / family.name
    study = HealingStudy(family, paths, args.lengths, args.seeds, args.trainable, output)
    process_state().print(f"{study.run()}\nMade: {output / 'report.md'}")


def best_paths(family: Family, budget: float) -> list[Path]:
    """The best of all paths within a budget, and the best stitch, each once."""
    scoring = FunctionalScoring(calibration=family.fitting, temperature=1.0)
    searches = SearchConfig(scoring=scoring), SearchConfig(scoring=scoring, kinds=("stitch",), joints=1)
    found = [search_paths(family.anchors, family.scored, one, tokens=family.tokens).best(budget) for one in searches]
    return [path for path in dict.fromkeys(found) if path.joints]


if __name__ == "__main__":
    main()
