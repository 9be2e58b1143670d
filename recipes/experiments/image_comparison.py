"""KLAS against the other rules on images, at equal fine-tuning (KLAS Sec. 5; SN-Net's protocol).

    anchors ─► probes ─► scores ─► one selection per rule ─► one supernet per rule and seed ─► rows

Every rule's supernet starts from the same anchors by least squares and is fine-tuned for the same steps, one random
path per step. All that is costly is kept in the output folder, so an interrupted comparison goes on where it stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any, get_args

import numpy as np
from transformers import AutoModelForImageClassification, PreTrainedModel

from klas_hf import plotting
from klas_hf.anchors.vision import VisionAnchor, check_labels, load_vision_anchor
from klas_hf.costs import measure_costs, measure_stitch_costs
from klas_hf.curves.cascades import CascadeMember, cascade_curve, to_rows
from klas_hf.data.image_data import ImageTask
from klas_hf.data.images import ImageSet, image_batches
from klas_hf.evaluation import evaluate, evaluate_supernet, predict_probabilities
from klas_hf.evaluation.supernets import supernet_rows
from klas_hf.paths import Stitch
from klas_hf.probes import ImageProbeConfig, ImageProbeNet
from klas_hf.probes.training import train_probes
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile
from klas_hf.scores.compared import ImageScoring
from klas_hf.scores.driver import score_stitches
from klas_hf.scores.functional_settings import FunctionalScoring
from klas_hf.scores.values import NEEDED, SCORES, STITCHED, StitchScores
from klas_hf.selection.anchor_distances import select_anchors
from klas_hf.selection.anchors import AnchorRule, AnchorSelection
from klas_hf.selection.choice import StitchSelection, merge_selections
from klas_hf.selection.klas import select_stitches
from klas_hf.selection.rivals import min_kl_stitches, random_stitches
from klas_hf.selection.snnet import Stages, snnet_groups, snnet_stitches
from klas_hf.stitch_costs import StitchCosts
from klas_hf.stitching import StitchedSupernet
from klas_hf.training import TrainingConfig, train_stitches

RULES = (*SCORES, "snnet", "min_kl", "random", "every")


@dataclass
class ComparisonSettings:
    """What is compared, and on how much data. Fields are options of the recipes."""

    rules: list[str] = field(
        default_factory=lambda: ["klas", "snnet", "min_kl", "cka", "random"],
        metadata={"help": f"selection rules: {', '.join(RULES)}; 'every' trains all stitches, for correlations"},
    )
    pairs: AnchorRule = field(
        default="least_kl", metadata={"help": "anchors to stitch: 'least_kl' (KLAS), 'nearest' (SN-Net), 'all'"}
    )
    buckets: int = field(default=20, metadata={"help": "cost buckets between two anchors"})
    threshold: float = field(default=0.05, metadata={"help": "tau of Eq. 3, relative"})
    snnet_stages: Stages = field(
        default="all_but_last", metadata={"help": "stages that SN-Net stitches: 'all_but_last', or 'middle' (ResNets)"}
    )
    most_stitches: int | None = field(
        default=None, metadata={"help": "of the rule 'every', at most so many, spread over cost; None: all"}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "seeds of the fine-tuning"})
    calibration_images: int = field(default=100, metadata={"help": "images of the least-squares start (SN-Net: 100)"})
    scoring_images: int | None = field(default=None, metadata={"help": "validation images to score on; None: all"})
    batch_size: int = field(default=64, metadata={"help": "images per batch where nothing is trained"})
    probe_epochs: int = field(default=20, metadata={"help": "most epochs of the probes"})
    temperature: float = field(default=4.0, metadata={"help": "softens both outputs that functional KL compares"})
    recalibrate: bool = field(
        default=False, metadata={"help": "take BatchNorm statistics anew for every stitch before it is measured"}
    )
    teacher: str = field(
        default="none", metadata={"help": "for distillation: 'none', 'target' (the dearest anchor), a Hub id or folder"}
    )

    def __post_init__(self) -> None:
        if unknown := [rule for rule in self.rules if rule not in RULES]:
            raise ValueError(f"got the rules {unknown}; expected some of {RULES}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"got seeds={self.seeds}; expected at least one, each once")
        for name, value, known in (
            ("pairs", self.pairs, get_args(AnchorRule)),
            ("snnet_stages", self.snnet_stages, get_args(Stages)),
        ):
            if value not in known:
                raise ValueError(f"got {name}={value!r}; expected one of {known}")
        if self.buckets < 1 or not self.threshold >= 0:
            raise ValueError(
                f"got buckets={self.buckets} and threshold={self.threshold}; expected at least 1, and 0 or more"
            )


class ImageComparison:
    """One comparison in one output folder.

    Args:
        anchors: Hub ids, folders or models, in order of cost.
        names: of the anchors, for tables.
        task: the data.
        settings: what is compared.
        training: of the supernets; its seed, mean and std are set here.
        output: folder of all results.
        about: anything else that the rows depend on, kept with them.

    Raises:
        ValueError: anchors not in order of cost or without a name each, a teacher without distillation or the other
            way round, rows of another comparison in the folder.
    """

    def __init__(
        self,
        anchors: Sequence[Any],
        names: Sequence[str],
        task: ImageTask,
        settings: ComparisonSettings,
        training: TrainingConfig,
        output: str | Path,
        about: dict[str, Any] | None = None,
    ):
        if len(names) != len(anchors):
            raise ValueError(f"got {len(names)} names for {len(anchors)} anchors; expected one each")
        if (settings.teacher == "none") != (training.distillation_weight == 0):
            raise ValueError(
                f"got teacher={settings.teacher!r} with distillation_weight={training.distillation_weight}; expected a "
                "teacher and a weight above 0, or neither"
            )
        self.anchors: list[VisionAnchor] = [load_vision_anchor(anchor) for anchor in anchors]
        device = process_state().device
        for anchor, name in zip(self.anchors, names, strict=True):
            anchor.model.to(device)
            # Models in memory have no name of their own but their class's, the same for all of a family.
            anchor.name = anchor.path or name
        self.names, self.task, self.settings, self.output = list(names), task, settings, Path(output)
        self.training = replace(training, mean=list(task.mean), std=list(task.std))
        self.macs = [measure_costs(anchor.config, image_size=task.size).macs for anchor in self.anchors]
        if self.macs != sorted(self.macs):
            raise ValueError(f"got anchors of {self.macs} MACs; expected them in order of cost, cheapest first")
        run = {name: value for name, value in asdict(settings).items() if name not in ("rules", "seeds")}
        run |= {"anchors": self.names, "fingerprints": [anchor.fingerprint for anchor in self.anchors]}
        run |= {"training": asdict(self.training), "images": [len(s) for s in (task.train, task.validation, task.test)]}
        run |= {"size": list(task.size), "classes": None if task.classes is None else list(task.classes)}
        self.rows = RowFile(self.output / "rows.jsonl", run | (about or {}))
        self._costs: dict[tuple[int, int], StitchCosts] = {}
        self._print = process_state().print

    def run(self) -> None:
        """Measure the anchors, then every rule under every seed."""
        for name, row in zip(self.names, self.anchor_rows(), strict=True):
            self._print(f"{name}: {row.macs / 1e6:,.1f} M MACs, accuracy {row.metrics['accuracy']:.4f}")
        for rule in self.settings.rules:
            chosen = self.selection(rule, self.settings.seeds[0])
            self._print(
                f"{rule}: {len(chosen)} stitches; {chosen.candidates} candidates lie between the anchors' costs, "
                f"{chosen.outside} outside"
            )
        for seed in self.settings.seeds:
            for rule in self.settings.rules:
                self.measured(rule, seed)

    def anchor_rows(self) -> list[ResultRow]:
        """The anchors as they were given, on the test images."""
        found = []
        for place, anchor in enumerate(self.anchors):
            like = ResultRow("anchor", f"{place}[:]", 0, 0, 0, {}, made_from=[anchor.fingerprint])
            row = self.rows.find(like)
            if row is None:
                measured = evaluate(anchor.model, self.batches(self.task.test), classes=self.task.classes)
                cost = measure_costs(anchor.config, image_size=self.task.size)
                row = replace(
                    like, macs=cost.macs, parameters=cost.parameters, metrics=dict(measured.metrics),
                    details={"name": self.names[place]} | measured.details,
                )  # fmt: skip
                self.rows.append(row, to_disk=process_state().is_main_process)
            found.append(row)
        return found

    def cascade_rows(self) -> list[ResultRow]:
        """Two-model cascades of the cheapest and the dearest anchor (KLAS App. E), thresholds swept."""
        (small, labels), (large, _) = (
            predict_probabilities(anchor.model, self.batches(self.task.test), classes=self.task.classes)
            for anchor in (self.anchors[0], self.anchors[-1])
        )
        thresholds = [number / 20 for number in range(21)] + [0.97, 0.99, 0.999]
        members = (
            CascadeMember.of_probabilities(predicted, labels, macs)
            for predicted, macs in ((small, self.macs[0]), (large, self.macs[-1]))
        )
        return to_rows(cascade_curve(*members, thresholds))

    @cached_property
    def pairs(self) -> AnchorSelection:
        """Which anchors are stitched."""
        chosen = select_anchors(
            self.anchors, self.batches(self.task.validation, self.settings.scoring_images), rule=self.settings.pairs
        )
        return replace(chosen, names=tuple(self.names))

    @cached_property
    def probes(self) -> list[ImageProbeNet]:
        """Probes of every anchor, on the true labels."""
        return [self._probes(place, shuffled=False) for place in range(len(self.anchors))]

    @cached_property
    def scores(self) -> list[StitchScores]:
        """Scores of every pair of anchors."""
        return [self._scores(pair) for pair in self.pairs.pairs]

    def costs(self, rule: str = "least_kl") -> list[StitchCosts]:
        """Costs of all stitches of the pairs that an anchor rule chooses; "nearest" are SN-Net's."""
        pairs = self.pairs.pairs
        if rule == "nearest":
            pairs = tuple((place, place + 1) for place in range(len(self.anchors) - 1))
        for one, other in pairs:
            if (one, other) not in self._costs:
                configs = self.anchors[one].config, self.anchors[other].config
                counted = measure_stitch_costs(*configs, image_size=self.task.size, positions=(one, other))
                self._costs[one, other] = counted
        return [self._costs[pair] for pair in pairs]

    def selection(self, rule: str, seed: int) -> StitchSelection:
        """The stitches that a rule chooses; only a random choice depends on the seed."""
        settings = self.settings
        if rule in SCORES:
            scores = [one.with_score(rule) for one in self.scores]
            return select_stitches(scores, buckets=settings.buckets, threshold=settings.threshold)
        others: dict[str, Callable[[], StitchSelection]] = {
            "snnet": lambda: snnet_stitches(self.costs("nearest"), stages=settings.snnet_stages),
            "min_kl": lambda: min_kl_stitches(self.scores, count=len(self.selection("klas", seed))),
            "random": lambda: random_stitches(self.costs(), buckets=settings.buckets, seed=seed),
            "every": self._every,
        }
        return others[rule]()

    def measured(self, rule: str, seed: int) -> list[ResultRow]:
        """The rows of one rule's supernet after fine-tuning; made where they are missing."""
        chosen = self.selection(rule, seed)
        tuned = asdict(replace(self.training, seed=seed)) | {"teacher": self.settings.teacher}
        training = tuned if self.training.max_steps else None
        if (found := supernet_rows(self.rows, chosen, rule=rule, seed=seed, training=training)) is not None:
            return found
        supernet = self._trained(chosen, rule, seed)
        recalibration = self.batches(self.task.train, self.settings.calibration_images)
        rows = evaluate_supernet(
            supernet, self.batches(self.task.test), rule=rule, rows=self.rows, seed=seed, training=training,
            classes=self.task.classes, recalibration=recalibration if self.settings.recalibrate else None,
        )  # fmt: skip
        best = max(row.metrics["accuracy"] for row in rows)
        self._print(f"  {rule}, seed {seed}: {len(rows)} paths measured, best accuracy {best:.4f}")
        return rows

    def batches(self, images: ImageSet, count: int | None = None) -> Any:
        """Normalised batches of a set, or of so many of its images."""
        count = None if count is None or count >= len(images) else count
        return image_batches(images, self.settings.batch_size, self.task.mean, self.task.std, count)

    def plot(self) -> None:
        """Heatmaps of the scores, accuracy of the probes, and the anchors' divergences."""
        self.pairs.plot(self.output / "anchors")
        for scores in self.scores:
            scores.plot(self.output / f"heatmap-{scores.costs.source}-{scores.costs.target}")
        accuracy = {name: one.config.accuracy or [] for name, one in zip(self.names, self.probes, strict=True)}
        plotting.probe_accuracy(accuracy, self.output / "probes")

    def _every(self) -> StitchSelection:
        every = merge_selections(
            [random_stitches(one, buckets=1, per_bucket=int(one.possible.sum())) for one in self.costs()], rule="every"
        )
        return every if self.settings.most_stitches is None else every.spread(self.settings.most_stitches)

    def _trained(self, chosen: StitchSelection, rule: str, seed: int) -> StitchedSupernet:
        supernet = StitchedSupernet.from_anchors(
            self.anchors, list(chosen), image_size=self.task.size,
            shared=snnet_groups(chosen, self.costs("nearest")) if rule == "snnet" else None,
            calibration=self.batches(self.task.train, self.settings.calibration_images),
        )  # fmt: skip
        if self.training.max_steps == 0:
            return supernet  # as it starts
        config = replace(self.training, seed=seed)
        result = train_stitches(
            supernet, self.task.train, config, teacher=self._teacher(),
            output_dir=self.output / "checkpoints" / f"{rule}-seed-{seed}",
        )  # fmt: skip
        self._print(
            f"  {rule}, seed {seed}: {result.steps} steps in {result.seconds:.0f} s, "
            f"loss {result.losses[0]:.3f} → {result.losses[-1]:.3f}"
        )
        return supernet

    def _teacher(self) -> PreTrainedModel | None:
        if self.settings.teacher == "none":
            return None
        return self.anchors[-1].model if self.settings.teacher == "target" else self._named_teacher

    @cached_property
    def _named_teacher(self) -> PreTrainedModel:
        teacher = AutoModelForImageClassification.from_pretrained(self.settings.teacher, use_safetensors=True)
        check_labels(teacher.config, self.anchors[-1].config)
        return teacher.eval()

    def _probes(self, place: int, *, shuffled: bool) -> ImageProbeNet:
        folder = self.output / f"probes-{place}{'-shuffled' if shuffled else ''}"
        if (folder / "model.safetensors").exists():
            return ImageProbeNet.from_pretrained(folder).to(self.anchors[place].device)
        probes = train_probes(
            self.anchors[place],
            self.batches(self.task.train),
            ImageProbeConfig(epochs=self.settings.probe_epochs, shuffled_labels=shuffled),
            validation=self.batches(self.task.validation),
        )
        if process_state().is_main_process:
            part = folder.with_name(f".{folder.name}.part")
            rmtree(part, ignore_errors=True)
            probes.save_pretrained(part)
            rmtree(folder, ignore_errors=True)
            part.rename(folder)
        return probes

    def _scores(self, pair: tuple[int, int]) -> StitchScores:
        path = self.output / f"scores-{pair[0]}-{pair[1]}.safetensors"
        wanted = {
            name for rule in self.settings.rules for name in NEEDED.get(rule, STITCHED if rule == "every" else ())
        }
        functional = not wanted.isdisjoint(STITCHED)
        if path.exists():
            stored = StitchScores.load(path)
            if not functional or set(STITCHED) <= set(stored.available):
                return stored
        configs = [self.anchors[place].config for place in pair]
        costs = measure_stitch_costs(*configs, image_size=self.task.size, positions=tuple(pair))
        every = [Stitch(i + 1, j, *pair) for i, j in np.argwhere(costs.possible).tolist() if j > 0]
        running = FunctionalScoring(
            calibration=self.batches(self.task.train, self.settings.calibration_images),
            candidates=every,
            temperature=self.settings.temperature,
            scored_items=None,
        )
        shuffled = tuple(self._probes(place, shuffled=True) for place in pair)
        scores = score_stitches(
            self.anchors[pair[0]],
            self.anchors[pair[1]],
            self.batches(self.task.validation, self.settings.scoring_images),
            probes=(self.probes[pair[0]], self.probes[pair[1]]),
            images=ImageScoring(shuffled=(shuffled[0], shuffled[1])),
            functional=running if functional else None,
            positions=pair,
            score="klas",
        )
        if process_state().is_main_process:
            scores.save(path)
        return scores
