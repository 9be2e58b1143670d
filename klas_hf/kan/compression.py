"""Compression of trained KAN heads, without data and without retraining (SHARe-KAN, arXiv 2512.15742).

    coefficients ─► bias: their mean ─► gain: the norm of the rest ─► shape: the rest / gain ─► k-means over all shapes

Three departures from the paper's description, all towards a smaller error of the same bytes. k-means weighs each shape
by its gain squared, so that what it lessens is the error of the coefficients. Once a shape is replaced by one of the
codebook, the gain is fitted to that by least squares. And a gain may be negative, as int8 has the room: shapes are told
apart up to their sign.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from klas_hf.models.configuration_kan import KANConfig
from klas_hf.models.kan_compressed import CompressedKANHead, Compression, codebook_of
from klas_hf.models.kan_layers import KANHead, KANLayer
from klas_hf.models.kan_packing import Rows, pack_rows
from klas_hf.models.modeling_kan import KANForImageClassification, KANForManyTasks, KANPreTrainedModel

_WHOLE = 2**27  # edges · shapes up to which k-means takes all edges in every iteration, rather than a part


def compress_kan(
    model: KANForImageClassification,
    codebook: int | Tensor = 256,
    *,
    bits: int = 8,
    bias: str = "output",
    seed: int = 0,
) -> KANForImageClassification:
    """Compress the head of a trained model, without data and without retraining (SHARe-KAN).

    Each spline's coefficients become a bias, a gain and the nearest of a few shapes, which all layers share.

    Args:
        model: with a dense head; it stays as it is.
        codebook: number of shapes; or the shapes `(shapes, coefficients)` themselves, as another model's
            `codebook.read()`.
        bits: of gains, shapes and what else is stored per edge: 8, or 32 (float32).
        bias: "output": the biases of an output's edges as their sum, which is exact; "edge": one by one, as the paper
            has them, a byte per edge more.
        seed: of k-means.

    Returns:
        A model with a copy of the backbone; `config.compression["r2"]` is the share of the coefficients' variance kept.

    Raises:
        ValueError: a head that is compressed already, more shapes than edges, or a setting that there is not.
        ImportError: scikit-learn is missing.

    Example:
        >>> backbone = StitchedModel.from_anchors(small, large, stitch=(2, 1), calibration=images)
        >>> model = KANForImageClassification.from_backbone(backbone, num_labels=3)
        >>> head_bytes(model), head_bytes(compress_kan(model, codebook=16))
        (2304, 264)
    """
    _check_dense(model)
    shapes = None if isinstance(codebook, int) else codebook
    how = Compression(codebook if isinstance(codebook, int) else len(codebook), bits, bias)
    (head,), found = compress_heads([model.head], how, shapes=shapes, seed=seed)
    config = copy.deepcopy(model.config)
    r2 = explained_variance(model.head, head.dense(found))
    config.compression = {"codebook": how.codebook, "bits": bits, "bias": bias, "r2": r2}
    return _assembled(KANForImageClassification, config, model, found, head=head)


def compress_tasks(
    models: Mapping[str, KANForImageClassification], codebook: int, *, bits: int, bias: str, seed: int
) -> KANForManyTasks:
    """Compress the heads of models that have one backbone; see `KANForManyTasks.from_models`."""
    if not models or any("." in task or not task for task in models):
        raise ValueError(f"got the tasks {sorted(models)}; expected at least one, and names without dots")
    for model in models.values():
        _check_dense(model)
    _check_same_backbones(models)
    first, *others = models.values()
    form = ("hidden_widths", "base", "grid")
    if any(getattr(other.config, name) != getattr(first.config, name) for other in others for name in form):
        raise ValueError(f"got heads that differ in one of {form}; expected heads alike but for their classes")
    how = Compression(codebook, bits, bias)
    heads, shapes = compress_heads([model.head for model in models.values()], how, seed=seed)
    config = copy.deepcopy(first.config)
    config.tasks = {task: list(model.config.id2label.values()) for task, model in models.items()}
    config.compression = {"codebook": codebook, "bits": bits, "bias": bias}
    return _assembled(KANForManyTasks, config, first, shapes, heads=nn.ModuleDict(zip(models, heads, strict=True)))


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


def _check_dense(model: Any) -> None:
    if not isinstance(model, KANForImageClassification) or model.codebook is not None:
        found = "a compressed model" if isinstance(model, KANForImageClassification) else type(model).__name__
        raise ValueError(f"got {found} to compress; expected a KANForImageClassification with a dense head")


def _check_same_backbones(models: Mapping[str, Any]) -> None:
    """Raise ValueError unless all models have equal backbones."""
    (first, reference), *others = models.items()
    state = reference.backbone.state_dict()
    for name, model in others:
        other = model.backbone.state_dict()
        if state.keys() != other.keys() or any(not torch.equal(state[key].cpu(), other[key].cpu()) for key in state):
            raise ValueError(
                f"got tasks {first!r} and {name!r} with different backbones; expected one that all share. Train heads "
                "with TrainingConfig(trainable='head'), which leaves the backbone as it is"
            )


def _assembled(kind: type, config: KANConfig, model: KANPreTrainedModel, codebook: Rows, **parts: nn.Module) -> Any:
    """A model of these parts and a copy of another's backbone, on its device."""
    with torch.device("meta"):
        made = kind(config)
    made.backbone, made.codebook = copy.deepcopy(model.backbone), codebook
    for name, part in parts.items():
        setattr(made, name, part)
    return made.to(model.device).eval()
