"""Which score holds, and for how long a fine-tuning? One pair of image anchors, every stitch, several lengths.

All stitches of a pair are trained in one supernet for each length (0 is the least-squares start) and seed, and a random
few alone; every score is measured once, before any training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from klas_hf.evaluation import evaluate_accuracy, evaluate_divergence
from klas_hf.models import StitchedModel
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow
from klas_hf.scores import StitchScores
from klas_hf.stitches import Stitch
from klas_hf.study import MeasuredStitch, measured_stitches
from klas_hf.tasks.image_comparison import ComparisonSettings, ImageComparison, ImageTask
from klas_hf.training import ImageTrainingConfig, train_stitches

METRIC = "accuracy"


@dataclass(frozen=True)
class StudySettings:
    """What a study varies.

    Attributes:
        lengths: fine-tuning lengths in optimiser steps, 0 for none.
        seeds: of the fine-tuning.
        adapted_steps: functional KL is measured again after so many steps of the stitching layer alone.
        alone: how many random stitches are also trained by themselves, at every length but 0.
    """

    lengths: tuple[int, ...] = (0, 100, 1000)
    seeds: tuple[int, ...] = (0,)
    adapted_steps: tuple[int, ...] = (1, 5)
    alone: int = 0


class ImageScoreStudy:
    """The study of one family, in one output folder; what is done is not done again.

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

    def __init__(
        self,
        name: str,
        anchors: Sequence[Any],
        names: Sequence[str],
        task: ImageTask,
        comparison: ComparisonSettings,
        training: ImageTrainingConfig,
        settings: StudySettings,
        output: str | Path,
    ):
        self.name, self.task, self.settings = name, task, settings
        self.training = training
        every = replace(comparison, rules=["every"], seeds=list(settings.seeds), pairs="all")
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
        """All scores of the pair, by probes and functional."""
        return self.first.scores[0]

    @cached_property
    def values(self) -> dict[str, dict[Stitch, float]]:
        """Score → stitch → value, lower is better: all of `SCORES`, cost itself, and functional KL after few steps."""
        found = {}
        for name in self.scores.available:
            one = self.scores.with_score(name)
            found[name] = {stitch: one.value_of(stitch) for stitch in one.stitches}
        # The dearest is expected to be the best: what any score must beat.
        found["cost"] = {stitch: 1 / self.scores.costs.of(stitch)[0] for stitch in self.scores.stitches}
        for steps in self.settings.adapted_steps:
            found[f"functional, {steps} steps"] = self._adapted(steps)
        return found

    def rows(self, length: int) -> list[ResultRow]:
        """Every stitch after so many steps in one supernet, under every seed."""
        run = self.runs[length]
        return [row for seed in self.settings.seeds for row in run.measured("every", seed) if row.stitch is not None]

    def stitches(self, length: int) -> list[MeasuredStitch]:
        """Every stitch with its accuracy and all its scores."""
        return measured_stitches(self.rows(length), METRIC, self.values)

    def alone_rows(self, length: int) -> list[ResultRow]:
        """A random few stitches, each trained by itself."""
        run, seed = self.runs[length], self.settings.seeds[0]
        every = sorted(self.scores.stitches)
        chosen = np.random.default_rng(0).permutation(len(every))[: self.settings.alone]
        found = []
        for stitch in (every[place] for place in chosen):
            row = run.rows.find("alone", stitch, seed)
            if row is None:
                model = self._start(stitch)
                config = replace(run.training, seed=seed, sampling="uniform")
                train_stitches(model, self.task.train, config)
                measured = evaluate_accuracy(model, run.batches(self.task.test), classes=self.task.classes)
                macs, parameters = self.scores.costs.of(stitch)
                pair = (stitch.source_stop, stitch.target_start)
                row = ResultRow("alone", pair, seed, macs, parameters, dict(measured.metrics))
                run.rows.append(row, to_disk=process_state().is_main_process)
            found.append(row)
        return found

    def _adapted(self, steps: int) -> dict[Stitch, float]:
        """Functional KL after a few steps of the stitching layer alone towards the target's outputs."""
        config = replace(
            self.training, trainable="stitch", max_steps=steps, distillation_weight=1.0, distillation="soft",
            warmup_ratio=0.0, mean=list(self.task.mean), std=list(self.task.std), seed=0,
        )  # fmt: skip
        found = {}
        validation = self.first.batches(self.task.validation, self.first.settings.scoring_images)
        for stitch in self.scores.stitches:
            model = self._start(stitch)
            train_stitches(model, self.task.train, config, teacher=self.target)
            found[stitch] = evaluate_divergence(model, self.target, validation)
        return found

    def _start(self, stitch: Stitch) -> PreTrainedModel:
        calibration = self.first.batches(self.task.train, self.first.settings.calibration_images)
        return StitchedModel.from_anchors(
            self.source, self.target, stitch, calibration=calibration, image_size=self.task.size
        )
