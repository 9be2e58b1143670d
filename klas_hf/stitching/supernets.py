"""Making a supernet from anchors.

One pass over the calibration data gives the normal equations of every stitch: each anchor runs once per batch. Where
stitches share a layer, their equations are added up, so the layer is the least-squares map of all of them together.
"""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from klas_hf.anchors.vision import is_vision
from klas_hf.maths.least_squares import LinearFit
from klas_hf.maths.similarities import PairMoments
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.paths import Stitch
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.stitching.loading import RANDOM_STITCH
from klas_hf.stitching.supernet import StitchedSupernet


def assemble_supernet(
    anchors: Sequence[Any],
    stitches: Iterable[Stitch | tuple[int, int] | tuple[int, int, int, int]],
    *,
    calibration: Iterable[Any] | None = None,
    shared: Sequence[int] | None = None,
    ridge: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    tokens: int = 128,
) -> StitchedSupernet:
    """Join several anchors by many stitches.

    Args:
        anchors: Hub ids, local folders or models, all image classifiers or all causal language models; they are read,
            never changed. Stitches name them by position.
        stitches: a selection, or any stitches; of two anchors `(i, j)`, of more `Stitch(i, j, source, target)`.
        calibration: batches of images (see `image_batches`) or token ids (`token_batches`) on which all stitching
            layers are fitted by least squares; None leaves them random, with a warning.
        shared: a number per stitch; stitches of one number share a stitching layer (see `snnet_groups`). None: none do.
        ridge: penalty of the fits; None chooses (see `LeastSquares.solve`).
        image_size: pixels of the images, where the anchors' configurations are for different ones.
        tokens: length of the sequences that the costs of language models are counted for.

    Returns:
        The supernet in eval mode.

    Raises:
        ValueError: fewer than two anchors, one listed twice, different classes or vocabularies, anchors for text and
            for images, no stitches, one listed twice, out of range, between different grids or from a dearer anchor to
            a cheaper, or layers shared between widths.
    """
    chosen = [Stitch.of(stitch) for stitch in stitches]
    parts = _parts_of(anchors, image_size, tokens)
    _check_stitches(parts, chosen)
    parts.check(chosen)
    config = _config(parts, chosen, shared)
    batches = None if calibration is None else parts.usable(calibration, chosen)
    supernet = parts.empty(config).eval()
    last = parts.models[-1]
    supernet.to(device=last.device, dtype=last.dtype)  # before weights that float32 would round
    for place, model in enumerate(parts.models):
        supernet.anchors[place].load_state_dict(model.state_dict())
    if batches is None:
        warnings.warn(RANDOM_STITCH, stacklevel=3)
        return supernet
    fits = fit_stitches(parts, chosen, config.layer_of, batches, ridge)
    for layer, fit in zip(supernet.stitches, fits, strict=True):
        parts.set_layer(layer, fit)
    config.layer_fits = [{"r2": fit.r2, "ridge": fit.ridge, "rows": fit.rows} for fit in fits]
    return supernet


class SupernetParts(ABC):
    """The anchors of a supernet, of one kind of data.

    Attributes:
        models: the anchors.
        names, revisions: of the anchors, where known.
    """

    models: list[Any]
    names: list[str | None]
    revisions: list[str | None]

    @abstractmethod
    def check(self, stitches: Sequence[Stitch]) -> None:
        """Raise ValueError where the anchors cannot be joined so."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Fields of the configuration that only this kind of data has."""

    @abstractmethod
    def empty(self, config: StitchedSupernetConfig) -> StitchedSupernet:
        """The supernet of a configuration."""

    @abstractmethod
    def widths(self, place: int) -> list[int]:
        """Widths of what an anchor's embedding and each of its blocks give."""

    @abstractmethod
    def usable(self, calibration: Iterable[Any], stitches: Sequence[Stitch]) -> Iterable[Any]:
        """The batches, checked before long work."""

    @abstractmethod
    def batches(self, calibration: Iterable[Any]) -> Iterable[Any]:
        """The batches, read."""

    @abstractmethod
    def states(self, place: int, batch: Any, stop: int) -> list[Any]:
        """What an anchor's embedding and its first `stop` blocks give."""

    @abstractmethod
    def rows(
        self, pair: tuple[int, int], states: tuple[list[Any], list[Any]], batch: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`(rows, width)` of the states of two anchors, for least squares, on one device."""

    @abstractmethod
    def set_layer(self, layer: Any, fit: LinearFit) -> None:
        """Put a fit into a stitching layer."""


@torch.no_grad()
def fit_stitches(
    parts: SupernetParts,
    stitches: Sequence[Stitch],
    layer_of: Sequence[int],
    calibration: Iterable[Any],
    ridge: float | None = None,
) -> list[LinearFit]:
    """The least-squares map of every stitching layer, from one pass over the data.

    Args:
        layer_of: the layer of each stitch; several stitches of one layer are solved jointly.

    Raises:
        ValueError: no data, or activations that are not finite.
    """
    moments = {
        pair: PairMoments(
            sorted({(s.source_stop, s.target_start) for s in stitches if (s.source, s.target) == pair}),
            parts.widths(pair[0]),
            parts.widths(pair[1]),
            parts.models[pair[0]].device,
        )
        for pair in sorted({(stitch.source, stitch.target) for stitch in stitches})
    }
    needed = dict.fromkeys({place for pair in moments for place in pair}, 0)
    for s in stitches:
        needed[s.source] = max(needed[s.source], s.source_stop)
        needed[s.target] = max(needed[s.target], s.target_start)
    for batch in progress(shared_out(parts.batches(calibration)), "calibrating the stitching layers"):
        found = {place: parts.states(place, batch, stop) for place, stop in needed.items()}
        for pair, sums in moments.items():
            sums.update(*parts.rows(pair, (found[pair[0]], found[pair[1]]), batch))
    for sums in moments.values():
        sums.combine(sum_over_processes)
    fits = []
    for layer in range(len(set(layer_of))):
        members = [stitch for stitch, number in zip(stitches, layer_of, strict=True) if number == layer]
        sums = moments[members[0].source, members[0].target]
        fits.append(sums.merged([(s.source_stop, s.target_start) for s in members], ridge))
    return fits


def _parts_of(anchors: Sequence[Any], image_size: int | tuple[int, int] | None, tokens: int) -> SupernetParts:
    from klas_hf.stitching.supernet_image_parts import ImageParts
    from klas_hf.stitching.supernet_language_parts import LanguageParts

    images = [is_vision(anchor) for anchor in anchors]
    if len(set(images)) > 1:
        raise ValueError("got anchors for images and for text; expected all of one kind")
    return ImageParts(anchors, image_size) if any(images) else LanguageParts(anchors, tokens)


def _config(parts: SupernetParts, stitches: Sequence[Stitch], shared: Sequence[int] | None) -> StitchedSupernetConfig:
    if shared is not None and len(shared) != len(stitches):
        raise ValueError(f"got {len(shared)} numbers in shared for {len(stitches)} stitches; expected one per stitch")
    numbers = list(range(len(stitches)) if shared is None else shared)
    order = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
    _check_shared(parts, stitches, [order[number] for number in numbers])
    given: dict[str, Any] = {"anchor_configs": [copy.deepcopy(model.config) for model in parts.models]}
    return StitchedSupernetConfig(
        **given | parts.settings(),
        stitches=[[s.source_stop, s.target_start, s.source, s.target] for s in stitches],
        layer_of=[order[number] for number in numbers],
        anchor_names=parts.names,
        anchor_revisions=parts.revisions,
    )


def _check_stitches(parts: SupernetParts, stitches: Sequence[Stitch]) -> None:
    """Raise ValueError unless there are two anchors or more and stitches between some of them, each once."""
    count = len(parts.models)
    if count < 2:
        raise ValueError(f"got {count} anchor; expected at least two")
    if not stitches:
        raise ValueError("got no stitches; expected at least one. Pass a selection, such as select_stitches gives")
    if repeated := [stitch for stitch in stitches if stitches.count(stitch) > 1]:
        raise ValueError(f"got stitch {repeated[0]} more than once; expected each one once")
    for pair in sorted({(stitch.source, stitch.target) for stitch in stitches}):
        if not all(0 <= place < count for place in pair):
            raise ValueError(
                f"got a stitch between the anchors {pair[0]} and {pair[1]} of {count}; expected positions from 0 to "
                f"{count - 1}"
            )


def _check_shared(parts: SupernetParts, stitches: Sequence[Stitch], layer_of: Sequence[int]) -> None:
    ends: dict[int, tuple[Any, ...]] = {}
    for stitch, layer in zip(stitches, layer_of, strict=True):
        widths = parts.widths(stitch.source)[stitch.source_stop], parts.widths(stitch.target)[stitch.target_start]
        end = (stitch.source, stitch.target, *widths)
        if ends.setdefault(layer, end) != end:
            raise ValueError(
                f"got stitch {stitch} sharing a layer with stitches between other anchors or widths ({ends[layer]} and "
                f"{end}: source, target, widths); expected equal ones"
            )
