"""A real trained checkpoint stitched: stories260K to itself, and a smaller sibling of it to stories260K.

    python benchmarks/stories260k.py --checkpoint stories260K.bin --tokenizer tok512.bin --output stories260k
    python benchmarks/stories_stitching.py --anchor stories260k --train tinystories_a.txt --test tinystories_b.txt

Self-stitches show what a stitch costs when nothing else changes: at (k, k) the least-squares layer is the identity
and the loss that of the anchor; elsewhere blocks are left out or repeated. The sibling (3 narrow blocks) learns from
stories260K's outputs; then every stitch between the two is scored and measured at its least-squares start.
"""

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from stories260k import split_stories
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

from klas_hf import (
    Measurement,
    RowFile,
    Stitch,
    StitchedModel,
    TrainingConfig,
    correlation_report,
    evaluate,
    evaluate_anchor,
    evaluate_stitches,
    format_table,
    score_stitches,
    train_probes,
    train_stitches,
)
from klas_hf.anchors.weights import fingerprint
from klas_hf.data.text import TextBatches, text_examples, text_sequences

SEPARATOR = r"(?<!\n)\n(?!\n)"


@dataclass
class Options:
    anchor: str = field(metadata={"help": "stories260K in Hugging Face form (stories260k.py makes it)"})
    train: str = field(metadata={"help": "stories to fit and train on"})
    test: str = field(metadata={"help": "stories to score and measure on"})
    output_dir: str = field(default="outputs/stories", metadata={"help": "where rows and pictures go"})
    length: int = field(default=128, metadata={"help": "tokens of a sequence"})
    sibling_steps: int = field(default=1500, metadata={"help": "optimiser steps of the sibling's training"})
    finetune_steps: int = field(default=400, metadata={"help": "optimiser steps of each stitch"})
    trainable: str = field(default="full", metadata={"help": "what learns: stitch, lora or full"})
    learning_rate: float = field(default=3e-3, metadata={"help": "of the fine-tuning"})
    sequences: int = field(default=400, metadata={"help": "held-out sequences to score and to measure on, each"})
    seed: int = 0


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    output = Path(options.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(options.anchor)
    anchor = AutoModelForCausalLM.from_pretrained(options.anchor)
    train, test = (
        text_sequences(split_stories(Path(path).read_text(encoding="utf-8"), SEPARATOR), tokenizer, options.length)
        for path in (options.train, options.test)
    )
    fitting = TextBatches(train[: options.sequences], 16)
    fitted = {"calibration": fitting, "calibration_items": options.sequences}
    scoring, measuring = (TextBatches(test[part::2][: options.sequences], 16) for part in (0, 1))

    def measure(model) -> Measurement:
        return evaluate(model, measuring)

    run = {name: value for name, value in vars(options).items() if name not in ("output_dir",)}
    rows = RowFile(output / "rows.jsonl", run)
    evaluated = partial(evaluate_anchor, rows=rows, seed=options.seed, tokens=options.length)
    target = evaluated(anchor, measure, rule="stories260K", position=1)
    depth = anchor.config.num_hidden_layers

    def self_stitch(stitch: Stitch):
        return StitchedModel.from_anchors(anchor, anchor, stitch, **fitted)

    pairs = [Stitch(i, j) for i in range(1, depth + 1) for j in range(depth)]
    kept = {"rows": rows, "seed": options.seed, "tokens": options.length}
    itself = evaluate_stitches(
        pairs, self_stitch, measure, rule="self", anchors=[fingerprint(anchor)] * 2, training=None, **kept
    )
    losses = dict(zip(pairs, (row.metrics["loss"] for row in itself), strict=True))
    print("\nstories260K to itself, loss in nats/token (rows: i source blocks run; columns: j target blocks skipped)")
    print("       " + "".join(f"j = {j}    " for j in range(depth)))
    for i in range(1, depth + 1):
        print(f"i = {i}  " + "".join(f"{losses[Stitch(i, j)]:.4f}   " for j in range(depth)))

    sibling = small_sibling(anchor, train, options, output)
    source = evaluated(sibling, measure, rule="sibling", position=0)
    begun = time.perf_counter()
    probes = train_probes(sibling, fitting), train_probes(anchor, fitting)
    scores = score_stitches(sibling, anchor, scoring, probes=probes, tokens=options.length, score="klas")
    seconds = time.perf_counter() - begun
    print(f"\nprobes and {len(scores.stitches)} scores in {seconds:.1f} s over {scores.tokens:,} tokens")
    scores.save(output / "scores.safetensors")
    scores.plot(output / "heatmap")

    def stitched(stitch: Stitch):
        return StitchedModel.from_anchors(sibling, anchor, stitch, **fitted)

    training = TrainingConfig(
        trainable=options.trainable, max_steps=options.finetune_steps, per_device_batch_size=16,
        gradient_accumulation_steps=1, learning_rate=options.learning_rate, seed=options.seed,
    )  # fmt: skip
    kept["anchors"] = [fingerprint(sibling), fingerprint(anchor)]

    def finetuned(stitch: Stitch):
        model = stitched(stitch)
        train_stitches(model, text_examples(train), training)
        return model

    initial = evaluate_stitches(scores.stitches, stitched, measure, rule="least squares", training=None, **kept)
    tuned = evaluate_stitches(scores.stitches, finetuned, measure, rule="fine-tuned", training=asdict(training), **kept)
    print("\n" + format_table([source, target, *initial, *tuned], ["loss"], target.macs))
    for name, measured in (("least-squares start", initial), ("fine-tuned", tuned)):
        for score in ("klas", "theta"):
            report = correlation_report(scores.with_score(score), measured, "loss", higher_is_better=False)
            print(f"{score} against the loss, {name}: Pearson {report.pearson:+.2f}, Spearman {report.spearman:+.2f}")


def small_sibling(anchor, train: list[list[int]], options: Options, output: Path):
    """A Llama of three narrow blocks that has learned from the anchor's outputs; kept for the next run."""
    folder = output / f"sibling-{options.sibling_steps}-{options.seed}"
    if not folder.exists():
        set_seed(options.seed)
        shape = dict(
            hidden_size=48, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
        )
        sibling = LlamaForCausalLM(
            LlamaConfig(**anchor.config.to_dict() | shape | {"head_dim": 12, "initializer_range": 0.06})
        )
        training = TrainingConfig(
            trainable="full", max_steps=options.sibling_steps, per_device_batch_size=8, gradient_accumulation_steps=1,
            learning_rate=5e-3, weight_decay=0.1, distillation_weight=0.5, seed=options.seed,
        )  # fmt: skip
        result = train_stitches(sibling, text_examples(train), training, teacher=anchor)
        print(f"\ntrained the sibling: {result.steps} steps in {result.seconds:.0f} s")
        sibling.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


if __name__ == "__main__":
    main()
