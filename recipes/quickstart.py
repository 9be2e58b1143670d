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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from klas_hf import (
    Measurement,
    ResultRow,
    RowFile,
    Stitch,
    StitchedModel,
    StitchScores,
    StitchSelection,
    TradeoffCurve,
    TrainingConfig,
    common_interval,
    esta_stitches,
    evaluate,
    evaluate_anchor,
    evaluate_stitches,
    format_table,
    generate_greedily,
    plot_curves,
    score_stitches,
    select_stitches,
    train_probes,
    train_stitches,
)
from klas_hf.anchors.weights import fingerprint
from klas_hf.data.text import (
    TextBatches,
    held_out,
    python_documentation,
    text_examples,
    text_sequences,
    train_tokenizer,
)
from klas_hf.files import write_folder_atomically
from klas_hf.options import parse_options
from klas_hf.processes import process_state

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
    (args,) = parse_options(QuickstartArguments, description=__doc__.split("\n")[0])
    if args.smoke:
        args.stitches, args.small_steps, args.large_steps, args.steps = 2, 10, 20, 2
    run = Quickstart(args)
    run.prepare()
    scores = run.score()
    by_rule = run.stitch(run.select(scores))
    run.report(by_rule)
    run.write_with_the_best(by_rule)
    run.say("\nMade:")
    for name in ("heatmap.png", "curve.png", "rows.jsonl", "scores.safetensors", "model"):
        run.say(f"  {run.output / name}")
    run.say("\nNext: the paper's language experiment, with your own Llamas:")
    run.say(
        "  accelerate launch recipes/truthfulqa.py --source meta-llama/Llama-3.2-1B-Instruct "
        "--target meta-llama/Llama-3.2-3B-Instruct"
    )


class Quickstart:
    """The five steps, and what they share."""

    def __init__(self, args: QuickstartArguments):
        self.args, self.state, self.output = args, process_state(), Path(args.output_dir)
        self.say = partial(self.state.print, flush=True)
        self.clock = Clock(self.say)
        self.models: dict[Stitch, PreTrainedModel] = {}
        settings = {name: getattr(args, name) for name in ("small_steps", "large_steps", "steps", "stitches")}
        self.rows = RowFile(self.output / "rows.jsonl", {"recipe": "quickstart", **settings})
        self.training = TrainingConfig(
            trainable="full", max_steps=args.steps, per_device_batch_size=8 // self.state.num_processes or 1,
            gradient_accumulation_steps=1, learning_rate=2e-3, seed=args.seed,
        )  # fmt: skip
        self.evaluation = {"rows": self.rows, "seed": args.seed, "tokens": LENGTH}
        self.say(f"klas_hf quickstart: {self.state.num_processes} process(es) on {self.state.device}")

    def prepare(self) -> None:
        """Text, tokenizer and both anchors, measured on text that neither has seen."""
        self.say("\n[1/5] Anchors: two Llamas trained on Python's own documentation")
        train_texts, test_texts = held_out(python_documentation())
        megabytes, held = (sum(map(len, texts)) / 1e6 for texts in (train_texts, test_texts))
        self.say(f"  {megabytes:.1f} MB of it to train on, {held:.1f} MB held out")
        self.source, self.target, self.tokenizer = anchors(self.args, train_texts, self.state)
        parts = (train_texts, test_texts[::2], test_texts[1::2])
        train, validation, test = (text_sequences(texts, self.tokenizer, LENGTH) for texts in parts)
        self.examples = text_examples(train)
        self.fitting = TextBatches(train[:: max(1, len(train) // 1024)], 32)
        self.validation, self.test = TextBatches(validation, 32), TextBatches(test, 32)
        self.ends = [
            evaluate_anchor(model, self.measure, rule=name, position=place, **self.evaluation)
            for place, (name, model) in enumerate({"source": self.source, "target": self.target}.items())
        ]
        for row in self.ends:
            size, loss = row.parameters / 1e6, row.metrics["loss"]
            self.say(f"  {row.rule}: {size:.2f} M parameters, {loss:.3f} nats/token on held-out text")
        self.clock.lap("two anchors and their losses")

    def measure(self, model: PreTrainedModel) -> Measurement:
        """Loss on the test text."""
        return evaluate(model.to(self.state.device), self.test)

    def score(self) -> StitchScores:
        """Probes on training text, scores of all stitches on validation text."""
        self.say("\n[2/5] Probes (ridge, logit-lens style) on training text; scores of all stitches on held-out text")
        probes = train_probes(self.source, self.fitting), train_probes(self.target, self.fitting)
        scores = score_stitches(self.source, self.target, self.validation, probes=probes, tokens=LENGTH, score="klas")
        if self.state.is_main_process:
            scores.save(self.output / "scores.safetensors")
            scores.plot(self.output / "heatmap")
        self.say(f"  {len(scores.stitches)} stitches scored over {scores.tokens:,} tokens")
        self.clock.lap("probes and scores")
        return scores

    def select(self, scores: StitchScores) -> dict[str, StitchSelection]:
        """Some stitches by KLAS (Alg. 3), as many by ESTA."""
        count = self.args.stitches
        self.say(f"\n[3/5] Selection: KLAS takes the lowest score of each of {count} cost buckets, ESTA counts layers")
        chosen = {
            "klas": select_stitches(scores, buckets=count).best_per_bucket(),
            "esta": esta_stitches(scores.costs).spread(count),
        }
        for rule, stitches in chosen.items():
            listed = ", ".join(f"{stitch} with Γ = {scores.value_of(stitch):.2f}" for stitch in stitches)
            self.say(f"  {rule.upper()}: {listed}")
        return chosen

    def stitch(self, chosen: dict[str, StitchSelection]) -> dict[str, list[ResultRow]]:
        """Make, train and measure every chosen stitch."""
        self.say(f"\n[4/5] Stitching (least-squares start) and {self.args.steps} steps of fine-tuning each")
        made = {"anchors": [fingerprint(self.source), fingerprint(self.target)], "training": asdict(self.training)}
        by_rule = {
            rule: evaluate_stitches(stitches, self.make, self.measure, rule=rule, **made, **self.evaluation)
            for rule, stitches in chosen.items()
        }
        self.clock.lap("stitches")
        return by_rule

    def make(self, stitch: Stitch) -> PreTrainedModel:
        """One stitched model, fine-tuned."""
        model = StitchedModel.from_anchors(
            self.source, self.target, stitch, calibration=self.fitting, calibration_items=1024
        )
        train_stitches(model.to(self.state.device), self.examples, self.training)
        self.models[stitch] = model
        return model

    def report(self, by_rule: dict[str, list[ResultRow]]) -> None:
        """Table, curve, and who is ahead."""
        rows = [*self.ends, *(row for chosen in by_rule.values() for row in chosen)]
        self.say("\n" + format_table(rows, ["loss"], self.ends[1].macs))
        curves = [
            TradeoffCurve([self.ends[0], *chosen, self.ends[1]], "loss", higher_is_better=False, label=rule)
            for rule, chosen in by_rule.items()
        ]
        if self.state.is_main_process:
            plot_curves(curves, title="Stitched models between two Llamas", path=self.output / "curve")
        common = common_interval(curves)
        areas = {curve.label: curve.auc(common) for curve in curves}
        ahead = min(areas, key=areas.__getitem__).upper()
        self.say(f"\nMean loss over the curve, lower is better: KLAS {areas['klas']:.4f}, ESTA {areas['esta']:.4f}.")
        self.say(f"{ahead} is ahead on this text with this seed; one seed of two tiny models decides nothing.")

    def write_with_the_best(self, by_rule: dict[str, list[ResultRow]]) -> None:
        """Save the best stitched model, load it as anyone would, and let it go on with a sentence."""
        self.say("\n[5/5] The best stitched model, saved, loaded through AutoModelForCausalLM and writing")
        best = min((row for chosen in by_rule.values() for row in chosen), key=lambda row: row.metrics["loss"])
        stitch, folder = best.stitch, self.output / "model"
        model = self.models.get(stitch) or self.make(stitch)  # a resumed run has rows, but no models
        if self.state.is_main_process:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        self.state.wait_for_everyone()
        loaded = AutoModelForCausalLM.from_pretrained(folder).to(self.state.device)
        reader = AutoTokenizer.from_pretrained(folder)
        prompt = [reader.bos_token_id, *reader("The “for” statement is used to", add_special_tokens=False)["input_ids"]]
        (answer,) = generate_greedily(loaded, [prompt], max_new_tokens=40)
        self.say(f"  stitch {stitch} ({best.rule}), {best.metrics['loss']:.3f} nats/token")
        self.say(f"  {reader.decode(prompt + answer, skip_special_tokens=True)!r}")
        self.clock.lap("saving, loading, writing")


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
    if not (cache / "large").exists():
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
            state.print(f"  trained the {name} one: {result}")
            if state.is_main_process:

                def save(folder: Path, model: PreTrainedModel = model) -> None:
                    tokenizer.save_pretrained(folder)
                    model.save_pretrained(folder)

                write_folder_atomically(cache / name, save)
            state.wait_for_everyone()
    else:
        state.print(f"  from the cache at {cache}")
    load = AutoModelForCausalLM.from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(cache / "small")
    return load(cache / "small").to(state.device), load(cache / "large").to(state.device), tokenizer


if __name__ == "__main__":
    main()  # one thread, as accelerate gives a CPU process: for models this small a second one gains nothing
