"""Making models from anchors on the disk: against loading as much, and against the plain way of doing it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from benchmarks.measuring import Figure, in_children, loading
from benchmarks.models import saved_llamas, saved_swins
from benchmarks.options import Options
from klas_hf import (
    StitchedModel,
)

AIMS = {"seconds": ("time", "s", 1.1), "peak": ("memory", "MiB", 1.05), "read": ("bytes read", "MiB", 1.05)}


def figures(options: Options) -> Iterator[Figure]:
    with saved_llamas(options) as folder:
        yield from _from_anchors(options, folder, "two Llamas", "text")
    with saved_swins(options) as folder:
        yield from _from_anchors(options, folder, "Swin-T and Swin-B", "image")


def _from_anchors(options: Options, folder: Path, anchors: str, kind: str) -> Iterator[Figure]:
    ours, theirs = in_children(options, ["assembly:stitched", "assembly:whole"], str(folder), kind)
    for key, (what, unit, aim) in AIMS.items():
        yield Figure(
            f"from_anchors of {anchors}, {what}", ours[key], "from_pretrained of that size", theirs[key], unit, aim
        )


def stitched(options: Options, folder: str, kind: str) -> Mapping[str, float]:
    both = [f"{folder}/source", f"{folder}/target"]
    stitch = json.loads(Path(folder, "stitch.json").read_text())
    return loading(lambda: StitchedModel.from_anchors(*both, stitch), both)


def whole(options: Options, folder: str, kind: str) -> Mapping[str, float]:
    auto: Any = AutoModelForCausalLM if kind == "text" else AutoModelForImageClassification
    return loading(lambda: auto.from_pretrained(f"{folder}/stitched"), [f"{folder}/stitched"])
