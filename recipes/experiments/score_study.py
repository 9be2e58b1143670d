"""Which score holds, and for how long a fine-tuning? One pair of anchors, every stitch, several lengths.

All stitches of a pair are trained in one supernet for each length (0 is the least-squares start) and seed, and a random
few alone; every score is measured once, before any training.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.image_comparison import ComparisonSettings, ImageComparison, ImageTask
from experiments.study import MeasuredStitch, measured_stitches
from klas_hf.evaluation import evaluate, evaluate_divergence
from klas_hf.files import write_atomically
from klas_hf.models import StitchedModel
from klas_hf.paths import Stitch
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile
from klas_hf.scores.driver import score_stitches
from klas_hf.scores.functional_settings import FunctionalScoring
from klas_hf.scores.values import StitchScores
from klas_hf.training import TrainingConfig, train_stitches

Values = dict[Stitch, float]


@dataclass(frozen=True)
class StudySettings:
    """What a study varies.

    Attributes:
        lengths: fine-tuning lengths in optimiser steps, 0 for none.
        seeds: of the fine-tuning.
        adapted_steps: functional KL is measured again after so many steps of the stitching layer alone.
        alone: how many random stitches are also trained by themselves, at every length but 0.
        samples: functional KL is measured again on so many images or sequences, half to fit and half to score.
        temperatures: and at these temperatures.
    """

    lengths: tuple[int, ...] = (0, 100, 1000)
    seeds: tuple[int, ...] = (0,)
    adapted_steps: tuple[int, ...] = (1, 5)
    alone: int = 0
    samples: tuple[int, ...] = (16, 32, 64, 128)
    temperatures: tuple[float, ...] = (0.5, 2.0, 4.0)


class ScoreStudy(ABC):
    """The study of one family; what is done is not done again.

    Attributes:
        name: of the family.
        metric: key of the rows' metrics that says how good a stitch is.
        higher_is_better: of that metric.
        source, target: the two anchors.
        output: folder of all that is kept.
    """

    metric: str
    higher_is_better: bool

    def __init__(self, name: str, settings: StudySettings, output: str | Path):
        self.name, self.settings, self.output = name, settings, Path(output)
        self.source: PreTrainedModel
        self.target: PreTrainedModel

    @property
    @abstractmethod
    def scores(self) -> StitchScores:
        """All scores of the pair, by probes and functional."""

    @abstractmethod
    def rows(self, length: int) -> list[ResultRow]:
        """Every stitch after so many steps in one supernet, under every seed."""

    @abstractmethod
    def calibration(self, count: int | None = None, *, scrambled: bool = False) -> Sequence[Any]:
        """Batches to fit least-squares maps to: of so many images or sequences, or of as many as the scores use."""

    @abstractmethod
    def scored(self, count: int | None = None, *, scrambled: bool = False) -> Sequence[Any]:
        """Batches to score on."""

    @abstractmethod
    def adapted(self, stitch: Stitch, steps: int) -> float:
        """Functional KL after a few steps of the stitching layer alone towards the target's outputs."""

    @abstractmethod
    def row_alone(self, stitch: Stitch, length: int) -> ResultRow:
        """A stitch that was trained by itself, measured."""

    @cached_property
    def values(self) -> dict[str, Values]:
        """Score → stitch → value, lower is better: all of `SCORES` (functional KL at temperature 1), cost itself, and
        functional KL at other temperatures and after few steps."""
        found = {}
        for name in self.scores.available:
            one = self.scores.with_score(name)
            found[name] = {stitch: one.value_of(stitch) for stitch in one.stitches}
        # The dearest is expected to be the best: what any score must beat.
        found["cost"] = {stitch: 1 / self.scores.costs.of(stitch)[0] for stitch in self.scores.stitches}
        for temperature in self.settings.temperatures:
            found[f"functional, temperature {temperature:g}"] = self.variants[f"temperature {temperature:g}"]
        for steps in self.settings.adapted_steps:
            name = f"functional, {steps} steps"
            found[name] = self._kept(name, partial(self._adapted_all, steps))
        return found

    @cached_property
    def variants(self) -> dict[str, Values]:
        """Functional KL measured otherwise: on few samples, at other temperatures, on scrambled data."""
        measured: dict[str, Callable[[], Values]] = {}
        for count in self.settings.samples:
            measured[f"{count} samples"] = partial(self._sampled, count)
        for temperature in self.settings.temperatures:
            measured[f"temperature {temperature:g}"] = partial(self._at_temperature, temperature)
        measured["fitted to scrambled data"] = partial(self._scrambled, fit_only=True)
        measured["fitted to and scored on scrambled data"] = partial(self._scrambled, fit_only=False)
        return {name: self._kept(name, measure) for name, measure in measured.items()}

    def functional(self, calibration: Sequence[Any], scored: Sequence[Any], temperature: float = 1.0) -> Values:
        """Functional KL of every stitch."""
        settings = FunctionalScoring(calibration, self.scores.stitches, temperature, scored_items=None)
        found = score_stitches(self.source, self.target, scored, score="functional", functional=settings)
        return {stitch: found.value_of(stitch) for stitch in self.scores.stitches}

    def stitches(self, length: int) -> list[MeasuredStitch]:
        """Every stitch with its quality and all its scores."""
        return measured_stitches(self.rows(length), self.metric, self.values, higher_is_better=self.higher_is_better)

    def with_variants(self, length: int) -> list[MeasuredStitch]:
        """Every stitch with its quality and the functional scores only."""
        values = {"functional": self.values["functional"]} | self.variants
        return measured_stitches(self.rows(length), self.metric, values, higher_is_better=self.higher_is_better)

    def seeds(self, length: int) -> tuple[int, ...]:
        """Seeds of a fine-tuning; where there is none, nothing is random."""
        return self.settings.seeds if length else self.settings.seeds[:1]

    def alone_rows(self, length: int) -> list[ResultRow]:
        """A random few stitches, each trained by itself."""
        every = sorted(self.scores.stitches)
        chosen = np.random.default_rng(0).permutation(len(every))[: self.settings.alone]
        return [self.row_alone(every[place], length) for place in chosen]

    def _adapted_all(self, steps: int) -> Values:
        return {stitch: self.adapted(stitch, steps) for stitch in self.scores.stitches}

    def _sampled(self, count: int) -> Values:
        return self.functional(self.calibration(count // 2), self.scored(count - count // 2))

    def _at_temperature(self, temperature: float) -> Values:
        return self.functional(self.calibration(), self.scored(), temperature)

    def _scrambled(self, fit_only: bool) -> Values:
        return self.functional(self.calibration(scrambled=True), self.scored(scrambled=not fit_only))

    def _kept(self, name: str, measure: Callable[[], Values]) -> Values:
        """Values of one score, read where they were measured before."""
        path = self.output / f"{name.replace(' ', '-')}.json"
        if path.exists():
            return {Stitch(*stitch): value for stitch, value in json.loads(path.read_text(encoding="utf-8"))}
        values = measure()
        if process_state().is_main_process:
            lines = [[[s.source_stop, s.target_start, s.source, s.target], value] for s, value in values.items()]
            write_atomically(path, lambda part: part.write_text(json.dumps(lines), encoding="utf-8"))
        return values

    def alone(self, stitch: Stitch, config: TrainingConfig) -> ResultRow:
        """The row of a stitch that is trained by itself, without its figures."""
        macs, parameters = self.scores.costs.of(stitch)
        return ResultRow("alone", stitch, config.seed, macs, parameters, {}, training=asdict(config))

    def kept_alone(self, rows: RowFile, row: ResultRow, metrics: dict[str, float]) -> ResultRow:
        """The row with its figures, written."""
        row = replace(row, metrics=metrics)
        rows.append(row, to_disk=process_state().is_main_process)
        return row


class ImageScoreStudy(ScoreStudy):
    """The study of one family of image classifiers, in one output folder.

    Args:
        name: of the family.
        anchors: source and target.
        names: of the anchors.
        task: the data.
        comparison: how scores are measured.
        training: of the supernets; its length and seed are set here.
        settings: what is varied.
        output: folder.
    """

    metric, higher_is_better = "accuracy", True

    def __init__(
        self,
        name: str,
        anchors: Sequence[Any],
        names: Sequence[str],
        task: ImageTask,
        comparison: ComparisonSettings,
        training: TrainingConfig,
        settings: StudySettings,
        output: str | Path,
    ):
        super().__init__(name, settings, output)
        self.task, self.training = task, training
        every = replace(comparison, rules=["every"], seeds=list(settings.seeds), pairs="all", temperature=1.0)
        self.runs = {
            length: ImageComparison(
                anchors, names, task, every, replace(training, max_steps=length), Path(output) / f"{length}-steps"
            )
            for length in settings.lengths
        }
        self.first = self.runs[settings.lengths[0]]
        self.source, self.target = (anchor.model for anchor in self.first.anchors)

    @cached_property
    def scores(self) -> StitchScores:
        return self.first.scores[0]

    def rows(self, length: int) -> list[ResultRow]:
        run = self.runs[length]
        return [row for seed in self.seeds(length) for row in run.measured("every", seed) if row.joints]

    def calibration(self, count: int | None = None, *, scrambled: bool = False) -> list[Any]:
        count = self.first.settings.calibration_images if count is None else count
        return _batches(self.first.batches(self.task.train, count), scrambled)

    def scored(self, count: int | None = None, *, scrambled: bool = False) -> list[Any]:
        count = self.first.settings.scoring_images if count is None else count
        return _batches(self.first.batches(self.task.validation, count), scrambled)

    def adapted(self, stitch: Stitch, steps: int) -> float:
        config = replace(
            self.training, trainable="stitch", max_steps=steps, distillation_weight=1.0, distillation="soft",
            warmup_ratio=0.0, mean=list(self.task.mean), std=list(self.task.std), seed=0,
        )  # fmt: skip
        model = self._start(stitch)
        train_stitches(model, self.task.train, config, teacher=self.target)
        return evaluate_divergence(model, self.target, self.scored())

    def row_alone(self, stitch: Stitch, length: int) -> ResultRow:
        run, seed = self.runs[length], self.settings.seeds[0]
        config = replace(run.training, seed=seed, sampling="uniform")
        row = self.alone(stitch, config)
        if (there := run.rows.find(row)) is not None:
            return there
        model = self._start(stitch)
        train_stitches(model, self.task.train, config)
        measured = evaluate(model, run.batches(self.task.test), classes=self.task.classes)
        return self.kept_alone(run.rows, row, dict(measured.metrics))

    def _start(self, stitch: Stitch) -> PreTrainedModel:
        return StitchedModel.from_anchors(
            self.source,
            self.target,
            stitch,
            calibration=self.calibration(),
            image_size=self.task.size,
            calibration_items=self.first.settings.calibration_images,
        )


def _batches(batches: Any, scrambled: bool) -> list[dict[str, Tensor]]:
    """Batches of images; scrambled, their pixels change places, in all images alike."""
    if not scrambled:
        return list(batches)
    return [{**batch, "pixel_values": _shuffled_pixels(batch["pixel_values"])} for batch in batches]


def _shuffled_pixels(pixels: Tensor) -> Tensor:
    places = pixels.shape[-2] * pixels.shape[-1]
    order = torch.randperm(places, generator=torch.Generator().manual_seed(0))
    return pixels.flatten(-2)[..., order].view_as(pixels)
