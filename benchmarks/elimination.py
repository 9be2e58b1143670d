"""What elimination loses among as many stitches as Llama 3.2 1B and 3B have, against measuring all of them in full.

    python -m benchmarks.elimination --seeds 0 1 2 --survivors 1 2 3 5

Two narrow Llamas of these depths (16 and 28 blocks), trained for a short while on Python's documentation, so that their
blocks differ. All candidates are measured in full once, and once as elimination screens them; what each number of
survivors would keep follows from these, and is checked against a run of the default.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from klas_hf import FunctionalScoring, StitchScores, TrainingConfig, score_stitches, train_stitches
from klas_hf.anchors.loading import load_anchors
from klas_hf.data.text import (
    TextBatches,
    held_out,
    python_documentation,
    text_examples,
    text_sequences,
    train_tokenizer,
)
from klas_hf.maths.buckets import best_of_buckets, bucket_of
from klas_hf.scores.functional import BUCKETS, SCREENED
from klas_hf.scores.functional_settings import enough_rows
from klas_hf.tables import markdown_table

SHAPES = ((16, 32), (28, 48))  # blocks, width
LENGTH, VOCABULARY, ITEMS = 32, 512, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--survivors", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--steps", type=int, default=500, help="of the anchors' training")
    parser.add_argument("--output", type=Path, default=Path("outputs/elimination"), help="keeps the scores")
    options = parser.parse_args()
    heading = ["seed", "survivors", "measured in full", "best of its bucket kept", "regret of a bucket, nats: mean",
               "most", "of its value: mean", "most", "front kept", "regret of a budget, nats: most"]  # fmt: skip
    lines = [heading]
    for seed in options.seeds:
        for line in measured(seed, options.survivors, options.steps, options.output):
            print(line, flush=True)
            lines.append([str(seed), *line])
    print(markdown_table(lines))


def measured(seed: int, counts: list[int], steps: int, output: Path) -> list[list[str]]:
    """A line for each number of survivors."""
    anchors, learnt, unseen = trained(seed, steps)
    fit, scored = TextBatches(learnt, 16, count=ITEMS), TextBatches(unseen, 16, count=ITEMS)
    batches, widest = list(scored), max(width for _, width in SHAPES)
    read = list(load_anchors(anchors)[1].read(fit))
    few = list(fit)[: enough_rows(read, widest)]
    full, screened, default = (
        score_stitches(*anchors, data, tokens=LENGTH, functional=settings)
        for data, settings in (
            (batches, FunctionalScoring(fit, survivors=None)),
            (batches[: round(len(batches) * SCREENED)], FunctionalScoring(few, survivors=None)),
            (batches, FunctionalScoring(fit)),
        )
    )
    full.save(output / f"seed-{seed}-full")
    screened.save(output / f"seed-{seed}-screened")
    macs, bucket = costs_of(full)
    every, guessed = values_of(full), values_of(screened)
    survivors = FunctionalScoring().survivors
    kept = best_of_buckets(guessed, bucket, survivors)
    assert {full.stitches[place] for place in kept} == set(default.stitches), "not what elimination keeps"
    return [lost(every, macs, bucket, best_of_buckets(guessed, bucket, count), count) for count in counts]


def trained(seed: int, steps: int) -> tuple[list[PreTrainedModel], list[list[int]], list[list[int]]]:
    """Both anchors, and sequences that they have and have not seen."""
    texts = held_out(python_documentation())
    tokenizer = train_tokenizer(texts[0], VOCABULARY)
    learnt, unseen = (text_sequences(some, tokenizer, LENGTH) for some in texts)
    anchors: list[PreTrainedModel] = []
    for blocks, width in SHAPES:
        set_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=blocks,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        ))  # fmt: skip
        training = TrainingConfig(
            trainable="full", max_steps=steps, per_device_batch_size=16, gradient_accumulation_steps=1,
            learning_rate=3e-3, distillation_weight=0.0, seed=seed,
        )  # fmt: skip
        result = train_stitches(model, text_examples(learnt[seed::4]), training)
        print(f"seed {seed}, {blocks} blocks: {result}", flush=True)
        anchors.append(model.eval())
    return anchors, learnt, unseen


def values_of(scores: StitchScores) -> NDArray:
    """Functional KL of the stitches in their order, in nats per token."""
    return np.array([scores.value_of(stitch) for stitch in scores.stitches])


def costs_of(scores: StitchScores) -> tuple[NDArray, NDArray]:
    """MACs and bucket of every stitch."""
    costs = scores.costs
    macs = np.array([costs.macs[stitch.source_stop - 1, stitch.target_start] for stitch in scores.stitches])
    return macs, bucket_of(macs, costs.source_total, costs.target_total, BUCKETS)


def lost(every: NDArray, macs: NDArray, bucket: NDArray, kept: NDArray, count: int) -> list[str]:
    """What is lost by measuring only some in full: of each bucket, and of each budget that ends with one."""
    best = [np.flatnonzero(bucket == one) for one in np.unique(bucket)]
    found = [np.intersect1d(places, kept) for places in best]
    regret = np.array([every[some].min() - every[all_].min() for some, all_ in zip(found, best, strict=True)])
    value = np.array([every[places].min() for places in best])
    front = [place for place in range(len(every)) if every[place] <= every[macs <= macs[place]].min()]
    edges = [macs[places].max() for places in best]
    of_budget = [every[kept][macs[kept] <= edge].min() - every[macs <= edge].min() for edge in edges]
    return [
        str(count), f"{len(kept)} of {len(every)}", f"{(regret == 0).sum()} of {len(regret)}", f"{regret.mean():.5f}",
        f"{regret.max():.5f}", f"{(regret / value).mean():.1%}", f"{(regret / value).max():.1%}",
        f"{np.isin(front, kept).sum()} of {len(front)}",
        f"{max(of_budget):.5f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
