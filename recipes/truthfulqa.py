"""KLAS against ESTA on TruthfulQA, generative (KLAS Sec. 5.5, App. H, Tab. 6).

    accelerate launch recipes/truthfulqa.py \\
        --source meta-llama/Llama-3.2-1B-Instruct --target meta-llama/Llama-3.2-3B-Instruct

For several seeds of the 60/40 split: probes and scores on the train split, ESTA's stitches at a few sizes and KLAS's
of the same size, fine-tuning of each on the train split, greedy answers on the held-out part, ROUGE under three
readings of the reference. Rows go to a JSONL file as they come; an interrupted run goes on where it stopped.
"""

import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from klas_hf import (
    Measurement,
    ResultRow,
    RowFile,
    Stitch,
    StitchedModel,
    StitchSelection,
    TradeoffCurve,
    TrainingConfig,
    esta_stitches,
    evaluate_anchor,
    evaluate_stitches,
    format_table,
    match_stitches,
    plot_curves,
    random_stitches,
    score_stitches,
    train_probes,
    train_stitches,
)
from klas_hf.anchors import load_anchor
from klas_hf.anchors.weights import fingerprint
from klas_hf.data.answering import encode_completion, measure_answers
from klas_hf.data.text import TextBatches
from klas_hf.data.truthfulqa import Question, degenerate_answers, load_truthfulqa, split_questions
from klas_hf.evaluation.answers import compare_rules, score_answers
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state
from klas_hf.scores.values import StitchScores

RULES = ("klas", "esta_proportional", "esta_index", "random")
SHOWN = ["best_rouge1", "best_rouge2", "best_rougeL", "max_correct_rouge1", "lm_eval_rouge1_max", "lm_eval_rouge1_acc"]


@dataclass
class TruthfulQAArguments:
    source: str = field(metadata={"help": "the cheaper anchor: Hub id or folder"})
    target: str = field(metadata={"help": "the dearer anchor: Hub id or folder"})
    data: str | None = field(
        default=None, metadata={"help": "TruthfulQA.csv; default: truthfulqa/truthful_qa on the Hub"}
    )
    output_dir: str = field(default="outputs/truthfulqa", metadata={"help": "where rows, scores and pictures go"})
    rules: list[str] = field(
        default_factory=lambda: ["klas", "esta_proportional"], metadata={"help": f"selection rules to compare: {RULES}"}
    )
    sizes: int = field(default=4, metadata={"help": "how many of ESTA's sizes to compare at"})
    tolerance: float = field(
        default=0.05, metadata={"help": "a match costs at most ESTA's MACs, at least so much less"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the 60/40 split"})
    max_length: int = field(default=128, metadata={"help": "longest training sequence in tokens"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer in tokens"})
    generation_batch_size: int = field(default=16, metadata={"help": "questions answered at once per process"})
    questions: int | None = field(default=None, metadata={"help": "use only the first so many questions"})
    dtype: str = field(default="auto", metadata={"help": "dtype that anchors are loaded in"})
    smoke: bool = field(default=False, metadata={"help": "one seed, one size, 40 questions, two steps: no result"})

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.rules) - set(RULES)):
            raise ValueError(f"got the rules {unknown}; expected some of {RULES}")


def main() -> None:
    args, training = parse_options(TruthfulQAArguments, TrainingConfig, description=__doc__.split("\n")[0])
    if args.smoke:
        args.sizes, args.seeds, args.questions, args.max_new_tokens = 1, args.seeds[:1], 40, 8
        training = replace(training, max_steps=2, gradient_accumulation_steps=1)
    output = Path(args.output_dir)
    settings = {k: v for k, v in asdict(args).items() if k not in ("output_dir", "seeds", "rules", "data")}
    with input_read(args, training):
        questions = load_truthfulqa(args.data)[: args.questions]
        rows = RowFile(output / "rows.jsonl", {"recipe": "truthfulqa", **settings, "training": asdict(training)})
        experiment = Experiment(args, training, rows)
    by_rule: dict[str, dict[int, list[ResultRow]]] = {rule: {} for rule in args.rules}
    for seed in args.seeds:
        for rule, chosen in experiment.run(questions, seed).items():
            by_rule[rule][seed] = chosen
    if process_state().is_main_process:
        report(rows, by_rule, questions, args, output)


class Experiment:
    """Both anchors with their tokenizer, and what is done for each split seed."""

    def __init__(self, args: TruthfulQAArguments, training: TrainingConfig, rows: RowFile):
        self.args, self.training, self.rows = args, training, rows
        self.state = process_state()
        self.output = Path(args.output_dir)
        self.source = load_anchor(args.source, dtype=args.dtype).model.to(self.state.device)
        self.target = load_anchor(args.target, dtype=args.dtype).model.to(self.state.device)
        self.fingerprints = [fingerprint(self.source), fingerprint(self.target)]
        self.tokenizer = AutoTokenizer.from_pretrained(args.target)
        self.state.print(f"{self.state.num_processes} process(es) on {self.state.device}")

    def run(self, questions: list[Question], seed: int) -> dict[str, list[ResultRow]]:
        """All rows of one split seed, by rule."""
        train, test = split_questions(questions, seed=seed)
        self.state.print(f"\nseed {seed}: {len(train)} questions to train on, {len(test)} held out")
        examples = [encode_completion(q, self.tokenizer, self.args.max_length) for q in train]
        batches = TextBatches([example["input_ids"] for example in examples], self.args.generation_batch_size)
        scores = self.scores(examples, seed)

        def measure(model: PreTrainedModel) -> Measurement:
            return measure_answers(
                model.to(self.state.device), test, self.tokenizer,
                max_new_tokens=self.args.max_new_tokens, batch_size=self.args.generation_batch_size,
            )  # fmt: skip

        def make(stitch: Stitch) -> PreTrainedModel:
            model = StitchedModel.from_anchors(
                self.args.source, self.args.target, stitch, calibration=batches, dtype=self.args.dtype,
                device_map={"": self.state.device},
            )  # fmt: skip
            return self.trained(model, examples, f"{stitch.source_stop}-{stitch.target_start}", seed)

        shared = {"rows": self.rows, "seed": seed}
        made = {"anchors": self.fingerprints, "training": asdict(self.training), **shared}
        for position, (name, anchor) in enumerate({"source": self.source, "target": self.target}.items()):
            evaluate_anchor(anchor, measure, rule=f"{name}_zero_shot", position=position, **shared)
            if self.training.trainable != "stitch":

                def tuned(_: str, name: str = name, anchor: PreTrainedModel = anchor) -> PreTrainedModel:
                    return self.trained(copy.deepcopy(anchor), examples, name, seed)

                evaluate_stitches([f"{position}[:]"], tuned, measure, rule=name, **made)
        return {
            rule: evaluate_stitches(chosen, make, measure, rule=rule, **made)
            for rule, chosen in self.selections(scores, seed).items()
        }

    def scores(self, examples: list[dict], seed: int) -> StitchScores:
        """Probes on four fifths of the train split, scores on the rest (Alg. 2: the test split stays unseen)."""
        path = self.output / f"scores-{seed}.safetensors"
        if path.exists():
            return StitchScores.load(path)
        sequences = [example["input_ids"] for example in examples]
        held = len(sequences) // 5
        fitting, scoring = (TextBatches(part, 8) for part in (sequences[held:], sequences[:held]))
        probes = train_probes(self.source, fitting), train_probes(self.target, fitting)
        scores = score_stitches(self.source, self.target, scoring, probes=probes, score="klas")
        if self.state.is_main_process:
            scores.save(path)
            scores.plot(self.output / f"heatmap-{seed}")
        return scores

    def selections(self, scores: StitchScores, seed: int) -> dict[str, StitchSelection]:
        """Each rule's stitches, at the sizes of the proportional ESTA."""
        reference = esta_stitches(scores.costs).spread(self.args.sizes)
        chosen = {
            "klas": lambda: match_stitches(scores, reference, tolerance=self.args.tolerance),
            "esta_proportional": lambda: reference,
            "esta_index": lambda: esta_stitches(scores.costs, mapping="index").spread(self.args.sizes),
            "random": lambda: random_stitches(scores.costs, buckets=self.args.sizes, seed=seed),
        }
        return {rule: chosen[rule]() for rule in self.args.rules}

    def trained(self, model: PreTrainedModel, examples: list[dict], name: str, seed: int) -> PreTrainedModel:
        """The model after fine-tuning on the train split; resumed where it was interrupted."""
        config = replace(self.training, seed=seed)
        folder = self.output / "checkpoints" / f"{name}-seed-{seed}"
        result = train_stitches(model, examples, config, teacher=self.target, output_dir=folder)
        self.state.print(f"  {name}: {result}")
        return model


def report(
    rows: RowFile,
    by_rule: dict[str, dict[int, list[ResultRow]]],
    questions: list[Question],
    args: TruthfulQAArguments,
    output: Path,
) -> None:
    """Table, degenerate answers, paired comparisons and the curve."""
    target = next(row for row in rows if row.rule == "target_zero_shot")
    parts = ["## Stitched models and anchors\n", format_table(rows, SHOWN, target.macs)]
    parts.append("\n## Degenerate answers, on the same held-out questions\n")
    parts.append(format_table(degenerate_rows(questions, args.seeds), SHOWN))
    if {"klas", "esta_proportional"} <= by_rule.keys():
        parts.append("\n## KLAS less ESTA at matched size, paired bootstrap over held-out questions\n")
        for metric in ("rouge1", "rouge2", "rougeL"):
            found = compare_rules(by_rule["klas"], by_rule["esta_proportional"], metric)
            parts.append(
                f"- {metric}: {found.difference:+.4f} (95 % interval {found.low:+.4f} to {found.high:+.4f}, "
                f"p = {found.p_value:.3f}, {found.pairs} pairs)"
            )
    text = "\n".join(parts)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    ends = [row for row in rows if row.rule in ("source", "target")] or [r for r in rows if r.stitch is None]
    curves = [
        TradeoffCurve([*ends, *(row for seed in seeds.values() for row in seed)], "best_rouge1", label=rule)
        for rule, seeds in by_rule.items()
    ]
    plot_curves(curves, title="TruthfulQA, ROUGE-1 against the best answer", path=output / "curve")
    print(f"\n{text}\n\nMade: {output}/rows.jsonl, table.md, curve.png, heatmap-*.png, scores-*.safetensors")


def degenerate_rows(questions: list[Question], seeds: list[int]) -> list[ResultRow]:
    """Scores of answers that need no model: what the metric is worth."""
    rows = []
    for seed in seeds:
        _, test = split_questions(questions, seed=seed)
        references = [question.references for question in test]
        for name, answers in degenerate_answers(test).items():
            rows.append(ResultRow(name, None, seed, 0, 0, score_answers(answers, references).metrics))
    return rows


if __name__ == "__main__":
    main()
