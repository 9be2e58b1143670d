"""The study of scores on language models: every stitch of one pair in one supernet, its loss against its scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from experiments.score_study import ScoreStudy, StudySettings
from klas_hf.anchors.language import load_anchor
from klas_hf.costs import measure_stitch_costs
from klas_hf.data.text import TextBatches, text_examples
from klas_hf.evaluation import evaluate, evaluate_divergence, evaluate_supernet
from klas_hf.evaluation.supernets import supernet_rows
from klas_hf.models import StitchedModel
from klas_hf.paths import Stitch
from klas_hf.probes.training import train_probes
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile
from klas_hf.scores.driver import score_stitches
from klas_hf.scores.functional_settings import FunctionalScoring
from klas_hf.scores.values import StitchScores
from klas_hf.selection.rivals import random_stitches
from klas_hf.stitching import StitchedSupernet
from klas_hf.training import TrainingConfig, train_stitches


@dataclass(frozen=True)
class TextTask:
    """Sequences of token ids.

    Attributes:
        train: supernets and probes learn from them, and least-squares maps are fitted to the first of them.
        validation: stitches are scored on them.
        test: everything is measured on them.
        length: of the sequences that costs are counted for.
        batch_size: sequences per batch where nothing is trained.
        calibration: number of sequences that the least-squares maps of stitches are fitted to.
        probing: number of sequences that probes are fitted to.
    """

    train: Sequence[Sequence[int]]
    validation: Sequence[Sequence[int]]
    test: Sequence[Sequence[int]]
    length: int
    batch_size: int = 32
    calibration: int = 128
    probing: int = 1024


class LanguageScoreStudy(ScoreStudy):
    """The study of one pair of causal language models, in one output folder.

    Args:
        name: of the family.
        anchors: source and target: Hub ids, folders or models.
        task: the data.
        training: of the supernets; its length and seed are set here.
        settings: what is varied.
        output: folder.
    """

    metric, higher_is_better = "loss", False

    def __init__(
        self,
        name: str,
        anchors: Sequence[Any],
        task: TextTask,
        training: TrainingConfig,
        settings: StudySettings,
        output: str | Path,
    ):
        super().__init__(name, settings, output)
        self.task, self.training = task, training
        loaded = [load_anchor(anchor) for anchor in anchors]
        self.source, self.target = (anchor.model.to(process_state().device) for anchor in loaded)
        run: dict[str, Any] = {"anchors": [anchor.fingerprint for anchor in loaded], "training": vars(training)}
        run |= {"sequences": [len(part) for part in (task.train, task.validation, task.test)], "length": task.length}
        run |= {"calibration": task.calibration, "probing": task.probing}
        self.files = {
            length: RowFile(self.output / f"{length}-steps" / "rows.jsonl", run | {"steps": length})
            for length in settings.lengths
        }

    @cached_property
    def scores(self) -> StitchScores:
        path = self.output / "scores.safetensors"
        if path.exists():
            return StitchScores.load(path)
        probing = TextBatches(self.task.train[: self.task.probing], self.task.batch_size)
        probes = train_probes(self.source, probing), train_probes(self.target, probing)
        scores = score_stitches(
            self.source, self.target, self.scored(), probes=probes, score="klas", tokens=self.task.length,
            functional=FunctionalScoring(calibration=self.calibration(), temperature=1.0, scored_items=None),
        )  # fmt: skip
        if process_state().is_main_process:
            scores.save(path)
        return scores

    def rows(self, length: int) -> list[ResultRow]:
        return [row for seed in self.seeds(length) for row in self._rows(length, seed) if row.joints]

    def calibration(self, count: int | None = None, *, scrambled: bool = False) -> list[Any]:
        sequences = self.task.train[: self.task.calibration if count is None else count]
        return list(TextBatches(_shuffled_tokens(sequences) if scrambled else sequences, self.task.batch_size))

    def scored(self, count: int | None = None, *, scrambled: bool = False) -> list[Any]:
        sequences = self.task.validation[:count]
        return list(TextBatches(_shuffled_tokens(sequences) if scrambled else sequences, self.task.batch_size))

    def adapted(self, stitch: Stitch, steps: int) -> float:
        config = replace(
            self.training, trainable="stitch", max_steps=steps, distillation_weight=1.0, warmup_ratio=0.0, seed=0
        )
        model = self._start(stitch)
        train_stitches(model, text_examples(self.task.train), config, teacher=self.target)
        return evaluate_divergence(model, self.target, self.scored())

    def row_alone(self, stitch: Stitch, length: int) -> ResultRow:
        rows, seed = self.files[length], self.settings.seeds[0]
        config = replace(self.training, max_steps=length, seed=seed)
        row = self.alone(stitch, config)
        if (there := rows.find(row)) is not None:
            return there
        model = self._start(stitch)
        train_stitches(model, text_examples(self.task.train), config)
        return self.kept_alone(rows, row, {"loss": evaluate(model, self._test).metrics["loss"]})

    @cached_property
    def _every(self) -> list[Stitch]:
        costs = measure_stitch_costs(self.source.config, self.target.config, tokens=self.task.length)
        return list(random_stitches(costs, buckets=1, per_bucket=int(costs.possible.sum())))

    @cached_property
    def _test(self) -> TextBatches:
        return TextBatches(self.task.test, self.task.batch_size)

    def _rows(self, length: int, seed: int) -> list[ResultRow]:
        rows = self.files[length]
        config = replace(self.training, max_steps=length, seed=seed)
        training = asdict(config) if length else None
        if (found := supernet_rows(rows, self._every, rule="every", seed=seed, training=training)) is not None:
            return found
        supernet = StitchedSupernet.from_anchors(
            [self.source, self.target], self._every, calibration=self.calibration(), tokens=self.task.length
        )
        if length:
            checkpoints = self.output / f"{length}-steps" / f"checkpoints-{seed}"
            result = train_stitches(supernet, text_examples(self.task.train), config, output_dir=checkpoints)
            losses = f"{result.losses[0]:.3f} → {result.losses[-1]:.3f}"
            process_state().print(f"  seed {seed}: {result.steps} steps in {result.seconds:.0f} s, loss {losses}")
        return evaluate_supernet(supernet, self._test, rule="every", rows=rows, seed=seed, training=training)

    def _start(self, stitch: Stitch) -> PreTrainedModel:
        return StitchedModel.from_anchors(
            self.source, self.target, stitch, calibration=self.calibration(), calibration_items=self.task.calibration
        )


def _shuffled_tokens(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same tokens in random order, but for the first of each sequence, which is BOS where there is one."""
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(len(sequence) - 1, generator=generator).tolist() for sequence in sequences)
    return [
        [sequence[0], *(sequence[1 + place] for place in order)]
        for sequence, order in zip(sequences, orders, strict=True)
    ]
