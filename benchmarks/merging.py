"""What is made of anchors on the disk, against the plain way: blocks left out, a supernet, weights' identity."""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.measuring import Figure, growth_of, in_child, in_children, loading, seconds
from benchmarks.models import saved_llamas
from benchmarks.options import Options
from klas_hf import Stitch, StitchedModel, StitchedSupernet, StitchedSupernetConfig, StitchedSupernetForCausalLM
from klas_hf.anchors.weights import fingerprint

MEASURED = {"seconds": ("time", "s", 1.0), "peak": ("memory", "MiB", 1.05)}
MERGE = """
import json, sys, time
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate_json(sys.argv[1])
begun = time.perf_counter()
run_merge(config, sys.argv[2], options=MergeOptions(copy_tokenizer=False, write_model_card=False))
print(json.dumps({"seconds": time.perf_counter() - begun}))
"""


def figures(options: Options) -> Iterator[Figure]:
    with saved_llamas(options) as folder:
        yield from _pruned(options, folder)
        yield from _supernet(options, folder)
        yield _fingerprint(options, folder)


def _pruned(options: Options, folder: Path) -> Iterator[Figure]:
    ours, theirs = in_children(options, ["merging:pruned", "merging:pruned_plainly"], str(folder))
    for key, (what, unit, aim) in MEASURED.items():
        yield Figure(
            f"blocks left out, model written, {what}", ours[key], "from_pretrained, blocks deleted, save_pretrained",
            theirs[key], unit, aim,
        )  # fmt: skip
    if options.mergekit:
        theirs_seconds = min(_mergekit(options, folder) for _ in range(1 if options.quick else 2))
        yield Figure(
            "blocks left out, model written, time", ours["seconds"], "mergekit, passthrough", theirs_seconds, "s", 1.0
        )


def _kept(folder: str) -> tuple[int, int, int]:
    """Blocks of the larger Llama, and the first and the last that are left out of it (not included)."""
    blocks = json.loads(Path(folder, "target", "config.json").read_text())["num_hidden_layers"]
    return blocks, blocks // 2, blocks * 3 // 4


def pruned(options: Options, folder: str) -> Mapping[str, float]:
    _, start, stop = _kept(folder)
    return _written(lambda: StitchedModel.from_path([f"{folder}/target"], f"0[:{start}] 0[{stop}:]", joint="identity"))


def pruned_plainly(options: Options, folder: str) -> Mapping[str, float]:
    blocks, start, stop = _kept(folder)

    def make() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/target")
        layers = model.model.layers
        model.model.layers = nn.ModuleList([*layers[:start], *layers[stop:]])
        model.config.num_hidden_layers, model.config.layer_types = blocks - stop + start, None
        return model

    return _written(make)


def _written(make: Callable[[], PreTrainedModel]) -> Mapping[str, float]:
    with TemporaryDirectory() as output:
        return growth_of(lambda: make().save_pretrained(output))


def _mergekit(options: Options, folder: Path) -> float:
    """Seconds of mergekit's own merge, without the start of its process."""
    blocks, start, stop = _kept(str(folder))
    model = str(folder / "target")
    slices = [
        {"sources": [{"model": model, "layer_range": [0, start]}]},
        {"sources": [{"model": model, "layer_range": [stop, blocks]}]},
    ]
    config = json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": options.dtype})
    with TemporaryDirectory() as output:
        command = [str(options.mergekit), "-c", MERGE, config, output]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"mergekit ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))["seconds"]


# ---- a supernet


def _supernet(options: Options, folder: Path) -> Iterator[Figure]:
    ours, theirs = in_children(options, ["merging:supernet", "merging:supernet_plainly"], str(folder))
    plain = "allocated, then filled from loaded anchors"
    for key, (what, unit, aim) in MEASURED.items():
        yield Figure(f"supernet of two Llamas, {what}", ours[key], plain, theirs[key], unit, aim)


def supernet(options: Options, folder: str) -> Mapping[str, float]:
    stitch = json.loads(Path(folder, "stitch.json").read_text())
    return loading(lambda: StitchedSupernet.from_anchors([f"{folder}/source", f"{folder}/target"], [stitch]), [])


def supernet_plainly(options: Options, folder: str) -> Mapping[str, float]:
    """Its class made with random weights, which then get those of the anchors."""
    places = [f"{folder}/{name}" for name in ("source", "target")]
    stitch = json.loads(Path(folder, "stitch.json").read_text())
    config = StitchedSupernetConfig(
        anchor_configs=[AutoConfig.from_pretrained(place) for place in places], paths=[str(Stitch(*stitch).path)]
    )

    def make() -> nn.Module:
        net = StitchedSupernetForCausalLM(config)
        for own, place in zip(net.anchors, places, strict=True):
            own.load_state_dict(AutoModelForCausalLM.from_pretrained(place).state_dict())
        return net

    return loading(make, [])


# ---- identity


def _fingerprint(options: Options, folder: Path) -> Figure:
    found = in_child(options, "merging:identity", str(folder))
    return Figure("identity of a model's weights, again", found["again"], "the first time", found["first"], "s")


def identity(options: Options, folder: str) -> Mapping[str, float]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/target")
    model(torch.zeros(1, 1, dtype=torch.long))  # the first touch of the weights is nobody's
    return {"first": seconds(lambda: fingerprint(model)), "again": seconds(lambda: fingerprint(model))}
