"""What LOG.md says of rates and joints before healing, on any family of the studies.

    python benchmarks/healing.py rates "1[:2] 1[5:6] 1[7:]" "0[:5] 1[5:]"    # held-out loss by steps and rate
    python benchmarks/healing.py rates "1[:2] 1[6:]" --shares 0.5 0.75 0.9   # and share of the loss that is distilled
    python benchmarks/healing.py joints "1[:1] 1[7:]" "1[:2] 1[5:]"          # start and healed, by joint

    python benchmarks/healing.py rates "0[:2] 1[7:]" --trainable lora --rates 1e-3 3e-3 1e-2 --steps 10 100
    python benchmarks/healing.py rates "1[:2] 1[6:]" --optimizer muon --shares 0 0.5 --rates 2e-3 4e-3 8e-3 --steps 300

Takes the options of recipes/every_size.py that name a family (`--family stories --anchors … --data …`).
"""

import copy
import sys
from dataclasses import dataclass, field
from itertools import product
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
    optimizer: str = field(default="adamw", metadata={"help": "adamw, muon or sgd"})
    until_passed: bool = field(default=False, metadata={"help": "of rates: distil until the teacher is passed"})
    length: int = field(default=100, metadata={"help": "of joints: steps of healing"})
    joint: str = field(default="least_squares", metadata={"help": f"of rates: one of {', '.join(JOINTS)}"})
    shares: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "of rates: of the loss, distilled"})
    joints: list[str] = field(default_factory=lambda: list(JOINTS), metadata={"help": "of joints: those compared"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "of joints: seeds of the healing"})


def main() -> None:
    parser = HfArgumentParser([FamilyArguments, HealingArguments], description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("rates", "joints"))
    parser.add_argument("paths", nargs="+")
    chosen, args, given = parser.parse_args_into_dataclasses()
    if unknown := {args.joint, *args.joints} - set(JOINTS):
        parser.error(f"got the joints {sorted(unknown)}; expected some of {', '.join(JOINTS)}")
    family = family_of(chosen)
    for path in given.paths:
        if given.what == "rates":
            rates(family, path, args)
        else:
            joints(family, path, args)


def start(family: Family, path: str, joint: str) -> StitchedModel:
    """The model of a path before healing."""
    sized = {} if family.image_size is None else {"image_size": family.image_size}
    calibration = None if joint == "identity" else family.fitting
    return StitchedModel.from_path(family.anchors, path, joint=joint, calibration=calibration, **sized)


def measured(family: Family, model: StitchedModel) -> str:
    """The family's metric and, of images, the loss beside it."""
    metrics = evaluate(model, family.test, classes=family.classes).metrics
    return " / ".join(f"{metrics[name]:.4f}" for name in dict.fromkeys((family.metric, "loss")))


def rates(family: Family, path: str, args: HealingArguments) -> None:
    """One run, with its own cosine, of each length at each rate and share of distillation."""
    begun = start(family, path, args.joint)
    for count, share in product(args.steps, args.shares):
        ends = []
        for rate in args.rates:
            model = copy.deepcopy(begun)
            settings = {"learning_rate": rate, "distillation_weight": share, "trainable": args.trainable}
            settings |= {"optimizer": args.optimizer, "distillation_until_passed": args.until_passed}
            every = max(1, count // 10) if args.until_passed else count
            config = healing_config(count, eval_steps=every, **settings, **family.healing)
            options = {"teacher": family.anchors[1] if share else None, "validation": family.validation}
            (_, before), *_, (_, after) = train_stitches(model, family.train, config, **options).validation
            ends.append(f"{rate:g} {after:.4f} (kept: {measured(family, model)})")
        print(f"{path}: {before:.4f}; {count} steps, {share:.0%} distilled: {', '.join(ends)}", flush=True)


def joints(family: Family, path: str, args: HealingArguments) -> None:
    """Each kind of joint, healed under each seed."""
    for joint in args.joints:
        begun, ends = start(family, path, joint), []
        for seed in args.seeds:
            model, settings = copy.deepcopy(begun), {"seed": seed, "eval_steps": max(1, args.length // 4)}
            config = healing_config(args.length, optimizer=args.optimizer, **settings, **family.healing)
            heal(model, family.train, teacher=family.anchors[1], validation=family.validation, config=config)
            ends.append(measured(family, model))
        print(f"{path}, {joint}: start {measured(family, begun)}, healed {', '.join(ends)}", flush=True)


if __name__ == "__main__":
    main()
