"""What LOG.md says of rates and joints before healing, on any family of the studies.

    python benchmarks/healing.py rates "1[:2] 1[5:6] 1[7:]" "0[:5] 1[5:]"    # held-out loss by steps and rate
    python benchmarks/healing.py joints "1[:1] 1[7:]" "1[:2] 1[5:]"          # start and healed, by joint

    python benchmarks/healing.py rates "0[:2] 1[7:]" --trainable lora --rates 1e-3 3e-3 1e-2 --steps 10 100

Takes the options of recipes/every_size.py that name a family (`--family stories --anchors … --data …`).
"""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path as Folder

from transformers import HfArgumentParser

sys.path.insert(0, str(Folder(__file__).parents[1] / "recipes"))

from experiments.every_size import Family
from families import FamilyArguments, family_of

from klas_hf import StitchedModel, evaluate, heal, healing_config, train_stitches

JOINTS = ("least_squares", "merged", "identity")


@dataclass
class HealingArguments:
    """How the paths are healed."""

    steps: list[int] = field(default_factory=lambda: [10, 30, 100, 300], metadata={"help": "of rates: runs' lengths"})
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2], metadata={"help": "of rates"})
    trainable: str = field(default="full", metadata={"help": "of rates: full or lora"})
    joint: str = field(default="least_squares", metadata={"help": f"of rates: one of {', '.join(JOINTS)}"})


def main() -> None:
    parser = HfArgumentParser([FamilyArguments, HealingArguments], description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("rates", "joints"))
    parser.add_argument("paths", nargs="+")
    chosen, args, given = parser.parse_args_into_dataclasses()
    if args.joint not in JOINTS:
        parser.error(f"got --joint {args.joint}; expected one of {', '.join(JOINTS)}")
    family = family_of(chosen)
    for path in given.paths:
        if given.what == "rates":
            rates(family, path, args)
        else:
            joints(family, path)


def start(family: Family, path: str, joint: str) -> StitchedModel:
    """The model of a path before healing."""
    sized = {} if family.image_size is None else {"image_size": family.image_size}
    calibration = None if joint == "identity" else family.fitting
    return StitchedModel.from_path(family.anchors, path, joint=joint, calibration=calibration, **sized)


def measured(family: Family, model: StitchedModel) -> str:
    return f"{evaluate(model, family.test, classes=family.classes).metrics[family.metric]:.4f}"


def rates(family: Family, path: str, args: HealingArguments) -> None:
    """One run, with its own cosine, of each length at each rate; half labels, half distilled."""
    begun = start(family, path, args.joint)
    for count in args.steps:
        ends = []
        for rate in args.rates:
            model = copy.deepcopy(begun)
            settings = {"learning_rate": rate, "distillation_weight": 0.5, "eval_steps": count} | dict(family.healing)
            config = healing_config(count, **settings, trainable=args.trainable)
            options = {"teacher": family.anchors[1], "validation": family.validation}
            (_, before), (_, after) = train_stitches(model, family.train, config, **options).validation
            ends.append(f"{rate:g} {after:.4f} (kept: {measured(family, model)})")
        print(f"{path}: {before:.4f}; {count} steps: {', '.join(ends)}", flush=True)


def joints(family: Family, path: str) -> None:
    """Every kind of joint, healed for 100 steps under two seeds."""
    for joint in JOINTS:
        begun, ends = start(family, path, joint), []
        for seed in (0, 1):
            model, config = (
                copy.deepcopy(begun),
                healing_config(100, **{"seed": seed, "eval_steps": 25} | dict(family.healing)),
            )
            heal(model, family.train, teacher=family.anchors[1], validation=family.validation, config=config)
            ends.append(measured(family, model))
        print(f"{path}, {joint}: start {measured(family, begun)}, healed {', '.join(ends)}", flush=True)


if __name__ == "__main__":
    main()
