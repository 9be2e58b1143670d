"""Evaluated as the field does it: perplexity and lm-evaluation-harness on our paths, the rivals and both anchors.

    accelerate launch recipes/benchmark_language.py --config recipes/benchmark_llama3.yaml
    accelerate launch recipes/benchmark_language.py --limit 100 --steps 100 --seeds 0

The second line runs offline: the quickstart's two Llamas on tasks made of Python's documentation, and of TruthfulQA
with `--data TruthfulQA.csv`. For each budget the search and every rival name a path; all are healed alike under every
seed, the anchors too, and measured on every task. Rows are written task by task; the same command goes on where it was
interrupted. Makes report.md, models.jsonl, curves, and a model card with its figures for each of ours.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.every_size import CHEAPEST, EverySize, Family, StudySettings
from experiments.field import FieldStudy
from experiments.field_report import COSTS, report
from experiments.field_tasks import PREFIX, FieldTask, perplexity_tasks, speed_task
from experiments.harness import harness_tasks, harness_version
from experiments.language_study import TextTask
from experiments.offline_tasks import OFFLINE, TRUTHFULQA, write_offline_tasks
from families import quickstart_pair, text_family
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from klas_hf import SearchConfig
from klas_hf.anchors import load_anchor
from klas_hf.budgets import Budget
from klas_hf.cli.data import read_texts
from klas_hf.data.text import text_sequences
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state

RIVALS = ("klas", "esta_proportional", "shortgpt", "gromov", "replaceme", "linear patch")


@dataclass
class BenchmarkArguments:
    anchors: list[str] | None = field(
        default=None, metadata={"help": "the small and the large one, Hub ids or folders; None: the quickstart's"}
    )
    text: str | None = field(
        default=None,
        metadata={"help": "text file, or folder of .txt, to heal and choose on; None: Python's documentation"},
    )
    budgets: list[str] = field(default_factory=lambda: ["40%", "60%", "80%"], metadata={"help": "shares of its MACs"})
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "of the harness, NAME or NAME:SHOTS, or perplexity_wikitext2, perplexity_c4, "
                          "perplexity_documentation; None: those that need no network"},
    )  # fmt: skip
    include_path: list[str] = field(
        default_factory=list, metadata={"help": "folders of tasks of your own", "nargs": "+"}
    )
    data: str | None = field(default=None, metadata={"help": "TruthfulQA.csv, for the offline tasks of it"})
    copies: list[str] = field(
        default_factory=list, metadata={"help": "HUB_ID=FOLDER: data sets that lie here", "nargs": "+"}
    )
    rivals: list[str] = field(default_factory=lambda: list(RIVALS), metadata={"help": "as of every_size.py"})
    contenders: int = field(default=4, metadata={"help": "paths that the search names within a budget, to be healed"})
    steps: int = field(default=300, metadata={"help": "optimiser steps of healing; 0: none"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the healing"})
    length: int = field(default=128, metadata={"help": "tokens of a sequence that is healed on, and that costs are of"})
    healing_batch_size: int = field(default=8, metadata={"help": "sequences of a step of healing, per process"})
    batch_size: int = field(default=8, metadata={"help": "requests, or windows, that are measured at once"})
    window: int = field(default=2048, metadata={"help": "tokens of perplexity's windows; the papers' is 2,048"})
    prompt: int = field(default=128, metadata={"help": "tokens of the prompt that is timed"})
    limit: int | None = field(default=None, metadata={"help": "only so many documents of each task: no result"})
    cost: str = field(default="macs", metadata={"help": f"what curves are drawn over: {', '.join(COSTS)}"})
    published: str | None = field(default=None, metadata={"help": "YAML of published figures, shown apart"})
    dtype: str = field(default="auto", metadata={"help": "dtype that anchors are loaded in"})
    cache_dir: str = field(default="outputs/study_anchors", metadata={"help": "where the quickstart's are kept"})
    output_dir: str = field(default="outputs/benchmark_language", metadata={"help": "where all goes"})
    smoke: bool = field(default=False, metadata={"help": "barely trained anchors, few documents and steps: no result"})

    def __post_init__(self) -> None:
        if self.anchors is not None and (len(self.anchors) != 2 or self.text is None):
            raise ValueError(
                f"got anchors={self.anchors} and text={self.text}; expected the small and the large one, and a text to "
                "heal and choose on"
            )
        if self.cost not in COSTS:
            raise ValueError(f"got cost={self.cost!r}; expected one of {', '.join(COSTS)}")
        if bad := [one for one in self.copies if "=" not in one]:
            raise ValueError(f"got copies={bad}; expected HUB_ID=FOLDER, as allenai/c4=/data/c4")
        shares = self.shares()
        if list(shares) != sorted(set(shares)):
            raise ValueError(f"got budgets={self.budgets}; expected ascending ones, each once")

    def shares(self) -> tuple[float, ...]:
        """The budgets as shares of the large anchor's MACs, below them where the first one begins."""
        found = [Budget.of(one).share for one in self.budgets]
        shares = [one for one in found if one is not None]
        if len(shares) < len(found) or not shares:
            raise ValueError(f"got budgets={self.budgets}; expected shares of the large anchor's MACs, as 60%")
        return (min(CHEAPEST, shares[0] / 2), *shares)


def main() -> None:
    (args,) = parse_options(BenchmarkArguments, description=__doc__.split("\n")[0])
    anchor_steps = None
    if args.smoke:
        args.seeds, args.budgets, args.limit, args.steps, args.contenders = args.seeds[:1], ["60%"], 4, 2, 1
        anchor_steps = 3
    output = Path(args.output_dir)
    with input_read(args):
        family, tokenizer = family_of(args, anchor_steps)
        tasks, missing = tasks_of(args, tokenizer, output)
        settings = StudySettings(
            (args.steps,), tuple(args.seeds), len(args.budgets), tuple(args.rivals), contenders=args.contenders,
            search=SearchConfig(joints=2, forwards=5_000) if args.smoke else SearchConfig(), shares=args.shares(),
        )  # fmt: skip
        about = {"anchors": args.anchors or "quickstart", "text": args.text, "lm_eval": harness_version()}
        study = EverySize(family, settings, output / "choosing")
        field_study = FieldStudy(study, args.steps, tasks, tokenizer, output, about)
    if process_state().is_main_process:
        (output / "command.txt").write_text(shlex.join(["accelerate", "launch", *sys.argv]) + "\n", encoding="utf-8")
    for name, why in missing.items():
        process_state().print(f"  {name} is left out: {why}")
    field_study.run()
    if process_state().is_main_process:
        text = report(field_study, missing, Path(args.published) if args.published else None, args.cost)
        print(f"\n{text}\nMade: {output}/report.md, rows.jsonl, models.jsonl, curves, and ours in {output}/models")


def family_of(args: BenchmarkArguments, anchor_steps: int | None) -> tuple[Family, PreTrainedTokenizerBase]:
    """Both anchors, and the text that paths are chosen, fitted and healed on."""
    if args.anchors is None:
        models, task, tokenizer = quickstart_pair(Path(args.cache_dir) / "quickstart", anchor_steps)
        family = text_family("quickstart", models, task, 32 if args.smoke else None)
    else:
        models = [load_anchor(one, dtype=args.dtype).model for one in args.anchors]
        tokenizer = AutoTokenizer.from_pretrained(args.anchors[1])
        sequences = text_sequences(read_texts(str(args.text)), tokenizer, args.length)
        held, train = sequences[::10], [one for place, one in enumerate(sequences) if place % 10]
        if len(held) < 3:
            raise ValueError(f"got text={args.text} of {len(sequences)} sequences; expected at least 30, better 4,000")
        task = TextTask(train, held[::2][:128], held[1::2][:256], args.length)
        family = text_family("language", models, task, None)
    healing = {**family.healing, "per_device_batch_size": args.healing_batch_size}
    return Family(**{**vars(family), "healing": healing}), tokenizer


def tasks_of(
    args: BenchmarkArguments, tokenizer: PreTrainedTokenizerBase, output: Path
) -> tuple[list[FieldTask], dict[str, str]]:
    """What is measured, and what cannot be, with the reason."""
    include: list[str | Path] = [*args.include_path]
    names = args.tasks
    own = {*OFFLINE, *TRUTHFULQA}
    if names is None or own & {name.partition(":")[0] for name in names}:
        if process_state().is_main_process:
            write_offline_tasks(output / "tasks", truthfulqa=args.data)
        process_state().wait_for_everyone()
        include.append(output / "tasks")
    if names is None:
        names = ["perplexity_documentation", *OFFLINE, *(TRUTHFULQA if args.data else ())]
    copies = dict(one.split("=", 1) for one in args.copies)
    common: dict[str, Any] = {"batch_size": args.batch_size, "copies": copies, "limit": args.limit}
    texts = [name for name in names if name.startswith(PREFIX)]
    first, missing = perplexity_tasks(texts, tokenizer, window=args.window, **common)
    rest = [name for name in names if name not in texts]
    second, also = harness_tasks(rest, tokenizer, include=include, scratch=output, **common)
    if not first and not second:
        raise ValueError(f"got no task that can be measured: {missing | also}")
    return [speed_task(args.prompt), *first, *second], missing | also


if __name__ == "__main__":
    main()
