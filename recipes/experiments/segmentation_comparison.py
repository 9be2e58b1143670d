"""KLAS against the other rules on dense models: one path for every rule and cost bucket, each trained alike (Sec. 5.4).

    anchors ─► probes ─► scores, search ─► a path of every rule in each bucket ─► training, head frozen ─► rows

A path that two rules choose is trained once. All that is costly is kept in the output folder, so an interrupted
comparison goes on where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from klas_hf.anchors.images import VOID
from klas_hf.anchors.vision import VisionAnchor, load_vision_anchor
from klas_hf.costs import measure_costs, measure_path_costs
from klas_hf.data.images import ImageBatches
from klas_hf.data.segmentation import SegmentationSet
from klas_hf.evaluation import Measurement, evaluate, evaluate_stitches
from klas_hf.evaluation.segmentation import segmentation_scores
from klas_hf.models import StitchedModel
from klas_hf.paths import Path as AnchorPath
from klas_hf.probes import ImageProbeConfig
from klas_hf.probes.training import train_probes
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile
from klas_hf.scores.driver import score_stitches
from klas_hf.scores.functional_settings import FunctionalScoring
from klas_hf.scores.path_scores import PathScores
from klas_hf.scores.values import StitchScores
from klas_hf.selection.plan import SearchConfig
from klas_hf.selection.search import search_paths
from klas_hf.selection.snnet import snnet_stitches
from klas_hf.training import TrainingConfig, train_stitches

RULES = ("klas", "snnet", "functional", "search", "random")
_CHOICE = ("rules", "search_forwards")  # which paths are trained, not how
_WHOLES = [AnchorPath.parse("0[:]"), AnchorPath.parse("1[:]")]
SHOWN = 4  # test images whose predictions are kept, to be looked at


@dataclass(frozen=True)
class SegmentationTask:
    """Data of a comparison.

    Attributes:
        train: probes and paths learn from it.
        validation: paths are scored on it.
        test: everything is measured on it.
    """

    train: SegmentationSet
    validation: SegmentationSet
    test: SegmentationSet


@dataclass
class SegmentationSettings:
    """What is compared, and on how much data. Fields are options of the recipe."""

    rules: list[str] = field(
        default_factory=lambda: list(RULES), metadata={"help": f"selection rules: {', '.join(RULES)}"}
    )
    buckets: int = field(default=3, metadata={"help": "cost buckets of equal width between the anchors"})
    calibration_images: int = field(default=100, metadata={"help": "images that joints are fitted to"})
    scored_images: int = field(
        default=128, metadata={"help": "validation images that functional KL is measured on, drawn at random"}
    )
    batch_size: int = field(default=8, metadata={"help": "images per batch where nothing is trained"})
    probe_epochs: int = field(default=20, metadata={"help": "most epochs of the probes"})
    search_forwards: int | None = field(
        default=None, metadata={"help": "runs of a block on an image that the search may spend; None: its own default"}
    )
    temperature: float = field(default=1.0, metadata={"help": "softens both outputs that functional KL compares"})

    def __post_init__(self) -> None:
        if unknown := [rule for rule in self.rules if rule not in RULES]:
            raise ValueError(f"got the rules {unknown}; expected some of {RULES}")
        for name in ("buckets", "calibration_images", "scored_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least 1")


class SegmentationComparison:
    """One comparison in one output folder.

    Args:
        anchors: two dense models, Hub ids or folders, the cheaper one first.
        task: the data.
        settings: what is compared.
        training: of every path.
        output: folder of all results.
        about: anything else that the rows depend on, kept with them.

    Raises:
        ValueError: anchors in reversed order or of different classes, rows of another comparison in the folder.
    """

    def __init__(
        self, anchors: Sequence[Any], task: SegmentationTask, settings: SegmentationSettings,
        training: TrainingConfig, output: str | Path, about: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.task, self.settings, self.training, self.output = task, settings, training, Path(output)
        self.names = [Path(str(anchor)).name for anchor in anchors]
        self.anchors: list[VisionAnchor] = [load_vision_anchor(anchor) for anchor in anchors]
        self.anchors[0].check_like(self.anchors[1])
        self.models = [anchor.model.to(process_state().device) for anchor in self.anchors]
        self.macs = [measure_costs(model, image_size=task.train.size).macs for model in self.models]
        if self.macs != sorted(self.macs):
            raise ValueError(f"got anchors of {self.macs} MACs; expected the cheaper one first")
        self.fingerprints = [anchor.fingerprint for anchor in self.anchors]
        run = {name: value for name, value in asdict(settings).items() if name not in _CHOICE}
        run |= {"anchors": self.names, "fingerprints": self.fingerprints, "training": asdict(training)}
        run |= {"images": [len(one) for one in (task.train, task.validation, task.test)], "size": list(task.train.size)}
        self.rows = RowFile(self.output / "rows.jsonl", run | dict(about or {}))

    def run(self) -> None:
        """Measure the anchors, as they are and trained on, then every rule."""
        say = process_state().print
        for name, row in zip(self.names, self.anchor_rows(), strict=True):
            say(f"{name}: {row.macs / 1e6:,.1f} M MACs, mean IoU {row.metrics['mean_iou']:.4f}")
        for rule in ["anchor", *self.settings.rules]:
            for row in self.measured(rule):
                say(f"{rule}: {row.path} {row.macs / 1e6:,.1f} M MACs, mean IoU {row.metrics['mean_iou']:.4f}")

    def anchor_rows(self) -> list[ResultRow]:
        """The anchors as they were given, on the test images."""
        found = []
        for path in _WHOLES:
            found += evaluate_stitches(
                [path], self._assembled, self._measure_of(f"{path} as given"), rule="as given", rows=self.rows,
                anchors=self.fingerprints, training=None,
            )  # fmt: skip
        return found

    def measured(self, rule: str) -> list[ResultRow]:
        """The rows of a rule's paths, trained alike; those of "anchor" are the anchors, trained like the rest."""
        paths = _WHOLES if rule == "anchor" else self.selection(rule)
        found = []
        for path in paths:
            found += evaluate_stitches(
                [path], self._trained, self._measure_of(str(path)), rule=rule, rows=self.rows,
                anchors=self.fingerprints, training=asdict(self.training), seed=self.training.seed,
            )  # fmt: skip
        return found

    def selection(self, rule: str) -> list[AnchorPath]:
        """A rule's path of every bucket, cheapest first; a bucket without one of its paths gives none."""
        by_rule: dict[str, Callable[[], Mapping[AnchorPath, float]]] = {
            "klas": lambda: self._scored("klas"),
            "functional": lambda: self._scored("functional"),
            "snnet": self._snnet,
            "search": self._searched,
            "random": self._random,
        }
        values = by_rule[rule]()
        best: dict[int, AnchorPath] = {}
        for path in sorted(values, key=lambda one: (values[one], str(one))):
            place = self.bucket(path)
            if place is not None:
                best.setdefault(place, path)
        return [best[place] for place in sorted(best)]

    def bucket(self, path: AnchorPath) -> int | None:
        """The cost bucket of a path between the anchors; None outside."""
        share = (self._costs.of(path).macs - self.macs[0]) / (self.macs[1] - self.macs[0])
        return int(share * self.settings.buckets) if 0 < share < 1 else None

    @cached_property
    def scores(self) -> StitchScores:
        """Γ and functional KL of all stitches."""
        file = self.output / "scores.safetensors"
        if file.exists():
            return StitchScores.load(file)
        probes = [
            train_probes(
                anchor, self.batches(self.task.train), ImageProbeConfig(epochs=self.settings.probe_epochs),
                validation=self.batches(self.task.validation),
            )
            for anchor in self.anchors
        ]  # fmt: skip
        running = FunctionalScoring(
            calibration=self._calibration, temperature=self.settings.temperature,
            scored_items=self.settings.scored_images,
        )  # fmt: skip
        mixed = self._drawn(self.task.validation, len(self.task.validation))  # of which functional KL takes the first
        scores = score_stitches(*self.anchors, mixed, probes=probes, score="klas", functional=running)
        if process_state().is_main_process:
            scores.save(file)
        return scores

    @cached_property
    def found(self) -> PathScores:
        """What a search over paths of every kind has found."""
        scoring = FunctionalScoring(calibration=self._calibration, temperature=1.0, scored_items=None)
        # Merged joints change the anchor's own blocks, so that what is trained would not start alike.
        config = SearchConfig(
            buckets=2 * self.settings.buckets, cheapest=self.macs[0] / self.macs[1], merged=False, scoring=scoring,
            forwards=self.settings.search_forwards,
        )  # fmt: skip
        scored = self._drawn(self.task.validation, self.settings.scored_images)
        return search_paths(self.anchors, scored, config, output=self.output / "search.jsonl")

    def batches(self, images: SegmentationSet) -> ImageBatches:
        """Batches of images, as the anchors take them."""
        return ImageBatches(images, self.settings.batch_size, self.training.mean, self.training.std)

    @cached_property
    def _costs(self) -> Any:
        return measure_path_costs(self.models, image_size=self.task.train.size)

    @cached_property
    def _calibration(self) -> list[Any]:
        return list(self._drawn(self.task.train, self.settings.calibration_images))

    def _drawn(self, images: SegmentationSet, count: int) -> ImageBatches:
        """So many images at random, at most all; alike in every run."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return self.batches(images.select(order[:count].tolist()))

    def _scored(self, score: str) -> dict[AnchorPath, float]:
        one = self.scores.with_score(score)
        return {stitch.path: one.value_of(stitch) for stitch in one.stitches}

    def _snnet(self) -> dict[AnchorPath, float]:
        """SN-Net ranks nothing: of its stitches the one nearest to the middle of a bucket stands for the bucket."""
        width = (self.macs[1] - self.macs[0]) / self.settings.buckets
        chosen = [stitch.path for stitch in snnet_stitches(self.scores.costs)]
        return {path: abs((self._costs.of(path).macs - self.macs[0]) / width % 1 - 0.5) for path in chosen}

    def _searched(self) -> dict[AnchorPath, float]:
        found = self.found
        return {path: float(found.divergence[n]) for n, path in enumerate(found.paths) if path.joints}

    def _random(self) -> dict[AnchorPath, float]:
        stitches = self.scores.with_score("klas").stitches  # functional KL of some is not known
        drawn = np.random.default_rng(self.training.seed).random(len(stitches))
        return {stitch.path: float(value) for stitch, value in zip(stitches, drawn, strict=True)}

    def _assembled(self, path: AnchorPath) -> PreTrainedModel:
        return StitchedModel.from_path(
            self.models, path, calibration=self._calibration, image_size=self.task.train.size
        )

    def _trained(self, path: AnchorPath) -> PreTrainedModel:
        model = self._assembled(path)
        if self.training.max_steps != 0:
            train_stitches(
                model, self.task.train, self.training, teacher=self._teacher,
                output_dir=self.output / "checkpoints" / _slug(str(path)),
            )  # fmt: skip
        return model

    @property
    def _teacher(self) -> PreTrainedModel | None:
        return self.models[-1] if self.training.distillation_weight else None

    def _measure_of(self, name: str) -> Callable[[PreTrainedModel], Measurement]:
        def measure(model: PreTrainedModel) -> Measurement:
            measured = evaluate(model, self.batches(self.task.test))
            if process_state().is_main_process:
                file = self.output / "predictions" / f"{_slug(name)}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, predictions(model, self.batches(self.task.test)))
            return replace(measured, details=dict(measured.details))

        return measure

    def shown(self, name: str) -> np.ndarray:
        """What was predicted for the first test images, `(images, height, width)`."""
        return np.load(self.output / "predictions" / f"{_slug(name)}.npy")


@torch.no_grad()
def predictions(model: PreTrainedModel, batches: ImageBatches) -> np.ndarray:
    """Classes of the first `SHOWN` images, `(images, height, width)`; void where the label is."""
    first = next(iter(batches))
    masks = first["labels"][:SHOWN]
    scores = segmentation_scores(model.eval(), first["pixel_values"][:SHOWN], tuple(masks.shape[-2:]))
    return scores.argmax(1).cpu().where(masks != VOID, VOID).numpy().astype(np.uint8)


def _slug(name: str) -> str:
    return name.replace("[", "_").replace("]", "").replace(":", "-").replace(" ", "+")
