"""What KLAS is compared with on images (App. D, Tab. 9 and 10), beside its own statistics in one pass.

Θ reversed, MSE and CE of the probes' distributions, CKA and the least-squares residual (DM) of the features
themselves. An image is the unit of all means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from klas_hf.anchors.images import ImageBatch
from klas_hf.anchors.streaming import Gathered
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.maths.class_cka import ClassConditionalCka
from klas_hf.maths.divergences import consecutive_kl, pairwise_ce, pairwise_kl, pairwise_mse
from klas_hf.maths.least_squares import RIDGE
from klas_hf.maths.similarities import PairMoments
from klas_hf.models.vision_features import Features
from klas_hf.probes import ImageProbeNet
from klas_hf.processes import process_state, sum_array_over_processes, sum_over_processes
from klas_hf.scores.probed import Distributions
from klas_hf.stitch_costs import StitchCosts

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


class ComparedSums(Gathered):
    """Sums over images of all that KLAS is compared with, for all pairs of blocks.

    Args:
        distributions: of two anchors of m and n blocks.
        probes: of both.
        settings: what is measured.
        costs: of all stitches, for images of the size that is scored.
        labelled: whether the images have labels.

    Raises:
        ValueError: sums that take more memory than allowed, or shuffled probes of other weights.
    """

    def __init__(
        self, distributions: Distributions, probes: Probes, settings: ImageScoring, costs: StitchCosts, labelled: bool
    ):
        self.distributions, self.probes, self.settings = distributions, probes, settings
        first, last = self.anchors = distributions.anchors
        assert isinstance(first, VisionAnchor) and isinstance(last, VisionAnchor)
        m, n = first.num_blocks, last.num_blocks
        self.images = 0
        self.plain: dict[str, np.ndarray] = {name: np.zeros((m, n)) for name in ("theta_reversed", "mse", "ce")}
        if settings.shuffled:
            self.plain |= {"cross_shuffled": np.zeros((m, n)), "capacity_shuffled": np.zeros(n - 1)}
            for probe, anchor in zip(settings.shuffled, (first, last), strict=True):
                probe.check(anchor)
        self.moments: PairMoments | None = None
        self.by_class: ClassConditionalCka | None = None
        self.measured = 0  # images of this process that moments were measured on
        if not settings.moment_images:
            return
        pairs = _equal_grids(first, last, (costs.image_height, costs.image_width))
        widths, widths_last = (anchor.widths[1:] for anchor in self.anchors)
        needed = PairMoments.bytes_needed(pairs, widths, widths_last)
        if needed > settings.moment_bytes:
            raise ValueError(
                f"got {len(pairs)} pairs of blocks whose second moments take {needed / 2**30:.1f} GiB; expected at "
                f"most {settings.moment_bytes / 2**30:.1f} GiB. Raise moment_bytes, or leave CKA and DM out with "
                "moment_images=0"
            )
        self.moments = PairMoments(pairs, widths, widths_last, first.device)
        if labelled:
            self.by_class = ClassConditionalCka(pairs, (m, n), first.classes)

    @property
    def will_have(self) -> set[str]:
        """Names of the statistics that the pass gathers."""
        return {*self.plain} | ({"cka", "dm"} if self.moments else set()) | ({"class_cka"} if self.by_class else set())

    def update(self, states: Sequence[list[Features]], batch: ImageBatch) -> None:
        for log_p, log_q, _ in self.distributions.of(states, batch, self.probes):
            self.plain["theta_reversed"] += _sum(pairwise_kl(log_q, log_p)).T
            self.plain["mse"] += _sum(pairwise_mse(log_p, log_q))
            self.plain["ce"] += _sum(pairwise_ce(log_p, log_q))
        if self.settings.shuffled:
            for log_p, log_q, _ in self.distributions.of(states, batch, self.settings.shuffled):
                self.plain["cross_shuffled"] += _sum(pairwise_kl(log_p, log_q))
                self.plain["capacity_shuffled"] += _sum(consecutive_kl(log_q))
        if self.by_class:
            read = [
                [anchor.probed(state, batch).float() for state in of_one[1:]]
                for anchor, of_one in zip(self.anchors, states, strict=True)
            ]
            self.by_class.update(read[0], read[1], batch.labelled()[1])
        self._add_moments(states, batch)
        self.images += len(batch)

    def combine(self) -> None:
        self.images = int(sum_array_over_processes(np.array([float(self.images)]))[0])
        for name, value in self.plain.items():
            self.plain[name] = sum_array_over_processes(value)
        if self.moments:
            self.moments.combine(sum_over_processes)
        if self.by_class and process_state().num_processes > 1:
            self.by_class.combine(lambda tensor: torch.cat(gather_object([tensor])))

    def statistics(self) -> dict[str, np.ndarray]:
        """Mean of every statistic."""
        found = {name: value / self.images for name, value in self.plain.items()}
        if self.moments:
            found |= {"cka": self.moments.cka(), "dm": self.moments.unexplained(RIDGE)}
        if self.by_class and self.by_class.left_out < self.by_class.num_classes:
            found["class_cka"] = self.by_class.cka()
        return found

    def _add_moments(self, states: Sequence[list[Features]], batch: ImageBatch) -> None:
        # Each process takes its share of the images that moments are measured on.
        share = -(-self.settings.moment_images // process_state().num_processes) - self.measured
        if self.moments is None or share <= 0:
            return
        first, last = self.anchors
        taken = [[one._replace(hidden=one.hidden[:share]) for one in of_one[1:]] for of_one in states]
        self.measured += len(taken[0][0].hidden)
        source = [first.rows(one, batch, last) for one in taken[0]]
        self.moments.update(source, [last.rows(one, batch).to(first.device) for one in taken[1]])


def _sum(terms: Tensor) -> np.ndarray:
    return terms.sum(0).cpu().numpy()


def _equal_grids(first: VisionAnchor, last: VisionAnchor, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Positions, from 0, of the pairs of blocks (i, j) that a stitch can lead from and to."""
    shapes = first.shapes(size)[1:], last.shapes(size)[1:]
    return [(i, j) for i, one in enumerate(shapes[0]) for j, other in enumerate(shapes[1]) if one.grid == other.grid]
