"""Compression of trained KAN heads, without data and without retraining (SHARe-KAN, arXiv 2512.15742).

    coefficients ─► bias: their mean ─► gain: the norm of the rest ─► shape: the rest / gain ─► k-means over all shapes

Three departures from the paper's description, all towards a smaller error of the same bytes. k-means weighs each shape
by its gain squared, so that what it lessens is the error of the coefficients. Once a shape is replaced by one of the
codebook, the gain is fitted to that by least squares. And a gain may be negative, as int8 has the room: shapes are told
apart up to their sign.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from klas_hf.kan.compressed import CompressedKANHead, Compression, codebook_of
from klas_hf.kan.layers import KANHead, KANLayer
from klas_hf.kan.packing import Rows, pack_rows

_WHOLE = 2**27  # edges · shapes up to which k-means takes all edges in every iteration, rather than a part


@torch.no_grad()
def compress_heads(
    heads: Sequence[KANHead], compression: Compression, *, shapes: Tensor | None = None, seed: int = 0
) -> tuple[list[CompressedKANHead], Rows]:
    """Compress heads to one codebook that all their layers share.

    Args:
        heads: of one grid.
        shapes: a codebook `(shapes, coefficients)` to use as it is, as another head's; None: k-means over the heads'.
        seed: of k-means.

    Returns:
        The compressed heads, and the codebook.

    Raises:
        ValueError: heads of different grids or bases, coefficients that are not finite, or more shapes than edges.
        ImportError: scikit-learn is missing.
    """
    layers = [layer for head in heads for layer in head.layers]
    grid = layers[0].grid
    if any(layer.grid != grid for layer in layers):
        raise ValueError(
            f"got heads on {len({layer.grid for layer in layers})} grids; expected one, as shapes are shared"
        )
    parts = [_parts(layer) for layer in layers]
    gains = torch.cat([gain.flatten() for _, gain, _ in parts])
    if shapes is None:
        found = _k_means(torch.cat([shape.flatten(0, 1) for *_, shape in parts]), gains, compression.codebook, seed)
    else:
        found = shapes
    codebook = codebook_of(compression, grid)
    if found.shape != codebook.values.shape:
        raise ValueError(
            f"got a codebook of shape {tuple(found.shape)}; expected {tuple(codebook.values.shape)}: (shapes, "
            "coefficients)"
        )
    codebook.store(found.float())
    made = [_compressed(head, codebook, compression) for head in heads]
    return made, codebook


def explained_variance(head: KANHead, compressed: KANHead) -> float:
    """R² of the coefficients: the share of their variance around the mean of their edge that compression keeps."""
    pairs = [
        (one.coefficients.cpu(), other.coefficients.cpu())
        for one, other in zip(head.layers, compressed.layers, strict=True)
    ]
    with torch.no_grad():
        # Where biases are kept per output, those of the edges are spread anew, which changes no output.
        around = [(one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)) for one, other in pairs]
        lost = sum(float((one - other).square().sum()) for one, other in around)
        return 1 - lost / sum(float(one.square().sum()) for one, _ in around)


def _parts(layer: KANLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Bias and gain `(outputs, inputs)`, shape `(outputs, inputs, coefficients)` of norm 1; 0 where the gain is 0."""
    coefficients = layer.coefficients.float().cpu()
    if not coefficients.isfinite().all():
        raise ValueError("got coefficients that are not finite; expected a trained head")
    bias = coefficients.mean(-1)
    rest = coefficients - bias.unsqueeze(-1)
    gain = rest.norm(dim=-1)
    return bias, gain, rest / gain.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)


def _k_means(shapes: Tensor, gains: Tensor, entries: int, seed: int) -> Tensor:
    try:
        from sklearn.cluster import KMeans, MiniBatchKMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise ImportError('compression needs scikit-learn: pip install "klas_hf[vision]"') from error
    if entries > len(shapes):
        raise ValueError(
            f"got codebook={entries} for {len(shapes)} edges; expected at most as many shapes as edges, and far fewer "
            "to save anything"
        )
    settings: dict[str, Any] = {"n_clusters": entries, "n_init": 1, "random_state": seed}
    if len(shapes) * entries <= _WHOLE:
        clusters = KMeans(**settings)
    else:
        clusters = MiniBatchKMeans(**settings, init="random", batch_size=max(4096, 2 * entries))
    weights: NDArray = gains.square().numpy()
    weighted = shapes * gains.unsqueeze(-1)
    axis = torch.linalg.svd(weighted.T @ weighted)[0][:, 0]
    halved = torch.where((shapes @ axis).unsqueeze(-1) < 0, -shapes, shapes)  # those of the two signs that are alike
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different shapes than asked for: some are twice
        clusters.fit(halved.numpy(), sample_weight=weights if weights.any() else None)
    return torch.from_numpy(np.ascontiguousarray(clusters.cluster_centers_)).float()


def _compressed(head: KANHead, codebook: Rows, compression: Compression) -> CompressedKANHead:
    first = head.layers[0]
    widths = [first.coefficients.shape[1], *(layer.coefficients.shape[0] for layer in head.layers)]
    made = CompressedKANHead(widths, first.grid, "none" if first.base is None else "silu", compression)
    entries = codebook.read()
    directions = F.normalize(entries, dim=-1)
    for layer, whole in zip(made.layers, head.layers, strict=True):
        bias, gain, shape = _parts(whole)
        # A row of edges at a time. With fitted gains, what is nearest in direction, forth or back, has the least error.
        nearest = torch.stack([(edges @ directions.T).abs().argmax(-1) for edges in shape])
        chosen = entries[nearest]
        power = chosen.square().sum(-1)
        fitted = gain * (shape * chosen).sum(-1) / power.clamp_min(torch.finfo(torch.float32).tiny)
        layer.indices = pack_rows(nearest, compression.index_bits)
        layer.gains.store(fitted)
        bias = bias - fitted * chosen.mean(-1)  # of a shape in int8, it may not be quite 0
        layer.biases.store(bias if compression.bias == "edge" else bias.sum(1, keepdim=True))
        if whole.base is not None:
            layer.base.store(whole.base.detach().float().cpu())
    return made.eval()
