"""Models of every rule on the tasks that the field reports: a row for each model and task, under several seeds.

Which paths there are, and how they are healed, is what `every_size` does; here they are measured by other people's
tasks, beside both anchors, as they are and fine-tuned alike, and the dear one in few bits.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as Folder
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from experiments.beside import QUANTISED, can_quantise, in_few_bits
from experiments.every_size import ANCHORS, OURS, Choice, EverySize
from experiments.field_tasks import FieldTask
from klas_hf.evaluation import Measurement, evaluate_stitches
from klas_hf.files import write_folder_atomically
from klas_hf.paths import Path
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile

WHOLE = "as it is"
TASK = ("task", "version", "configuration", "shots", "limit", "lm_eval")


@dataclass(frozen=True)
class Entry:
    """One model that is measured.

    Attributes:
        rule: that chose it.
        choice: its path.
        steps: of healing; 0: none.
        seed: of the healing.
        bucket: of cost, counted from 0; None for anchors.
        weights: "as it is", or "int8" or "int4".
    """

    rule: str
    choice: Choice
    steps: int
    seed: int
    bucket: int | None = None
    weights: str = WHOLE

    @property
    def name(self) -> str:
        """Of its folder: what its weights depend on."""
        path = re.sub(r"[^\w]+", "-", str(self.choice.path)).strip("-")
        return f"path-{path}-{self.choice.joint.replace(' ', '-')}-{self.steps}-steps-seed-{self.seed}"


class FieldStudy:
    """Every model on every task, in one output folder; what is done is not done again.

    Args:
        study: names the paths, and heals them.
        steps: of healing.
        tasks: in the order of the tables' columns.
        tokenizer: saved with each model.
        output: folder.
        about: what rows of one file have in common, such as the version of the harness.

    Raises:
        ValueError: the folder holds rows of another study, or of another version of the harness.
    """

    def __init__(
        self, study: EverySize, steps: int, tasks: Sequence[FieldTask], tokenizer: PreTrainedTokenizerBase,
        output: Folder, about: Mapping[str, Any],
    ):  # fmt: skip
        self.study, self.steps, self.tasks, self.tokenizer, self.output = study, steps, tasks, tokenizer, output
        self.rows = RowFile(output / "rows.jsonl", {"study": "field", "anchors": study.made_from, **about})

    @cached_property
    def entries(self) -> list[Entry]:
        """All models, anchors first; what the search names is healed to choose from it."""
        small, large = (
            Choice(Path.parse(one), "least_squares", self.study.costs.of(one).macs) for one in ("0[:]", "1[:]")
        )
        first = self.study.settings.seeds[0]
        found = [Entry(ANCHORS, small, 0, first), Entry(ANCHORS, large, 0, first)]
        if can_quantise(self.study.large):
            found += [Entry(f"large in {name}", large, 0, first, weights=name) for name in QUANTISED]
        for seed in self.study.settings.seeds:
            if self.steps:
                found += [Entry(ANCHORS, one, self.steps, seed) for one in (small, large)]
            for bucket, chosen in enumerate(self.study.chosen(self.steps, seed)):
                found += [Entry(rule, one, self.steps, seed, bucket) for rule, one in chosen.items()]
        return found

    def run(self) -> None:
        """Make and measure all that has no row yet. Ours are kept, other models only until their last task is done."""
        say = process_state().print
        kept = {entry.name for entry in self.entries if entry.rule == OURS}
        for number, entry in enumerate(self.entries, 1):
            say(f"  {number} of {len(self.entries)}: {entry.rule}, {entry.choice.path}, seed {entry.seed}", flush=True)
            self.measure(entry)
            folder = self.output / "models" / entry.name
            if entry.name not in kept and process_state().is_main_process and folder.exists():
                shutil.rmtree(folder)

    def measure(self, entry: Entry) -> list[ResultRow]:
        """A row per task of one model, which is made with the first task that has none."""
        made: list[PreTrainedModel] = []

        def make(_: Path) -> PreTrainedModel:
            if not made:
                made.append(self.model(entry))
            return made[0]

        rows = []
        for task in self.tasks:
            rows += evaluate_stitches(
                [entry.choice.path], make, _noted(task), rule=entry.rule, rows=self.rows,
                anchors=self.study.made_from, training=self.study.training(entry.steps, entry.seed), seed=entry.seed,
                tokens=self.study.family.tokens,
                setting={"joint": entry.choice.joint, "weights": entry.weights, **task.about},
            )  # fmt: skip
        return rows

    def model(self, entry: Entry) -> PreTrainedModel:
        """The model of an entry: made now, or from its folder where it was healed before."""
        if entry.weights != WHOLE:
            return in_few_bits(self.study.large, entry.weights)
        folder = self.output / "models" / entry.name
        if entry.steps and not folder.exists():
            model = self.study.start(entry.choice.path, entry.choice.joint)
            course = self.output / "courses" / entry.name
            self.study.heal(model, entry.choice.path, entry.steps, entry.seed, course)
            if process_state().is_main_process:
                write_folder_atomically(folder, lambda part: self._save(model, part))
                shutil.rmtree(course, ignore_errors=True)
            process_state().wait_for_everyone()
        if not entry.steps and not entry.choice.path.joints:
            return self.study.family.anchors[entry.choice.path.anchors[0]].eval()
        if not entry.steps:
            return self.study.start(entry.choice.path, entry.choice.joint).eval()
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        return loaded.to(process_state().device).eval()

    def _save(self, model: PreTrainedModel, folder: Folder) -> None:
        self.tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


def _noted(task: FieldTask) -> Callable[[PreTrainedModel], Measurement]:
    """The task, which says in its rows where its data are from."""

    def measure(model: PreTrainedModel) -> Measurement:
        found = task.measure(model)
        return Measurement(found.metrics, {**found.details, "source": dict(task.source)})

    return measure


def joined(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """One row per model with all that was measured of it, as `task: metric`, in place of one per task.

    The details say of each metric where its data are from (`sources`), and whether more is better.
    """
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        of_model = _of_model(row)
        groups.setdefault(f"{row.rule} {of_model.measurement}", []).append(row)
    return [_joined(group) for group in groups.values()]


def _of_model(row: ResultRow) -> ResultRow:
    """The same without its figures and what they depend on beside the model."""
    kept = {name: row.setting[name] for name in ("joint", "weights", "tokens") if name in row.setting}
    return ResultRow(
        row.rule, row.path, row.seed, row.macs, row.parameters, {}, training=row.training, made_from=row.made_from,
        setting=kept,
    )  # fmt: skip


def _joined(rows: Sequence[ResultRow]) -> ResultRow:
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {"sources": {}, "higher_is_better": {}, "tasks": {}}
    for row in rows:
        task = row.setting["task"]
        details["tasks"][task] = {name: row.setting[name] for name in TASK if row.setting.get(name) is not None}
        for name, value in row.metrics.items():
            key = f"{task}: {name}"
            metrics[key] = value
            details["higher_is_better"][key] = row.details.get("higher_is_better", {}).get(name, False)
            if row.details.get("source"):
                details["sources"][key] = row.details["source"] | {"metric": name, "task": task}
    one = _of_model(rows[0])
    return ResultRow(
        one.rule, one.path, one.seed, one.macs, one.parameters, metrics, details, training=one.training,
        made_from=one.made_from, setting=one.setting,
    )  # fmt: skip
