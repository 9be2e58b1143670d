"""The whole of klas_hf on one page: two small Llamas, and the best model of every size between them. Offline, minutes.

    accelerate launch recipes/quickstart.py

1. Trains two small Llamas on Python's own documentation (once; they are cached).
2. Searches paths through their blocks by functional KL, without training anything.
3. Names the best path within three budgets, and what KLAS (Alg. 1 to 3) and ESTA's layer count choose there.
4. Assembles, heals (distilled from the large one) and measures them all, and both anchors the same way.
5. Draws pictures, saves the model of the middle budget, loads it again and lets it write.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path as Folder

import torch
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
    FunctionalScoring,
    Measurement,
    Path,
    PathScores,
    ResultRow,
    RowFile,
    SearchConfig,
    StitchedModel,
    StitchSelection,
    TradeoffCurve,
    TrainingConfig,
    esta_stitches,
    evaluate,
    evaluate_stitches,
    format_table,
    generate_greedily,
    heal,
    healing_config,
    plot_curves,
    remember_answers,
    score_stitches,
    search_paths,
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
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state

LENGTH = 64  # tokens of a sequence
VOCABULARY = 1024
SMALL = dict(
    hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
LARGE = dict(
    hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
BUDGETS = (0.4, 0.6, 0.8)  # of the large one's MACs
ANCHORS = ("0[:]", "1[:]")


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "where pictures, rows and the model go"})
    cache_dir: str = field(
        default="~/.cache/klas_hf/quickstart", metadata={"help": "where the two anchors are kept for the next run"}
    )
    small_steps: int = field(default=500, metadata={"help": "optimiser steps of the small anchor's training"})
    large_steps: int = field(default=1200, metadata={"help": "optimiser steps of the large anchor's training"})
    steps: int = field(default=100, metadata={"help": "optimiser steps of healing per model, after its rate is found"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    smoke: bool = field(
        default=False, metadata={"help": "little text, barely trained anchors, hardly healed: no result"}
    )


def main() -> None:
    (args,) = parse_options(QuickstartArguments, description=__doc__.split("\n")[0])
    if args.smoke:
        args.small_steps, args.large_steps, args.steps = 10, 20, 2
    with input_read(args):
        run = Quickstart(args)
    run.prepare()
    found = run.search()
    by_rule = run.heal(run.choose(found))
    run.report(by_rule)
    run.write_with(found.best(BUDGETS[1]))
    run.say("\nMade:")
    for name in ("curve.png", "paths.png", "paths.safetensors", "rows.jsonl", "model"):
        run.say(f"  {run.output / name}")
    run.say("\nNext, the same with your own models and text:")
    run.say(
        "  klas-hf make meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-3B --budget 60% --data text.txt --output between"
    )


class Quickstart:
    """The five steps, and what they share."""

    def __init__(self, args: QuickstartArguments):
        self.args, self.state, self.output = args, process_state(), Folder(args.output_dir)
        self.say = partial(self.state.print, flush=True)
        if self.state.device.type == "cpu" and self.state.num_processes == 1:
            torch.set_num_threads(min(2, os.cpu_count() or 1))  # accelerate gives one; a second saves a quarter
        self.clock = Clock(self.say)
        self.models: dict[str, PreTrainedModel] = {}
        settings = {name: getattr(args, name) for name in ("small_steps", "large_steps", "steps")}
        self.rows = RowFile(self.output / "rows.jsonl", {"recipe": "quickstart", **settings})
        self.healing = healing_config(
            args.steps,
            per_device_batch_size=8 // self.state.num_processes or 1,
            eval_steps=max(1, args.steps // 2),
            seed=args.seed,
        )
        self.say(f"klas_hf quickstart: {self.state.num_processes} process(es) on {self.state.device}")

    def prepare(self) -> None:
        """Text, tokenizer and both anchors."""
        self.say("\n[1/5] Anchors: two Llamas trained on Python's own documentation")
        train_texts, test_texts = held_out(python_documentation()[:: 9 if self.args.smoke else 1])
        megabytes, held = (sum(map(len, texts)) / 1e6 for texts in (train_texts, test_texts))
        self.say(f"  {megabytes:.1f} MB of it to train on, {held:.1f} MB held out")
        self.small, self.large, self.tokenizer = anchors(self.args, train_texts, self.state)
        parts = (train_texts, test_texts[::2], test_texts[1::2])
        train, validation, test = (text_sequences(texts, self.tokenizer, LENGTH) for texts in parts)
        self.examples, self.validation = (
            text_examples(train),
            text_examples(validation[:: max(1, len(validation) // 80)]),
        )
        self.fitting = TextBatches(train[:: max(1, len(train) // 256)], 16)
        self.scored, self.test = TextBatches(validation, 16), TextBatches(test, 32)
        for name, model in (("small", self.small), ("large", self.large)):
            loss, size = evaluate(model, self.test).metrics["loss"], model.num_parameters() / 1e6
            self.say(f"  the {name} one: {size:.2f} M parameters, {loss:.3f} nats/token on held-out text")
        self.clock.lap("two anchors and their losses")

    def search(self) -> PathScores:
        """Paths of every kind, by KL from the large anchor's answers to theirs at their least-squares start."""
        self.say("\n[2/5] Search: pruned, stitched and mixed paths of every size, nothing trained")
        config = SearchConfig(scoring=FunctionalScoring(calibration=self.fitting, temperature=1.0))
        found = search_paths(
            [self.small, self.large], self.scored, config, tokens=LENGTH, output=self.output / "search.jsonl"
        )
        if self.state.is_main_process:
            found.save(self.output / "paths.safetensors")
            found.plot(self.output / "paths")
        self.joints = {path: found.joint(path, steps=self.args.steps) for path in found.paths}
        self.say("  " + str(found).replace("\n", "\n  "))
        self.clock.lap("search")
        return found

    def choose(self, found: PathScores) -> dict[str, list[Path]]:
        """The best path within each budget, and what KLAS and ESTA take there."""
        self.say("\n[3/5] Three budgets: the best path of the search, KLAS's lowest Γ (Eq. 2), ESTA's layer count")
        probes = train_probes(self.small, self.fitting), train_probes(self.large, self.fitting)
        scores = score_stitches(self.small, self.large, self.scored, probes=probes, tokens=LENGTH, score="klas")
        by_layers: StitchSelection = esta_stitches(scores.costs)
        chosen: dict[str, list[Path]] = {"search": [], "klas": [], "esta": []}
        for budget in BUDGETS:
            chosen["search"].append(found.best(budget))
            limits = (budget - 0.2) * found.dearest.macs, budget * found.dearest.macs
            near = [s for s in scores.stitches if limits[0] < scores.costs.of(s)[0] <= limits[1]]
            counted = [s for s in by_layers if limits[0] < scores.costs.of(s)[0] <= limits[1]]
            chosen["klas"] += [min(near, key=scores.value_of).path] if near else []
            chosen["esta"] += [counted[-1].path] if counted else []
            self.say(f"  {budget:.0%}: {', '.join(f'{rule} {paths[-1]}' for rule, paths in chosen.items() if paths)}")
        self.clock.lap("probes, Γ and choices")
        return {rule: list(dict.fromkeys(paths)) for rule, paths in chosen.items()}

    def heal(self, chosen: dict[str, list[Path]]) -> dict[str, list[ResultRow]]:
        """Make, heal and measure every path, and both anchors the same way."""
        count = sum(map(len, chosen.values())) + len(ANCHORS)
        self.say(f"\n[4/5] Least-squares start, then {self.args.steps} steps of healing, for {count} models")
        made = {"anchors": [fingerprint(self.small), fingerprint(self.large)], "training": asdict(self.healing)}
        evaluation = {"rows": self.rows, "seed": self.args.seed, "tokens": LENGTH}
        paths = {"anchors": [Path.parse(text) for text in ANCHORS], **chosen}
        with remember_answers(self.large):  # which sees the same batches for every model
            by_rule = {
                rule: evaluate_stitches(of_rule, self.make, self.measure, rule=rule, **made, **evaluation)
                for rule, of_rule in paths.items()
            }
        self.clock.lap("healing")
        return by_rule

    def make(self, path: Path) -> PreTrainedModel:
        """The model of a path, healed; the large one, which has no teacher, learns from the text itself."""
        calibration = self.fitting if path.joints else None
        joint = self.joints.get(path, "least_squares")  # "merged" into the block before, or none: "identity"
        model = StitchedModel.from_path([self.small, self.large], path, calibration=calibration, joint=joint)
        model = model.to(self.state.device)
        teacher = None if str(path) == ANCHORS[1] else self.large
        heal(model, self.examples, teacher=teacher, validation=self.validation, config=self.healing)
        self.models[str(path)] = model
        return model

    def measure(self, model: PreTrainedModel) -> Measurement:
        """Loss on the test text."""
        return evaluate(model.to(self.state.device), self.test)

    def report(self, by_rule: dict[str, list[ResultRow]]) -> None:
        """Table, curve, and how much of the gap between the anchors is closed."""
        rows = [row for of_rule in by_rule.values() for row in of_rule]
        small, large = by_rule["anchors"]
        self.say("\n" + format_table(rows, ["loss"], large.macs))
        curves = [
            TradeoffCurve(by_rule[rule], "loss", higher_is_better=False, label=label)
            for rule, label in (
                ("search", "best path"), ("klas", "KLAS"), ("esta", "ESTA"), ("anchors", "the anchors, tuned alike"),
            )
            if by_rule[rule]
        ]  # fmt: skip
        if self.state.is_main_process:
            plot_curves(curves, title="Models of every size from two Llamas", path=self.output / "curve")
        self.say("\nHow much of the gap between the two anchors (both tuned alike) each closes, of its cost:")
        gap = small.metrics["loss"] - large.metrics["loss"]
        for row in sorted((row for row in rows if row.joints), key=lambda row: row.macs):
            closed = (small.metrics["loss"] - row.metrics["loss"]) / gap
            line = (row.macs - small.macs) / (large.macs - small.macs)
            self.say(
                f"  {row.macs / large.macs:4.0%}  {row.rule:6} {row.path:24} {closed:4.0%}  (straight line {line:.0%})"
            )
        self.say("One seed of two tiny models: docs and LOG.md have more families, seeds and lengths.")

    def write_with(self, path: Path) -> None:
        """Save a model, load it as anyone would, and let it go on with a sentence."""
        self.say("\n[5/5] The model of the middle budget, saved, loaded through AutoModelForCausalLM and writing")
        folder = self.output / "model"
        model = self.models.get(str(path)) or self.make(path)  # a resumed run has rows, but no models
        if self.state.is_main_process:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        self.state.wait_for_everyone()
        loaded = AutoModelForCausalLM.from_pretrained(folder).to(self.state.device)
        reader = AutoTokenizer.from_pretrained(folder)
        prompt = [reader.bos_token_id, *reader("The “for” statement is used to", add_special_tokens=False)["input_ids"]]
        (answer,) = generate_greedily(loaded, [prompt], max_new_tokens=40)
        self.say(f"  path {path}, {evaluate(loaded, self.test).metrics['loss']:.3f} nats/token")
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
    cache = Folder(args.cache_dir).expanduser() / f"steps-{args.small_steps}-{args.large_steps}-seed-{args.seed}"
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

                def save(folder: Folder, model: PreTrainedModel = model) -> None:
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
    main()
