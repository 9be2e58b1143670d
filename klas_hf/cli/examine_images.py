"""Two image classifiers before they are stitched: labels, image sizes, processing, and which blocks share a grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from klas_hf.anchors.vision import check_labels
from klas_hf.cli.findings import Finding, attempted, ok, problem, warning
from klas_hf.cli.headers import StoredTensor
from klas_hf.data.images import common_processing
from klas_hf.models import StitchedForImageClassification
from klas_hf.models.vision_shapes import trace
from klas_hf.paths import Stitch
from klas_hf.stitch_costs import StitchCosts
from klas_hf.stitching.images import common_size, stitched_vision_config
from klas_hf.stitching.loading import load_parts

Configs = tuple[PreTrainedConfig, PreTrainedConfig]
Tensors = dict[str, StoredTensor]


def examine_classifiers(names: tuple[str, str], configs: Configs) -> list[Finding]:
    """All findings that need neither costs nor weights."""
    return [
        attempted("labels", lambda: _labels(configs)),
        attempted("image size", lambda: "{} × {} pixels".format(*common_size(configs))),
        _processing(names),
    ]


def grids_finding(configs: Configs, costs: StitchCosts) -> Finding:
    """Blocks by grid, and which of them can be joined."""
    size = costs.image_height, costs.image_width
    sides = [_grids(config, size) for config in configs]
    shown = f"source blocks {sides[0]}; target blocks {sides[1]}"
    possible = costs.possible[:, 1:]
    if not possible.any():
        remedy = "choose anchors whose stages have equal grids at this image size"
        return problem("blocks", f"{shown}: no two lie on one grid", remedy)
    rows, columns = (sorted({int(place) + 1 for place in places}) for places in np.nonzero(possible))
    return ok(
        "blocks", f"{shown}; {int(possible.sum())} stitches have a score, i in {_ranges(rows)}, j in {_ranges(columns)}"
    )


def kept_classifier_keys(
    tensors: tuple[Tensors, Tensors], configs: Configs, stitch: Stitch, size: tuple[int, int]
) -> tuple[set[str], set[str]]:
    """Which tensors of source and target a stitched model reads: those that transformers asks for on the meta device.

    It is transformers that renames the tensors of some families, so it is left to say.
    """
    config = stitched_vision_config(configs, stitch.path, size)
    taken: tuple[set[str], set[str]] = (set(), set())
    state = {
        f"slices.{number}.{key}": _Asked(key, stored, kept)
        for number, (of_side, kept) in enumerate(zip(tensors, taken, strict=True))
        for key, stored in of_side.items()
    }
    with torch.device("meta"):
        empty = StitchedForImageClassification(config)
    layer = {name: tensor for name, tensor in empty.state_dict().items() if name.startswith("joints.")}
    with _without_progress():
        load_parts(StitchedForImageClassification, config, state | layer, dtype=torch.float32, device_map={"": "meta"})
    return taken


@contextmanager
def _without_progress() -> Iterator[None]:
    """No bar that says that weights are loaded where none are."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Asked:
    """Stands for a tensor of a checkpoint; notes that it was asked for, and gives one of its shape without values."""

    def __init__(self, key: str, stored: StoredTensor, taken: set[str]):
        self.key, self.stored, self.taken = key, stored, taken

    def __getitem__(self, index: object) -> Tensor:
        self.taken.add(self.key)
        return torch.empty(self.stored.shape, device="meta")


def _labels(configs: Configs) -> str:
    check_labels(*configs)
    unnamed = all(name == f"LABEL_{number}" for number, name in configs[1].id2label.items())
    return f"{configs[1].num_labels} classes in both" + ("; they have no names to compare" if unnamed else "")


def _processing(names: tuple[str, str]) -> Finding:
    """Resizing and normalisation; a missing image processor hinders only those who read image files."""
    try:
        processing = common_processing(names)
    except OSError as error:
        first = str(error).splitlines()[0]
        return warning("processing", f"no image processor: {first}", "save one into the anchor's folder")
    except ValueError as error:
        return problem("processing", str(error))
    return ok("processing", f"resize {dict(processing.resize)}, mean {processing.mean}, deviation {processing.std}")


def _grids(config: PreTrainedConfig, size: tuple[int, int]) -> str:
    """1–2: 56×56, 3–4: 28×28, …"""
    numbered = [(number, f"{shape.height}×{shape.width}") for number, shape in enumerate(trace(config, size)) if number]
    groups = ((grid, [number for number, _ in group]) for grid, group in groupby(numbered, lambda one: one[1]))
    return ", ".join(f"{_ranges(numbers)}: {grid}" for grid, numbers in groups)


def _ranges(numbers: list[int]) -> str:
    """1–3, 5."""
    runs = [[value for _, value in run] for _, run in groupby(enumerate(numbers), lambda one: one[1] - one[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
