"""Making a supernet from anchors, and stitched models from a supernet.

One pass over the calibration images gives the normal equations of every stitch: each anchor runs once per batch. Where
stitches share a layer, their equations are added up, so the layer is the least-squares map of all of them together.
"""

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from klas_hf.anchors.images import image_batches
from klas_hf.anchors.vision import VisionAnchor, check_anchors, load_vision_anchor
from klas_hf.assembly.loading import RANDOM_STITCH, load_parts
from klas_hf.assembly.vision import (
    check_grids,
    check_pair,
    common_size,
    rows,
    set_vision_stitch,
    stitched_vision_config,
    usable_images,
)
from klas_hf.least_squares import LinearFit
from klas_hf.models import StitchedForImageClassification
from klas_hf.models.modeling_stitched_vision import dropped_prefix
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import trace
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.similarities import PairMoments
from klas_hf.stitches import Stitch
from klas_hf.supernet.configuration import StitchedSupernetConfig
from klas_hf.supernet.modeling import StitchedSupernet


def assemble_supernet(
    anchors: Sequence[Any],
    stitches: Iterable[Stitch | tuple[int, int] | tuple[int, int, int, int]],
    *,
    calibration: Iterable[Any] | None = None,
    shared: Sequence[int] | None = None,
    ridge: float | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> StitchedSupernet:
    """Join several image classifiers by many stitches.

    Args:
        anchors: Hub ids, local folders or models; they are read, never changed. Stitches name them by position.
        stitches: a selection, or any stitches; of two anchors `(i, j)`, of more `Stitch(i, j, source, target)`.
        calibration: batches of images (see `image_batches`) on which all stitching layers are fitted by least squares;
            None leaves them random, with a warning.
        shared: a number per stitch; stitches of one number share a stitching layer (see `snnet_groups`). None: none do.
        ridge: penalty of the fits; None chooses (see `LeastSquares.solve`).
        image_size: pixels of the images, where the anchors' configurations are for different ones.

    Returns:
        The supernet in eval mode.

    Raises:
        ValueError: fewer than two anchors, one listed twice, different classes, no stitches, one listed twice, out of
            range, between different grids or from a dearer anchor to a cheaper, or layers shared between widths.
    """
    loaded = [load_vision_anchor(anchor) for anchor in anchors]
    chosen = [Stitch.of(stitch) for stitch in stitches]
    size = _check(loaded, chosen, image_size)
    config = _config(loaded, chosen, shared, size)
    joined = {place for stitch in chosen for place in (stitch.source, stitch.target)}
    batches = None if calibration is None else usable_images(calibration, *(loaded[place].config for place in joined))
    supernet = StitchedSupernet(config).eval()
    supernet.to(device=loaded[-1].device, dtype=loaded[-1].model.dtype)  # before weights that float32 would round
    for place, anchor in enumerate(loaded):
        supernet.anchors[place].load_state_dict(anchor.model.state_dict())
    if batches is None:
        warnings.warn(RANDOM_STITCH, stacklevel=3)
        return supernet
    fits = fit_stitches(loaded, chosen, config.layer_of, batches, ridge)
    for layer, fit in zip(supernet.stitches, fits, strict=True):
        set_vision_stitch(layer, fit)
    config.layer_fits = [{"r2": fit.r2, "ridge": fit.ridge, "rows": fit.rows} for fit in fits]
    return supernet


@torch.no_grad()
def fit_stitches(
    anchors: Sequence[VisionAnchor],
    stitches: Sequence[Stitch],
    layer_of: Sequence[int],
    calibration: Iterable[Any],
    ridge: float | None = None,
) -> list[LinearFit]:
    """The least-squares map of every stitching layer, from one pass over the images.

    Args:
        layer_of: the layer of each stitch; several stitches of one layer are solved jointly.

    Raises:
        ValueError: no images, or activations that are not finite.
    """
    pairs = sorted({(stitch.source, stitch.target) for stitch in stitches})
    widths = [[shape.channels for shape in anchor.shapes()] for anchor in anchors]
    moments = {
        (source, target): PairMoments(
            sorted({(s.source_stop, s.target_start) for s in stitches if (s.source, s.target) == (source, target)}),
            widths[source],
            widths[target],
            anchors[source].device,
        )
        for source, target in pairs
    }
    needed = dict.fromkeys({place for pair in pairs for place in pair}, 0)
    for s in stitches:
        needed[s.source] = max(needed[s.source], s.source_stop)
        needed[s.target] = max(needed[s.target], s.target_start)
    for batch in progress(shared_out(image_batches(calibration)), "calibrating the stitching layers"):
        found = {place: anchors[place].features(batch.pixel_values, stop) for place, stop in needed.items()}
        for (source, target), sums in moments.items():
            dropped = dropped_prefix(anchors[source].kind, anchors[target].kind)
            sums.update(
                [rows(one, anchors[source].kind, dropped) for one in found[source]],
                [rows(one, anchors[target].kind).to(anchors[source].device) for one in found[target]],
            )
    for sums in moments.values():
        sums.combine(sum_over_processes)
    fits = []
    for layer in range(len(set(layer_of))):
        members = [stitch for stitch, number in zip(stitches, layer_of, strict=True) if number == layer]
        sums = moments[members[0].source, members[0].target]
        fits.append(sums.merged([(s.source_stop, s.target_start) for s in members], ridge))
    return fits


def extract_stitch(supernet: StitchedSupernet, stitch: Stitch) -> StitchedForImageClassification:
    """The stitched model of one of a supernet's stitches, with a copy of its weights."""
    layer = supernet.layer_of(stitch)
    source, target = supernet.anchors[stitch.source], supernet.anchors[stitch.target]
    given = supernet.config
    pair = (given.anchor_configs[stitch.source], given.anchor_configs[stitch.target])
    config = stitched_vision_config(*pair, stitch, (given.image_size[0], given.image_size[1]))
    config.drop_path_rate = given.drop_path_rate
    names, revisions = given.anchor_names or {}, given.anchor_revisions or {}
    if names:
        config.source_name, config.target_name = names[stitch.source], names[stitch.target]
        config.source_revision, config.target_revision = revisions[stitch.source], revisions[stitch.target]
    if given.layer_fits:
        config.stitch_fit = given.layer_fits[given.layer_of[given.stitches.index(_plain(stitch))]]
    parts = {"source": source, "target": target, "stitch": layer}
    state = {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    model = load_parts(StitchedForImageClassification, config, state, dtype=supernet.dtype)
    return model.to(supernet.device).eval()


def _config(
    anchors: Sequence[VisionAnchor], stitches: Sequence[Stitch], shared: Sequence[int] | None, size: tuple[int, int]
) -> StitchedSupernetConfig:
    if shared is not None and len(shared) != len(stitches):
        raise ValueError(f"got {len(shared)} numbers in shared for {len(stitches)} stitches; expected one per stitch")
    numbers = list(range(len(stitches)) if shared is None else shared)
    order = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
    _check_shared(anchors, stitches, [order[number] for number in numbers])
    sides = []
    for anchor in anchors:
        sides.append(copy.deepcopy(anchor.config))
        for name, value in vision_kind(anchor.config).training.items():
            setattr(sides[-1], name, value)
    return StitchedSupernetConfig(
        anchor_configs=sides,
        stitches=[_plain(stitch) for stitch in stitches],
        layer_of=[order[number] for number in numbers],
        image_size=list(size),
        id2label=dict(anchors[-1].config.id2label),
        label2id=dict(anchors[-1].config.label2id),
        anchor_names=[anchor.path for anchor in anchors],
        anchor_revisions=[anchor.revision for anchor in anchors],
        architectures=["StitchedSupernet"],
    )


def _plain(stitch: Stitch) -> list[int]:
    return [stitch.source_stop, stitch.target_start, stitch.source, stitch.target]


def _check(
    anchors: Sequence[VisionAnchor], stitches: Sequence[Stitch], size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """The common image size; raises what `assemble_supernet` says."""
    check_anchors(anchors)
    if not stitches:
        raise ValueError("got no stitches; expected at least one. Pass a selection, such as select_stitches gives")
    if repeated := [stitch for stitch in stitches if stitches.count(stitch) > 1]:
        raise ValueError(f"got stitch {repeated[0]} more than once; expected each one once")
    sizes = set()
    for pair in sorted({(stitch.source, stitch.target) for stitch in stitches}):
        if not all(0 <= place < len(anchors) for place in pair):
            raise ValueError(
                f"got a stitch between the anchors {pair[0]} and {pair[1]} of {len(anchors)}; expected positions from "
                f"0 to {len(anchors) - 1}"
            )
        first, last = (anchors[place].config for place in pair)
        sizes.add(common_size(first, last, size))
        check_pair(first, last, next(iter(sizes)))
    if len(sizes) > 1:
        raise ValueError(f"got anchors for images of {sorted(sizes)} pixels; expected one size. Pass image_size")
    (common,) = sizes
    for stitch in stitches:
        check_grids(anchors[stitch.source].config, anchors[stitch.target].config, stitch, common)
    return common


def _check_shared(anchors: Sequence[VisionAnchor], stitches: Sequence[Stitch], layer_of: Sequence[int]) -> None:
    ends: dict[int, tuple[Any, ...]] = {}
    for stitch, layer in zip(stitches, layer_of, strict=True):
        widths = (
            trace(anchors[stitch.source].config)[stitch.source_stop].channels,
            trace(anchors[stitch.target].config)[stitch.target_start].channels,
        )
        end = (stitch.source, stitch.target, *widths)
        if ends.setdefault(layer, end) != end:
            raise ValueError(
                f"got stitch {stitch} sharing a layer with stitches between other anchors or widths ({ends[layer]} and "
                f"{end}: source, target, widths); expected equal ones"
            )
