"""The best model of every size beside every rival: paths that rules choose at equal cost, healed alike, measured.

For every bucket of cost the search names some paths, of which the one that heals best on validation data is ours, and
each rival the one of its paths whose cost is nearest to that. All of them, and both anchors, are healed with the same
data, steps and sweep of rates, under several seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path as Folder
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from experiments.beside import items_of, quantised
from klas_hf.anchors.weights import fingerprint
from klas_hf.budgets import Budget
from klas_hf.costs import measure_path_costs
from klas_hf.evaluation import Measurement, evaluate, evaluate_divergence, evaluate_stitches
from klas_hf.models import StitchedModel
from klas_hf.paths import Path
from klas_hf.probes.training import train_probes
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile
from klas_hf.scores.driver import score_stitches
from klas_hf.scores.functional_settings import FunctionalScoring
from klas_hf.scores.path_scores import PathScores
from klas_hf.scores.values import StitchScores
from klas_hf.selection.choice import PathSelection
from klas_hf.selection.klas import best_stitches
from klas_hf.selection.plan import SearchConfig
from klas_hf.selection.pruning import (
    gromov_paths,
    linear_patch_paths,
    replaceme_paths,
    shortgpt_paths,
    tail_paths,
    uniform_paths,
)
from klas_hf.selection.rivals import esta_stitches, min_kl_stitches, random_stitches
from klas_hf.selection.search import search_paths
from klas_hf.selection.snnet import snnet_stitches
from klas_hf.training import TrainingConfig, heal, healing_config, remember_answers
from klas_hf.training.contest import best_contender
from klas_hf.training.healing import HealingResult, knows_nothing
from klas_hf.training.rates import RATES

OURS, ANCHORS = "search", "anchors"
UNHEALED = "search, by score alone"
CHEAPEST = 0.2  # share of the dear anchor's MACs that the first bucket begins at
EQUAL = 0.02  # costs that differ by no more than this share count as equal
SEARCHES: dict[str, dict[str, Any]] = {OURS: {}, UNHEALED: {}, "search, one joint": {"joints": 1}}
PRUNING: dict[str, Callable[..., PathSelection]] = {
    "shortgpt": shortgpt_paths,
    "gromov": gromov_paths,
    "replaceme": replaceme_paths,
    "replaceme, cosine": partial(replaceme_paths, objective="cosine"),
    "linear patch": linear_patch_paths,
}
RIVALS = (
    UNHEALED, "search, one joint", "klas", "min_kl", "esta_proportional", "esta_index", "snnet", "random", "tail",
    "uniform", *PRUNING,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Two anchors, and the data of their study.

    Attributes:
        name: of the family.
        anchors: the cheap one and the dear one.
        train: examples, or images, to heal on.
        validation: more of them: the weights that do best on them are kept.
        fitting: batches that joints and probes are fitted to.
        scored: batches that rules choose by.
        test: batches that everything is measured on.
        metric: of the measurement that says how good a model is.
        tokens: length of the sequences that costs are counted for.
        image_size: pixels that costs are counted for; None for text.
        probing: further options of `train_probes`.
        classes: labels to measure among, where the data have fewer classes than the anchors.
        healing: settings that are not `healing_config`'s.
    """

    name: str
    anchors: tuple[PreTrainedModel, PreTrainedModel]
    train: Any
    validation: Any
    fitting: Sequence[Any]
    scored: Sequence[Any]
    test: Sequence[Any]
    metric: str = "loss"
    tokens: int = 128
    image_size: int | None = None
    probing: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[int, ...] | None = None
    healing: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudySettings:
    """What is compared.

    Attributes:
        lengths: optimiser steps of healing; the least-squares start, 0, is always measured.
        seeds: of the healing, and of the random choice.
        buckets: of equal width from a fifth of the dear anchor's MACs to all of them.
        rivals: beside the search, some of `RIVALS`.
        search: settings of the search; how divergence is measured is set here.
        contenders: paths that the search names for each bucket.
        shares: of the dear anchor's MACs, ascending, between which the buckets lie instead; None: of equal width.

    Raises:
        ValueError: an unknown rival, no seed, or a number out of its range.
    """

    lengths: tuple[int, ...] = (0, 100, 300)
    seeds: tuple[int, ...] = (0, 1, 2)
    buckets: int = 10
    rivals: tuple[str, ...] = RIVALS
    search: SearchConfig = field(default_factory=SearchConfig)
    contenders: int = 4
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(sorted({0, *self.lengths})))
        if unknown := sorted(set(self.rivals) - set(RIVALS)):
            raise ValueError(f"got the rivals {unknown}; expected some of {list(RIVALS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"got seeds={self.seeds}; expected at least one, each once")
        if self.buckets < 1 or self.contenders < 1 or min(self.lengths) < 0:
            raise ValueError(
                f"got buckets={self.buckets}, contenders={self.contenders} and lengths={self.lengths}; expected at "
                "least 1 bucket and contender, and 0 steps or more"
            )


@dataclass(frozen=True)
class Choice:
    """What a rule takes in a bucket: a path, how its slices are joined, and its MACs."""

    path: Path
    joint: str
    macs: int


class EverySize:
    """The study of one family, in one output folder; what is done is not done again.

    Args:
        family: anchors and data.
        settings: what is compared.
        output: folder.

    Attributes:
        edges: MACs between which the buckets lie, one more than there are buckets.
        absent: rule → why it chooses nothing for these anchors.

    Raises:
        ValueError: the folder holds another study's rows.
    """

    def __init__(self, family: Family, settings: StudySettings, output: str | Folder):
        self.family, self.settings, self.output = family, settings, Folder(output)
        self.small, self.large = family.anchors
        self.made_from = [fingerprint(anchor) for anchor in family.anchors]
        run = {"study": "every size", "family": family.name, "anchors": self.made_from, "healing": dict(family.healing)}
        run["items"] = "of every model, held-out ones too"  # without them rows cannot be compared item by item
        run |= {name: len(getattr(family, name)) for name in ("train", "validation", "fitting", "scored", "test")}
        self.rows = RowFile(self.output / "rows.jsonl", run)
        self.costs = measure_path_costs(family.anchors, tokens=family.tokens, image_size=family.image_size)
        self.dearest = self.costs.of("1[:]").macs
        shares = np.linspace(CHEAPEST, 1, settings.buckets + 1) if settings.shares is None else settings.shares
        self.edges = np.array(shares) * self.dearest
        self.absent: dict[str, str] = {}
        self.say = partial(process_state().print, flush=True)

    def run(self, length: int) -> None:
        """Make, heal and measure whatever any rule chose, and both anchors, under every seed."""
        for seed in self.settings.seeds:
            with remember_answers(self.large):  # of the batches of this seed
                for of_bucket in self.chosen(length, seed):
                    for rule, choice in of_bucket.items():
                        for steps in sorted({0, length}):  # its start too, which functional KL is of
                            self.row(rule, choice, steps, seed)
                small, large = self.anchor_rows(length, seed)
            metric = self.family.metric
            self.say(
                f"  {length} steps, seed {seed}: {len(self.rows)} rows; anchors' {metric} {small.metrics[metric]:.4f} "
                f"and {large.metrics[metric]:.4f}"
            )

    def anchor_rows(self, length: int, seed: int) -> tuple[ResultRow, ResultRow]:
        """Both anchors, healed like all others."""
        choices = (Choice(Path.parse(text), "least_squares", self.costs.of(text).macs) for text in ("0[:]", "1[:]"))
        small, large = (self.row(ANCHORS, choice, length, seed) for choice in choices)
        return small, large

    def row(self, rule: str, choice: Choice, length: int, seed: int) -> ResultRow:
        """One model, measured now or before; where nothing is trained, a seed makes no other model."""
        healed: list[HealingResult] = []

        def make(path: Path) -> PreTrainedModel:
            model = self.start(path, choice.joint)
            if length:
                healed.append(self.heal(model, path, length, seed))
            return model

        def measure(model: PreTrainedModel) -> Measurement:
            measured = evaluate(model, self.family.test, classes=self.family.classes)
            items = items_of(model, self.family.test, self.family.classes)
            beside: dict[str, Any] = {"items": items if not choice.path.joints else {"quality": items["quality"]}}
            if str(choice.path) == "1[:]":
                beside["quantised"] = quantised(model, self._quality)
            if length:
                last = healed[-1]
                course = {"validation": last.training.validation, "kept": last.end, "rate": last.learning_rate}
                if self.family.image_size is not None:
                    course["held_out"] = last.training.examples
                course["distillation_weight"] = last.distillation_weight
                return Measurement(measured.metrics, {**measured.details, **beside, **course})
            divergence = evaluate_divergence(model, self.large, self.family.scored, classes=self.family.classes)
            return Measurement({**measured.metrics, "divergence": divergence}, {**measured.details, **beside})

        (row,) = evaluate_stitches(
            [choice.path], make, measure, rule=rule, rows=self.rows, anchors=self.made_from,
            training=self.training(length, seed), seed=seed if length else self.settings.seeds[0],
            tokens=self.family.tokens, setting={"joint": choice.joint},
        )  # fmt: skip
        return row

    def score(self, path: Path) -> float:
        """Functional KL of a path as the search scores it: its joints at least squares, merged where they can be."""
        merged = self.settings.search.merged and self.costs.mergeable(path)
        row = self.row("score", self._choice(path, "merged" if merged else "least_squares"), 0, self.settings.seeds[0])
        return row.metrics["divergence"]

    def training(self, length: int, seed: int) -> dict[str, Any] | None:
        """How a model is healed, as rows say it; None: it is not."""
        if not length:
            return None
        return asdict(self._config(length, seed)) | {"rates": RATES, "teacher": "the dear anchor"}

    def heal(
        self, model: PreTrainedModel, path: Path, length: int, seed: int, folder: Folder | None = None
    ) -> HealingResult:
        """Heal the model of a path in place; resumed from the folder where one is given."""
        teacher = None if str(path) == "1[:]" else self.large  # the dear anchor learns from the labels alone
        return heal(
            model, self.family.train, teacher=teacher, validation=self.family.validation,
            config=self._config(length, seed), output_dir=folder,
        )  # fmt: skip

    def _config(self, length: int, seed: int) -> TrainingConfig:
        return healing_config(length, **{"seed": seed, "eval_steps": max(1, length // 4)} | dict(self.family.healing))

    def _quality(self, model: PreTrainedModel) -> float:
        return evaluate(model, self.family.test, classes=self.family.classes).metrics[self.family.metric]

    def chosen(self, length: int, seed: int) -> list[dict[str, Choice]]:
        """By bucket, what each rule takes, ours after healing what the search names. A rule may take nothing."""
        found = []
        for low, high in zip(self.edges, self.edges[1:], strict=False):
            of_bucket: dict[str, Choice] = {}
            if (ours := self._best(high, length, seed)) is not None:
                of_bucket[OURS] = ours
                for rule in self.settings.rivals:
                    rival = self._rival(rule, length, seed, max(ours.macs, low), low, high)
                    if rival is not None:
                        of_bucket[rule] = rival
            found.append(of_bucket)
        return found

    @cached_property
    def scores(self) -> StitchScores:
        """Θ and Γ of every stitch of the two, by probes."""
        file = self.output / "scores.safetensors"
        if file.exists():
            return StitchScores.load(file)
        probes = [train_probes(anchor, self.family.fitting, **self.family.probing) for anchor in self.family.anchors]
        scores = score_stitches(
            self.small, self.large, self.family.scored, probes=(probes[0], probes[1]), tokens=self.family.tokens,
            score="klas",
        )  # fmt: skip
        if process_state().is_main_process:
            scores.save(file)
        return scores

    @cached_property
    def _found(self) -> dict[str, PathScores]:
        """What each search found."""
        scoring = FunctionalScoring(calibration=self.family.fitting, temperature=1.0)
        config = replace(self.settings.search, scoring=scoring)
        found = {}
        for name, changes in SEARCHES.items():
            if name == UNHEALED:
                found[name] = found[OURS]
            elif name in (OURS, *self.settings.rivals):
                found[name] = search_paths(
                    self.family.anchors, self.family.scored, replace(config, **changes), tokens=self.family.tokens,
                    output=self.output / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl",
                )  # fmt: skip
                self.say(f"  {name}: {found[name]}")
        return found

    def contenders(self, name: str, most: float, length: int, known: bool = True) -> list[Choice]:
        """What a search names within a cost, the dear anchor apart; that of least divergence first."""
        found = self._found[name]
        within = [cost.macs for cost in found.costs if cost.macs <= most and cost.macs < self.dearest]
        if not within:
            return []
        paths = found.contenders(Budget(macs=max(within)), self.settings.contenders, steps=length, known=known)
        return [self._choice(path, found.joint(path, steps=length, known=self._informed)) for path in paths]

    @cached_property
    def _informed(self) -> bool:
        """Whether the dear anchor knows the family's data."""
        return not knows_nothing(self.large, self.family.validation, self._config(1, self.settings.seeds[0]))

    def _choice(self, path: Path, joint: str) -> Choice:
        return Choice(path, joint, self.costs.of(path, identity=joint in ("merged", "identity")).macs)

    def _best(self, most: float, length: int, seed: int) -> Choice | None:
        """Of what the search names within a cost the best on validation data, once healed, as `heal_best` does it."""
        named = self.contenders(OURS, most, length)
        if len(named) < 2 or not length:
            return named[0] if named else None
        done: list[dict[str, Any]] = []
        known = True
        while len(done) < len(named):
            done.append(self.row(f"contender {len(done)}", named[len(done)], length, seed).details)
            if len(done) == 1 and not done[0]["distillation_weight"]:  # the dear anchor does not know these data
                named, known = self.contenders(OURS, most, length, known=False), False
        careful = known and self.family.image_size is not None
        examples = [details["held_out"] for details in done] if careful else ()
        return named[best_contender([details["kept"] for details in done], examples)]

    def _rival(
        self, rule: str, length: int, seed: int, wanted: float, low: float, high: float
    ) -> Choice | None:  # fmt: skip
        """Of a rule's paths of the cost wanted its best one, else the nearest in cost within the bucket."""
        if rule in SEARCHES:
            return next(iter(self.contenders(rule, high, length)), None)
        selection, macs = self._selections[rule]
        values = np.random.default_rng(seed).random(len(macs)) if rule == "random" else np.array(selection.values)
        apart = np.abs(macs - wanted)
        equal, inside = np.flatnonzero(apart <= EQUAL * wanted), np.flatnonzero((low < macs) & (macs <= high))
        if len(equal) and np.isfinite(values[equal]).all():
            place = equal[values[equal].argmin()]
        elif len(near := equal if len(equal) else inside):
            place = near[apart[near].argmin()]
        else:
            return None
        return Choice(selection.paths[place], selection.joint, int(macs[place]))

    @cached_property
    def _selections(self) -> dict[str, tuple[PathSelection, np.ndarray]]:
        """Rule → all its paths and their MACs."""
        found = {}
        for rule in self.settings.rivals:
            if rule not in SEARCHES:
                try:
                    chosen = self._selection(rule)
                except ValueError as error:  # anchors that a rule has no path for: kept, and told in the report
                    self.absent[rule] = str(error)
                    chosen = PathSelection((), (), (), rule)
                identity = chosen.joint in ("identity", "merged")
                macs = [self.costs.of(path, identity=identity).macs for path in chosen]
                found[rule] = chosen, np.array(macs, dtype=np.int64)
        return found

    def _selection(self, rule: str) -> PathSelection:
        tokens, costs = self.family.tokens, self.scores.costs
        every = int(costs.macs.size)
        stitches = {
            "klas": lambda: best_stitches(self.scores, count=every),
            "min_kl": lambda: min_kl_stitches(self.scores, count=every),
            "esta_proportional": lambda: esta_stitches(costs),
            "esta_index": lambda: esta_stitches(costs, mapping="index"),
            "snnet": lambda: snnet_stitches(costs),
            "random": lambda: random_stitches(costs, buckets=1, per_bucket=every),
        }
        if rule in stitches:
            return stitches[rule]().as_paths()
        if rule in PRUNING:
            return PRUNING[rule](self.large, self.family.fitting, tokens=tokens, place=1)
        return {"tail": tail_paths, "uniform": uniform_paths}[rule](self.large, tokens=tokens, place=1)

    def start(self, path: Path, joint: str) -> PreTrainedModel:
        """The model of a path as least squares, or what the rule has in its place, leaves it."""
        options: dict[str, Any] = {} if self.family.image_size is None else {"image_size": self.family.image_size}
        if path.joints:
            options |= {"joint": joint, "calibration": None if joint == "identity" else self.family.fitting}
        model: PreTrainedModel = StitchedModel.from_path(self.family.anchors, path, **options)
        return model.to(process_state().device)
