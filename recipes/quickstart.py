"""The whole of klas_hf on one page: two small Llamas, their probes, scores, stitches, and a curve. Offline, minutes.

    accelerate launch recipes/quickstart.py

1. Trains two small Llamas on Python's own documentation (once; they are cached).
2. Fits probes to every block and scores all stitches (KLAS, Alg. 1 and 2).
3. Picks stitches by KLAS and by ESTA's layer count, at matched size (Alg. 3).
4. Stitches (least-squares start), fine-tunes and measures each on held-out text.
5. Draws heatmap and curve, saves the best stitched model, loads it again and lets it write.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from klas_hf import (
    Measurement,
    RowFile,
    Stitch,
    StitchedModel,
    TradeoffCurve,
    TrainingConfig,
    common_interval,
    esta_stitches,
    evaluate_anchor,
    evaluate_loss,
    evaluate_stitches,
    format_table,
    generate_greedily,
    plot_curves,
    score_stitches,
    select_stitches,
    train_probes,
    train_stitches,
)
from klas_hf.processes import process_state
from klas_hf.tasks.text import (
    TextBatches,
    held_out,
    python_documentation,
    text_examples,
    text_sequences,
    train_tokenizer,
)

LENGTH = 64  # tokens of a sequence
VOCABULARY = 1024
SMALL = dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
LARGE = dict(
    hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "where pictures, rows and the model go"})
    cache_dir: str = field(
        default="~/.cache/klas_hf/quickstart", metadata={"help": "where the two anchors are kept for the next run"}
    )
    stitches: int = field(default=3, metadata={"help": "cost buckets, and how many stitches each rule may take"})
    small_steps: int = field(default=600, metadata={"help": "optimiser steps of the small anchor's training"})
    large_steps: int = field(default=1500, metadata={"help": "optimiser steps of the large anchor's training"})
    steps: int = field(default=120, metadata={"help": "optimiser steps of fine-tuning per stitch"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    smoke: bool = field(default=False, metadata={"help": "barely trained anchors and stitches: seconds, no result"})


def main() -> None:
    (args,) = HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses()
    if args.smoke:
        args.stitches, args.small_steps, args.large_steps, args.steps = 2, 10, 20, 2
    state = process_state()
    say = partial(state.print, flush=True)
    output = Path(args.output_dir)
    say(f"klas_hf quickstart: {state.num_processes} process(es) on {state.device}")

    clock = Clock(say)
    say("\n[1/5] Anchors: two Llamas trained on Python's own documentation")
    train_texts, test_texts = held_out(python_documentation())
    megabytes, held = (sum(map(len, texts)) / 1e6 for texts in (train_texts, test_texts))
    say(f"  {megabytes:.1f} MB of it to train on, {held:.1f} MB held out")
    source, target, tokenizer = anchors(args, train_texts, state)
    train = text_sequences(train_texts, tokenizer, LENGTH)
    validation, test = (text_sequences(texts, tokenizer, LENGTH) for texts in (test_texts[::2], test_texts[1::2]))
    test_batches = TextBatches(test, 32)

    def measure(model: PreTrainedModel) -> Measurement:
        return Measurement({"loss": evaluate_loss(model.to(state.device), test_batches)})

    settings = {name: getattr(args, name) for name in ("small_steps", "large_steps", "steps", "stitches")}
    rows = RowFile(output / "rows.jsonl", {"recipe": "quickstart", **settings})
    ends = [
        evaluate_anchor(model, measure, rule=name, rows=rows, seed=args.seed, tokens=LENGTH)
        for name, model in (("source", source), ("target", target))
    ]
    for row in ends:
        size, loss = row.parameters / 1e6, row.metrics["loss"]
        say(f"  {row.rule}: {size:.2f} M parameters, {loss:.3f} nats/token on held-out text")

    clock.lap("two anchors and their losses")
    say("\n[2/5] Probes (ridge, logit-lens style) on the training text; scores of all stitches on held-out text")
    fitting = TextBatches(train[:: max(1, len(train) // 1024)], 32)
    probes = train_probes(source, fitting), train_probes(target, fitting)
    scores = score_stitches(source, target, TextBatches(validation, 32), probes=probes, tokens=LENGTH)
    scores.save(output / "scores.safetensors")
    scores.plot(output / "heatmap")
    say(f"  {len(scores.stitches)} stitches scored over {scores.tokens:,} tokens")

    clock.lap("probes and scores")
    say(f"\n[3/5] Selection: KLAS takes the lowest score of each of {args.stitches} cost buckets, ESTA counts layers")
    klas = select_stitches(scores, buckets=args.stitches).best_per_bucket()
    esta = esta_stitches(scores.costs).spread(args.stitches)
    for name, chosen in (("KLAS", klas), ("ESTA", esta)):
        say(f"  {name}: " + ", ".join(f"{stitch} with Γ = {scores.value_of(stitch):.2f}" for stitch in chosen))

    say(f"\n[4/5] Stitching (least-squares start) and {args.steps} steps of fine-tuning each")
    examples = text_examples(train)
    training = TrainingConfig(
        trainable="full", max_steps=args.steps, per_device_batch_size=8 // state.num_processes or 1,
        gradient_accumulation_steps=1, learning_rate=2e-3, seed=args.seed,
    )  # fmt: skip
    models: dict[Stitch, PreTrainedModel] = {}

    def make(stitch: Stitch) -> PreTrainedModel:
        models[stitch] = StitchedModel.from_anchors(source, target, stitch, calibration=fitting)
        train_stitches(models[stitch].to(state.device), examples, training)
        return models[stitch]

    by_rule = {
        rule: evaluate_stitches(chosen, make, measure, rule=rule, rows=rows, seed=args.seed, tokens=LENGTH)
        for rule, chosen in (("klas", klas), ("esta", esta))
    }
    say("\n" + format_table([*ends, *by_rule["klas"], *by_rule["esta"]], ["loss"], ends[1].macs))
    curves = [
        TradeoffCurve([ends[0], *chosen, ends[1]], "loss", higher_is_better=False, label=rule)
        for rule, chosen in by_rule.items()
    ]
    plot_curves(curves, title="Stitched models between two Llamas", path=output / "curve")
    common = common_interval(curves)
    areas = {curve.label: curve.auc(common) for curve in curves}
    ahead = min(areas, key=areas.__getitem__)
    say(f"\nMean loss over the curve, lower is better: KLAS {areas['klas']:.4f}, ESTA {areas['esta']:.4f}.")
    say(f"{ahead.upper()} is ahead on this text with this seed; one seed of two tiny models decides nothing.")

    clock.lap("stitches")
    say("\n[5/5] The best stitched model, saved, loaded through AutoModelForCausalLM and writing")
    best = min((row for chosen in by_rule.values() for row in chosen), key=lambda row: row.metrics["loss"])
    stitch = Stitch(*best.stitch)
    folder = output / "model"
    model = models[stitch] if stitch in models else make(stitch)  # a resumed run has rows, but no models
    if state.is_main_process:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    state.wait_for_everyone()
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(state.device)
    reader = AutoTokenizer.from_pretrained(folder)
    prompt = [reader.bos_token_id, *reader("The “for” statement is used to", add_special_tokens=False)["input_ids"]]
    (answer,) = generate_greedily(loaded, [prompt], max_new_tokens=40)[:1]
    say(f"  stitch {stitch} ({best.rule}), {best.metrics['loss']:.3f} nats/token")
    say(f"  {reader.decode(prompt + answer, skip_special_tokens=True)!r}")

    clock.lap("saving, loading, writing")

    say("\nMade:")
    for name in ("heatmap.png", "curve.png", "rows.jsonl", "scores.safetensors", "model"):
        say(f"  {output / name}")
    say("\nNext: the paper's language experiment, with your own Llamas:")
    say(
        "  accelerate launch recipes/truthfulqa.py --source meta-llama/Llama-3.2-1B-Instruct "
        "--target meta-llama/Llama-3.2-3B-Instruct"
    )


class Clock:
    """Says how long each step took, and the most memory the process has had."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.since = say, time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        self.say(f"  ({step}: {now - self.since:.0f} s, peak memory {peak:,.0f} MB)")
        self.since = now


def anchors(
    args: QuickstartArguments, texts: list[str], state: PartialState
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Both anchors and their tokenizer, from the cache or trained now."""
    cache = Path(args.cache_dir).expanduser() / f"steps-{args.small_steps}-{args.large_steps}-seed-{args.seed}"
    if not (cache / "large" / "config.json").exists():
        tokenizer = train_tokenizer(texts, VOCABULARY)
        examples = text_examples(text_sequences(texts, tokenizer, LENGTH))
        for name, shape, steps, rate in (
            ("small", SMALL, args.small_steps, 5e-3),
            ("large", LARGE, args.large_steps, 3e-3),
        ):
            set_seed(args.seed)
            config = LlamaConfig(
                vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, **shape,
            )  # fmt: skip
            model = LlamaForCausalLM(config).to(state.device)
            training = TrainingConfig(
                trainable="full", max_steps=steps, per_device_batch_size=8 // state.num_processes or 1,
                gradient_accumulation_steps=1, learning_rate=rate, weight_decay=0.1, seed=args.seed,
            )  # fmt: skip
            result = train_stitches(model, examples, training)
            state.print(f"  trained the {name} one: {result.steps} steps in {result.seconds:.0f} s")
            if state.is_main_process:
                tokenizer.save_pretrained(cache / name)
                model.save_pretrained(cache / name)
            state.wait_for_everyone()
    else:
        state.print(f"  from the cache at {cache}")
    load = AutoModelForCausalLM.from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(cache / "small")
    return load(cache / "small").to(state.device), load(cache / "large").to(state.device), tokenizer


if __name__ == "__main__":
    main()  # one thread, as accelerate gives a CPU process: for models this small a second one gains nothing
