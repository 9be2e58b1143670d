"""What stitched models cost beside their bounds, as ratios in one run: loading, memory, forward, decode, import, costs.

    python benchmarks/stitched_models.py

Anchors are random Llamas of the shape of Llama 3.2 1B and 3B, made thin or deep by options, saved in shards; each
measurement of time and memory of loading runs in a process of its own. Times are the least of several.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, LlamaForCausalLM

from klas_hf import StitchedModel, measure_stitch_costs
from klas_hf.selection.choice import bucket_of
from klas_hf.selection.klas import near_bucket_minimum


@dataclass
class Options:
    blocks: int = field(default=6, metadata={"help": "blocks of the source; the target has 7 for each 4 of them"})
    scale: int = field(default=2, metadata={"help": "widths are those of Llama 3.2 divided by this"})
    vocabulary: int = field(default=16_032, metadata={"help": "size of the vocabulary"})
    dtype: str = field(default="float32", metadata={"help": "of the anchors"})
    only_loading: bool = field(default=False, metadata={"help": "leave out what runs the models (for real sizes)"})
    repeats: int = field(default=5, metadata={"help": "the least time of so many counts"})
    threads: int = field(default=2, metadata={"help": "torch threads"})
    load: str | None = field(default=None, metadata={"help": "internal: what a child process loads"})
    folder: str | None = field(default=None, metadata={"help": "internal: where the models are"})


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    if options.load:
        print(json.dumps(measure_loading(options.load, Path(options.folder))))
        return
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options}\n")
    print("| what | ours | bound | ratio | aim |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target = make_anchors(options, folder)
        stitch = options.blocks // 2, target.config.num_hidden_layers // 2
        StitchedModel.from_anchors(folder / "source", folder / "target", stitch).save_pretrained(folder / "stitched")
        (folder / "stitch.json").write_text(json.dumps(stitch))
        loading(options, folder)
        if options.only_loading:
            return
        running(options, source, target, StitchedModel.from_anchors(source, target, stitch), stitch)
    importing(options)
    begun = time.perf_counter()
    costs = measure_stitch_costs(*llama_3_2())
    report("costs of all 448 stitches of Llama 3.2 1B and 3B, s", time.perf_counter() - begun, 10, "<= 10 s")
    selecting(options, costs)


def report(what: str, ours: float, bound: float, aim: str) -> None:
    print(f"| {what} | {ours:.4g} | {bound:.4g} | {ours / bound:.3f} | {aim} |", flush=True)


def least(options: Options, run: Callable[[], object]) -> float:
    """Least seconds of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(options.repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


def llama_3_2(scale: int = 1, blocks: int = 16, vocabulary: int = 128_256) -> tuple[LlamaConfig, LlamaConfig]:
    """Configurations of the shape of Llama 3.2 1B and 3B."""
    common = {"vocab_size": vocabulary, "intermediate_size": 8192 // scale, "num_key_value_heads": 8 // min(scale, 4)}
    common |= {"tie_word_embeddings": True}
    small = LlamaConfig(
        hidden_size=2048 // scale, num_hidden_layers=blocks, num_attention_heads=32 // scale, head_dim=64, **common
    )
    shape = {"hidden_size": 3072 // scale, "num_hidden_layers": blocks * 7 // 4, "num_attention_heads": 24 // scale}
    large = LlamaConfig(**shape, head_dim=128, **common)
    return small, large


def make_anchors(options: Options, folder: Path) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    models = []
    for name, config in zip(
        ("source", "target"), llama_3_2(options.scale, options.blocks, options.vocabulary), strict=True
    ):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, options.dtype)).eval()
        model.save_pretrained(folder / name, max_shard_size="5GB" if options.scale == 1 else "50MB")
        models.append(model)
    return models[0], models[1]


def measure_loading(what: str, folder: Path) -> dict[str, float]:
    """Seconds, and KiB that the process grew by at its peak (Linux), to load one model and touch all its weights."""
    before = resident("VmRSS")
    begun = time.perf_counter()
    if what == "anchors":
        stitch = json.loads((folder / "stitch.json").read_text())
        model = StitchedModel.from_anchors(folder / "source", folder / "target", stitch)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "stitched")
    for parameter in model.parameters():
        parameter.sum()
    return {"seconds": time.perf_counter() - begun, "peak": resident("VmHWM") - before}


def resident(kind: str) -> int:
    """KiB resident now (VmRSS) or at most so far (VmHWM); getrusage would report the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind))


def loading(options: Options, folder: Path) -> None:
    found = {}
    for what in ("stitched", "anchors"):
        command = [sys.executable, __file__, "--load", what, "--folder", str(folder), "--threads", str(options.threads)]
        runs = []
        for _ in range(options.repeats + 1):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        found[what] = {key: min(run[key] for run in runs[1:]) for key in runs[0]}
    names = {"seconds": "s", "peak": "peak KiB"}
    for key, aim in (("seconds", "<= 1.1"), ("peak", "<= 1.05")):
        report(
            f"from_anchors against from_pretrained, {names[key]}", found["anchors"][key], found["stitched"][key], aim
        )


@torch.no_grad()
def running(options: Options, source, target, stitched, stitch: tuple[int, int]) -> None:
    """The stitched forward and decode against the time of its blocks inside the anchors."""
    i, j = stitch
    for what, tokens in (("forward of 256 tokens", 256), ("decode of one token after 256", 1)):
        ids = torch.randint(0, options.vocabulary, (1, tokens))
        past = torch.randint(0, options.vocabulary, (1, 256)) if tokens == 1 else None

        def run(model, ids=ids, past=past):
            cache = model(past, use_cache=True).past_key_values if past is not None else None

            def step():
                model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
                if cache is not None:
                    cache.crop(-1)

            return least(options, step)

        empty = {}
        for name, model in (("source", source), ("target", target)):
            kept, model.base_model.layers = model.base_model.layers, torch.nn.ModuleList()
            depth, model.config.num_hidden_layers = model.config.num_hidden_layers, 0
            ends = least(options, lambda model=model, ids=ids: model(ids, use_cache=False, logits_to_keep=1))
            model.base_model.layers, model.config.num_hidden_layers = kept, depth
            empty[name] = ends
        blocks = {
            name: (run(model) - empty[name]) / model.config.num_hidden_layers
            for name, model in (("source", source), ("target", target))
        }
        bound = i * blocks["source"] + (target.config.num_hidden_layers - j) * blocks["target"] + empty["target"]
        report(f"{what}, s", run(stitched), bound, "<= 1.03")


def importing(options: Options) -> None:
    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        runs = [
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
            for _ in range(options.repeats + 1)
        ]
        return min(runs[1:])

    ours = seconds("import klas_hf")
    classes = seconds("from transformers import AutoModel, GenerationMixin, PreTrainedModel")
    report("import klas_hf against the classes of transformers it registers with, s", ours, classes, "<= 1.15")
    report(
        "import klas_hf against import transformers (which is lazy), s", ours, seconds("import transformers"), "<= 1.15"
    )


def selecting(options: Options, costs) -> None:
    generator = np.random.default_rng(0)
    values = generator.random(1_000_000)
    macs = generator.integers(costs.source_total, costs.target_total, 1_000_000)

    def select():
        return near_bucket_minimum(values, bucket_of(macs, costs.source_total, costs.target_total, 20), 0.05)

    report("selecting among a million candidates, s", least(options, select), 1, "<= 1 s")


if __name__ == "__main__":
    main()
