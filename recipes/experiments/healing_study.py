"""Which healing is best: what is learnt from, what learns, how long; every method with the same steps and sweep.

    labels, distilled, both     cross-entropy, soft distillation from the dear anchor, half of each
    by default                  what `heal` chooses by itself: half of each, and labels where the dear anchor is passed
    states, then both           the head's inputs are matched to the dear anchor's first (arXiv 2603.12433, 2505.20142)
    joints, then both           what each joint gives is matched to the dear anchor's state there first

Matching spends `WARMUP` of the steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain, repeat
from pathlib import Path as Folder
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup, set_seed

from experiments.every_size import Family
from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.loading import load_anchors
from klas_hf.anchors.weights import evaluating, fingerprint
from klas_hf.evaluation import Measurement, evaluate, evaluate_stitches
from klas_hf.files import write_atomically
from klas_hf.models import StitchedModel
from klas_hf.paths import Path
from klas_hf.processes import process_state
from klas_hf.rows import ResultRow, RowFile
from klas_hf.tables import format_mean, markdown_table
from klas_hf.training import TrainingConfig, heal, healing_config
from klas_hf.training.images import ImageObjective
from klas_hf.training.language import LanguageObjective
from klas_hf.training.trainables import is_stitching

# Share of the loss that is distillation; labels have no teacher, and beside one `heal` chooses where none is given.
WEIGHTS = {"labels": 0.0, "distilled": 1.0, "both": 0.5, "by default": 0.0}
MATCHED = {"states, then both": "head", "joints, then both": "joints"}
METHODS = (*WEIGHTS, *MATCHED)
WARMUP = 0.3  # share of the steps


class HealingStudy:
    """The comparison for one family, in one output folder; what is done is not done again.

    Args:
        family: anchors and data.
        paths: that are healed.
        lengths: optimiser steps.
        seeds: of the healing.
        trainable: what learns: "full", "lora" or both.
        output: folder.
    """

    def __init__(
        self, family: Family, paths: Sequence[Path], lengths: Sequence[int], seeds: Sequence[int],
        trainable: Sequence[str], output: str | Folder,
    ):  # fmt: skip
        self.family, self.paths, self.lengths, self.seeds, self.trainable = family, paths, lengths, seeds, trainable
        self.output = Folder(output)
        self.large = family.anchors[1]
        run = {"study": "healing", "family": family.name, "healing": dict(family.healing)}
        self.rows = RowFile(self.output / "rows.jsonl", run)
        self.say = partial(process_state().print, flush=True)

    def run(self) -> str:
        """Heal and measure whatever is missing; the report, in `report.md` too."""
        for length in self.lengths:
            for what in self.trainable:
                for method in METHODS:
                    for path in self.paths:
                        if not applies(method, what, path):
                            continue
                        cells = [self.row(path, method, what, length, seed) for seed in self.seeds]
                        self.say(f"  {path}, {length} steps, {what}, {method}: {self._mean(cells)}")
        text = self.report()
        if process_state().is_main_process:
            write_atomically(self.output / "report.md", lambda part: part.write_text(text, encoding="utf-8"))
        return text

    def row(self, path: Path, method: str, trainable: str, length: int, seed: int) -> ResultRow:
        """One model, measured now or before; of length 0, the start."""
        options = {"trainable": trainable, "seed": seed, "eval_steps": max(1, length // 4)} | dict(self.family.healing)
        config = healing_config(length, **options)
        rates: list[float] = []

        def make(path: Path) -> PreTrainedModel:
            extra = {} if self.family.image_size is None else {"image_size": self.family.image_size}
            model = StitchedModel.from_path(self.family.anchors, path, calibration=self.family.fitting, **extra)
            model = model.to(process_state().device)
            if length:
                rates.append(self._healed(model, path, method, config))
            return model

        def measure(model: PreTrainedModel) -> Measurement:
            metrics = evaluate(model, self.family.test, classes=self.family.classes).metrics
            return Measurement(metrics, {"learning_rate": rates[-1]} if rates else {})

        (row,) = evaluate_stitches(
            [path], make, measure, rule=method if length else "start", rows=self.rows, seed=seed if length else 0,
            anchors=[fingerprint(anchor) for anchor in self.family.anchors], tokens=self.family.tokens,
            training=asdict(config) | {"method": method} if length else None,
        )  # fmt: skip
        return row

    def _healed(self, model: PreTrainedModel, path: Path, method: str, config: TrainingConfig) -> float:
        """Heal a model in place; the rate that was chosen."""
        weight, length = WEIGHTS.get(method, 0.5), config.max_steps or 0
        if method in MATCHED:
            matched = round(WARMUP * length)
            like = self.row(path, "both", config.trainable, length, config.seed)  # its rate serves the matching too
            match(
                model,
                path,
                self.large,
                self.family.train,
                MATCHED[method],
                config,
                matched,
                like.details["learning_rate"],
            )
            config = healing_config(**asdict(config) | {"steps": length - matched, "max_steps": length - matched})
        config = healing_config(**asdict(config) | {"steps": config.max_steps, "distillation_weight": weight})
        teacher = None if method == "labels" else self.large
        done = heal(model, self.family.train, teacher=teacher, validation=self.family.validation, config=config)
        return done.learning_rate

    def report(self) -> str:
        """A table per length: a row per path and method, a column per kind of training."""
        metric = self.family.metric
        parts = [f"# Healing: {self.family.name}", f"{metric}, mean ± standard error over {len(self.seeds)} seed(s)."]
        for length in self.lengths:
            lines = [["path", "learns from", *self.trainable]]
            for path in self.paths:
                start = self.row(path, METHODS[0], self.trainable[0], 0, 0)
                lines.append([str(path), "the start", *[f"{start.value(metric):.4f}"] * len(self.trainable)])
                for method in METHODS:
                    cells = [
                        self._mean([self.row(path, method, what, length, seed) for seed in self.seeds])
                        if applies(method, what, path)
                        else "–"
                        for what in self.trainable
                    ]
                    lines.append([str(path), method, *cells])
            parts += [f"## {length} steps", markdown_table(lines)]
        return "\n\n".join(parts) + "\n"

    def _mean(self, rows: Sequence[ResultRow]) -> str:
        rates = sorted({row.details["learning_rate"] for row in rows})
        return f"{format_mean([row.value(self.family.metric) for row in rows])} ({', '.join(f'{r:g}' for r in rates)})"


def applies(method: str, trainable: str, path: Path) -> bool:
    """Whether a method is compared: the matching trains all of a model, and states as wide as the large anchor's."""
    return method in WEIGHTS or (trainable == "full" and path.slices[-1].anchor == 1)


def match(
    model: PreTrainedModel, path: Path, large: PreTrainedModel, train: Any, where: str, config: TrainingConfig,
    steps: int, rate: float,
) -> None:  # fmt: skip
    """Train all of a model for some steps so that states on its path come near the large anchor's.

    Args:
        where: "head", what the head reads; "joints", what the joints give that lead into the large anchor (place 1).

    The loss is the squared distance over the squared norm of the large anchor's state, summed over the places.
    """
    kind = ImageObjective if model.main_input_name == "pixel_values" else LanguageObjective
    objective = kind(model, train, config, None)
    loader, order = objective.batches(1)
    order.epoch = config.seed
    (anchor,) = load_anchors([large])
    starts = {n: one.start for n, one in enumerate(path.slices[1:]) if one.anchor == 1} if where == "joints" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    set_seed(config.seed)
    model.train()
    batches = chain.from_iterable(repeat(loader))
    for _, batch in zip(range(steps), batches, strict=False):
        inputs, _ = objective.inputs({name: value.to(model.device) for name, value in batch.items()})
        if where == "head":
            with torch.no_grad(), evaluating(large), seen([head(large)], into=True) as expected:
                large(**inputs)
            with seen([head(model)], into=True) as got:
                model(**inputs)
        else:
            expected = list(_states(anchor, inputs, starts.values()))
            with seen([joints(model)[place] for place in starts]) as got:
                model(**inputs)
        loss = sum(
            ((a - b).square().sum() / b.square().sum() for a, b in zip(got, expected, strict=True)), torch.tensor(0.0)
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def head(model: PreTrainedModel) -> nn.Module:
    """What gives a model's logits."""
    output = model.get_output_embeddings()
    linear = [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and not is_stitching(name)]
    return linear[-1] if output is None else output


def joints(model: PreTrainedModel) -> nn.ModuleList:
    """A stitched model's joints."""
    return next(module for name, module in model.named_modules() if name.split(".")[-1] == "joints")


@contextmanager
def seen(modules: Iterable[nn.Module], into: bool = False) -> Iterator[list[Tensor]]:
    """What modules give, or (`into`) take, in a forward run meanwhile."""
    found: list[Tensor] = []

    def keep(value: Any) -> None:
        found.append(value if isinstance(value, Tensor) else value[0])

    handles = [
        one.register_forward_pre_hook(lambda _, args: keep(args[0])) if into
        else one.register_forward_hook(lambda _, args, output: keep(output))
        for one in modules
    ]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _states(anchor: Anchor, inputs: dict[str, Any], starts: Iterable[int]) -> Iterator[Tensor]:
    """The anchor's states before some blocks."""
    with torch.no_grad(), evaluating(anchor.model):
        for start in starts:
            state = anchor.front(inputs, start)
            yield state if isinstance(state, Tensor) else state[0]
