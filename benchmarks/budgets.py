"""What a path takes, foretold from its parts, beside what its model takes: as ratios in one run.

    python benchmarks/budgets.py

Random Llamas of two widths; random paths of one to three slices. Each path is timed whole in turn with the anchors, and
foretold from the anchors' parts in those same rounds: what the sums are worth. Beside that, what a user has: foretold
from parts that another process has timed once, at the beginning. Aim: within 5 % for every path. A machine may drift by
more within seconds: every path is timed in several sittings, minutes apart, which say by how much.
"""

import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from statistics import fmean, median
from typing import cast

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, PreTrainedModel

from klas_hf import Path, StitchedModel, Usage, measure_path_costs
from klas_hf.costs import PathCosts, timing
from klas_hf.costs.timing import Timed, time_parts
from klas_hf.paths import Slice


@dataclass
class Options:
    widths: list[int] = field(default_factory=lambda: [512, 768], metadata={"help": "of the two anchors"})
    blocks: list[int] = field(default_factory=lambda: [6, 8], metadata={"help": "of the two anchors"})
    vocabulary: int = field(default=8_000, metadata={"help": "size of the vocabulary"})
    prompt: int = field(default=128, metadata={"help": "tokens before the first that is written"})
    batch: int = field(default=1, metadata={"help": "sequences at once"})
    paths: int = field(default=20, metadata={"help": "random paths"})
    sittings: int = field(default=2, metadata={"help": "of all paths, one after the other"})
    rounds: int = field(default=6, metadata={"help": "in which a path is timed in each"})
    dtype: str = field(default="float32", metadata={"help": "of the anchors"})
    device: str = field(default="cpu", metadata={"help": "where they run"})
    threads: int = field(default=1, metadata={"help": "torch threads"})


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        costs = other.submit(foretold, options).result()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    anchors = [make_anchor(options, number) for number in (0, 1)]
    paths = random_paths(options)
    timing.ROUNDS = options.rounds
    seconds: list[list[list[float]]] = [[] for _ in paths]
    for _ in range(options.sittings):
        for path, found in zip(paths, seconds, strict=True):
            found.append(compared(anchors, path, costs))
    print(f"torch {torch.__version__}, {options}\n")
    report(paths, seconds)


def report(paths: Sequence[Path], seconds: Sequence[Sequence[Sequence[float]]]) -> None:
    """Print ratios, means over the sittings.

    Args:
        seconds: of each path and sitting, what `compared` gives.
    """
    columns = ["ms to the first token", "foretold in turn", "beforehand", "ms per token", "in turn", "beforehand"]
    print(f"| path | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    ratios: list[list[float]] = []
    for path, found in zip(paths, seconds, strict=True):
        means = [fmean(column) for column in zip(*found, strict=True)]
        figures = [means[place] / means[place // 3 * 3] if place % 3 else 1e3 * means[place] for place in range(6)]
        ratios.append([figures[place] for place in (1, 2, 4, 5)])
        cells = [f"{one:.3f}" if place % 3 else f"{one:.2f}" for place, one in enumerate(figures)]
        print(f"| `{path}` | {' | '.join(cells)} |")
    names = [f"{what}, {when}" for what in ("to the first token", "per token") for when in ("in turn", "beforehand")]
    for name, of in zip(names, zip(*ratios, strict=True), strict=True):
        away = [abs(ratio - 1) for ratio in of]
        within = sum(one <= 0.05 for one in away)
        print(f"\n{name}: {within} of {len(of)} within 5 %; median {median(away):.1%}, most {max(away):.1%} away")
    for what, place in (("to the first token", 0), ("per token", 3)):
        drift = [max(one[place] for one in found) / min(one[place] for one in found) - 1 for found in seconds]
        print(f"\nsittings of one path, {what}: median {median(drift):.1%}, most {max(drift):.1%} apart")


def foretold(options: Options) -> PathCosts:
    """What paths cost, timed anew: nothing that was kept before is read."""
    torch.set_num_threads(options.threads)
    anchors = [make_anchor(options, number) for number in (0, 1)]
    usage = Usage(prompt=options.prompt, batch=options.batch, device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HOME = folder
        return measure_path_costs(anchors, usage=usage)


def compared(anchors: Sequence[PreTrainedModel], path: Path, costs: PathCosts) -> list[float]:
    """Of a prompt and then of a token: seconds, as timed, as foretold in the same rounds, and as foretold before."""
    model, before = StitchedModel.from_path(anchors, path), costs.times
    assert before is not None
    usage = before.usage
    ids = {"input_ids": torch.ones(usage.batch, usage.prompt, dtype=torch.long, device=usage.device)}
    blocks = [[(block, block) for block in anchor.get_submodule("model.layers")] for anchor in anchors]
    parts = [Timed(anchor, of, ids) for anchor, of in zip(anchors, blocks, strict=True)]
    *found, whole = time_parts([*parts, Timed(model.eval(), [], ids)])
    predictions = [replace(costs, times=replace(before, parts=found)).of(path), costs.of(path)]
    return [
        cast(float, one)
        for name in ("seconds", "token_seconds")
        for one in (*getattr(whole, name), *(getattr(one, name) for one in predictions))
    ]


def make_anchor(options: Options, number: int) -> PreTrainedModel:
    width = options.widths[number]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=options.blocks[number],
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        vocab_size=options.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()


def random_paths(options: Options) -> list[Path]:
    """Paths of one to three slices of at least one block, in random anchors; no slice goes on where it was cut."""
    chosen, found = random.Random(0), []
    while len(found) < options.paths:
        places = [chosen.randrange(2) for _ in range(chosen.randint(1, 3))]
        slices = []
        for number, place in enumerate(places):
            depth = options.blocks[place]
            start = 0 if number == 0 else chosen.randrange(depth)
            last = number == len(places) - 1
            slices.append(Slice(place, start, None if last else chosen.randint(start + 1, depth)))
        pairs = zip(slices, slices[1:], strict=False)
        if not any(one.anchor == other.anchor and one.stop == other.start for one, other in pairs):
            found.append(Path(tuple(slices)))
    return found


if __name__ == "__main__":
    main()
