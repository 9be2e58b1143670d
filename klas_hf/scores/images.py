"""Scores of all stitches between two image classifiers in one streaming pass (KLAS Alg. 2, Eq. 1 and 2).

Both anchors run once over each batch. From the same pass come KLAS's Θ, capacity and Γ and everything it is compared
with: Θ reversed, MSE and CE of the probes' distributions, CKA and the least-squares residual (DM) of the features
themselves. An image is the unit of all means and standard errors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from klas_hf.anchors.images import ImageBatch, image_batches
from klas_hf.anchors.vision import VisionAnchor, check_labels, load_vision_anchor
from klas_hf.anchors.vision_stitches import rows
from klas_hf.costs import measure_stitch_costs
from klas_hf.maths.divergences import consecutive_kl, pairwise_kl
from klas_hf.maths.estimates import RatioSums
from klas_hf.maths.least_squares import RIDGE
from klas_hf.maths.similarities import ClassConditionalCka, PairMoments, pairwise_ce, pairwise_mse
from klas_hf.models.modeling_stitched_vision import dropped_prefix
from klas_hf.paths import StitchCosts
from klas_hf.probes import ImageProbeNet
from klas_hf.processes import process_state, progress, shared_out, sum_array_over_processes, sum_over_processes
from klas_hf.rows import library_versions
from klas_hf.scores.values import PROBED, StitchScores, check_score

MOMENT_BYTES = 4 << 30
MOMENT_IMAGES = 256
Probes = tuple[ImageProbeNet, ImageProbeNet]


@dataclass(frozen=True)
class ImageScoring:
    """What is scored beside KL divergences: what KLAS is compared with (App. D, Tab. 9 and 10).

    Attributes:
        shuffled: probes of both anchors that were trained on shuffled labels, for "klas_shuffled"; None leaves it out.
        moment_images: how many images CKA and DM are measured on (every position of an image is a row; SN-Net fits its
            stitching layers on 100); 0 leaves out both, and class-conditional CKA, which takes all labelled images.
        moment_bytes: memory that their sums may take.

    Example:
        >>> probes = [train_probes(anchor, images, ImageProbeConfig(epochs=1)) for anchor in (small, large)]
        >>> lean = ImageScoring(moment_images=0)  # without CKA and DM
        >>> score_stitches(small, large, images, probes=probes, score="klas", images=lean).available
        ('klas', 'klas_staged', 'theta', 'theta_reversed', 'mse', 'ce')
    """

    shuffled: Probes | None = None
    moment_images: int = MOMENT_IMAGES
    moment_bytes: int = MOMENT_BYTES


def score_classifiers(
    source: Any,
    target: Any,
    data: Iterable[Any],
    *,
    probes: Probes,
    score: str = "klas",
    settings: ImageScoring | None = None,
    positions: tuple[int, int] = (0, 1),
) -> StitchScores:
    """Score every stitch between two image classifiers; see `score_stitches`."""
    settings = settings or ImageScoring()
    first, last = load_vision_anchor(source), load_vision_anchor(target)
    check_labels(first, last)
    every = image_batches(data)
    batch = next(every, None)
    if batch is None:
        raise ValueError("got no images to score on; expected batches. Check that an iterator was not used up before")
    size = (batch.pixel_values.shape[-2], batch.pixel_values.shape[-1])
    costs = measure_stitch_costs(first.config, last.config, image_size=size, positions=positions)
    costs.check_direction()
    for pair in (probes, settings.shuffled or probes):
        for probe, anchor in zip(pair, (first, last), strict=True):
            probe.check(anchor)
    sums = _ImageSums(first, last, probes, settings, costs, batch)
    check_score(score, sums.will_have)
    for one in progress(shared_out(_chain(batch, every)), "scoring stitches"):
        sums.update(one)
    sums.combine()
    return StitchScores(
        score=score,
        cross=sums.cross.value,
        capacity=sums.capacity.value,
        cross_error=sums.cross.standard_error,
        capacity_error=sums.capacity.standard_error,
        gamma_error=sums.gamma.standard_error,
        sequences=sums.cross.sequences,
        tokens=sums.cross.sequences,
        costs=costs,
        provenance=_provenance(first, last, probes),
        statistics=sums.statistics(),
    )


def _chain(first: ImageBatch, others: Iterable[ImageBatch]) -> Iterable[ImageBatch]:
    yield first
    yield from others


class _ImageSums:
    """Sums over images of everything that a score needs, for all pairs of blocks of two anchors."""

    def __init__(
        self,
        first: VisionAnchor,
        last: VisionAnchor,
        probes: Probes,
        settings: ImageScoring,
        costs: StitchCosts,
        batch: ImageBatch,
    ):
        self.first, self.last, self.probes, self.settings = first, last, probes, settings
        m, n = first.num_blocks, last.num_blocks
        self.cross, self.capacity, self.gamma = RatioSums((m, n)), RatioSums((n - 1,)), RatioSums((m, n - 1))
        self.plain: dict[str, np.ndarray] = {name: np.zeros((m, n)) for name in ("theta_reversed", "mse", "ce")}
        if settings.shuffled:
            self.plain |= {"cross_shuffled": np.zeros((m, n)), "capacity_shuffled": np.zeros(n - 1)}
        self.dropped = dropped_prefix(first.kind, last.kind)
        pairs = _equal_grids(first, last, (costs.image_height, costs.image_width))
        widths, widths_last = ([shape.channels for shape in anchor.shapes()[1:]] for anchor in (first, last))
        self.moments: PairMoments | None = None
        if settings.moment_images:
            needed = PairMoments.bytes_needed(pairs, widths, widths_last)
            if needed > settings.moment_bytes:
                raise ValueError(
                    f"got {len(pairs)} pairs of blocks whose second moments take {needed / 2**30:.1f} GiB; expected at "
                    f"most {settings.moment_bytes / 2**30:.1f} GiB. Raise moment_bytes, or leave CKA and DM out with "
                    "moment_images=0"
                )
            self.moments = PairMoments(pairs, widths, widths_last, first.device)
        self.by_class: ClassConditionalCka | None = None
        if settings.moment_images and batch.labels is not None:
            self.by_class = ClassConditionalCka(pairs, (m, n), first.config.num_labels)
        self.seen = 0

    @property
    def will_have(self) -> set[str]:
        """Names of the statistics that the pass gathers."""
        names = {*PROBED, *self.plain}
        return names | ({"cka", "dm"} if self.moments else set()) | ({"class_cka"} if self.by_class else set())

    @torch.no_grad()
    def update(self, batch: ImageBatch) -> None:
        """Add a batch of images."""
        features = [anchor.features(batch.pixel_values)[1:] for anchor in (self.first, self.last)]
        pooled = [
            [anchor.kind.pooled(one).float().to(self.first.device) for one in found]
            for anchor, found in zip((self.first, self.last), features, strict=True)
        ]
        log_p, log_q = (probe.log_probs(x) for probe, x in zip(self.probes, pooled, strict=True))
        self._add_divergences(log_p, log_q)
        if self.settings.shuffled:
            shuffled_p, shuffled_q = (
                probe.log_probs(x) for probe, x in zip(self.settings.shuffled, pooled, strict=True)
            )
            self.plain["cross_shuffled"] += _sum(pairwise_kl(shuffled_p, shuffled_q))
            self.plain["capacity_shuffled"] += _sum(consecutive_kl(shuffled_q))
        if self.by_class:
            self.by_class.update(pooled[0], pooled[1], batch.labelled()[1])
        self._add_moments(features)

    def combine(self) -> None:
        """Make these the sums over all processes."""
        for sums in (self.cross, self.capacity, self.gamma):
            sums.set_moments(sum_array_over_processes(sums.moments()))
        for name, value in self.plain.items():
            self.plain[name] = sum_array_over_processes(value)
        if self.moments:
            self.moments.combine(sum_over_processes)
        if self.by_class and process_state().num_processes > 1:
            self.by_class.combine(lambda tensor: torch.cat(gather_object([tensor])))

    def statistics(self) -> dict[str, np.ndarray]:
        """Mean of every statistic beside Θ and Γ."""
        found = {name: value / self.cross.sequences for name, value in self.plain.items()}
        if self.moments:
            found |= {"cka": self.moments.cka(), "dm": self.moments.unexplained(RIDGE)}
        if self.by_class and self.by_class.left_out < self.by_class.num_classes:
            found["class_cka"] = self.by_class.cka()
        return found

    def _add_divergences(self, log_p: Tensor, log_q: Tensor) -> None:
        cross, capacity = pairwise_kl(log_p, log_q), consecutive_kl(log_q)
        if not (cross.isfinite().all() and capacity.isfinite().all()):
            raise ValueError(
                "got probe distributions with NaN or infinite divergences; expected finite activations. Check the "
                "anchors' weights and probes"
            )
        one = np.ones(len(cross))
        numerator, denominator = cross.cpu().numpy(), capacity.cpu().numpy()
        self.cross.update(numerator, one[:, None, None])
        self.capacity.update(denominator, one[:, None])
        self.gamma.update(numerator[:, :, :-1], denominator[:, None, :])
        self.plain["theta_reversed"] += _sum(pairwise_kl(log_q, log_p)).T
        self.plain["mse"] += _sum(pairwise_mse(log_p, log_q))
        self.plain["ce"] += _sum(pairwise_ce(log_p, log_q))

    def _add_moments(self, features: list[list[Any]]) -> None:
        # Each process takes its share of the images that moments are measured on.
        share = -(-self.settings.moment_images // process_state().num_processes) - self.seen
        if self.moments is None or share <= 0:
            return
        taken = [[one._replace(hidden=one.hidden[:share]) for one in found] for found in features]
        self.seen += len(taken[0][0].hidden)
        self.moments.update(
            [rows(one, self.first.kind, self.dropped) for one in taken[0]],
            [rows(one, self.last.kind).to(self.first.device) for one in taken[1]],
        )


def _sum(terms: Tensor) -> np.ndarray:
    return terms.sum(0).cpu().numpy()


def _equal_grids(first: VisionAnchor, last: VisionAnchor, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Positions, from 0, of the pairs of blocks (i, j) that a stitch can lead from and to."""
    shapes = first.shapes(size)[1:], last.shapes(size)[1:]
    return [(i, j) for i, one in enumerate(shapes[0]) for j, other in enumerate(shapes[1]) if one.grid == other.grid]


def _provenance(first: VisionAnchor, last: VisionAnchor, probes: Probes) -> dict[str, Any]:
    def one(anchor: VisionAnchor, probe: ImageProbeNet) -> dict[str, Any]:
        return {
            "name": anchor.name,
            "revision": anchor.revision,
            "fingerprint": anchor.fingerprint,
            "probes": {"accuracy": probe.config.accuracy, "epochs": probe.config.best_epoch},
        }

    return {"source": one(first, probes[0]), "target": one(last, probes[1]), "versions": library_versions()}
