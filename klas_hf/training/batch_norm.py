"""BatchNorm in stitched models: which layers they are, and running statistics anew.

A stitch feeds the target's blocks features that its running statistics were not taken from; a supernet's statistics
are a mixture over paths. Recalibration takes them again, on the path that will run.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from klas_hf.anchors.weights import evaluating


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def recalibrate_batch_norm(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], **forward_options: Any
) -> int:
    """Take the running statistics of BatchNorm layers again: the average over batches of each batch's own.

    Dropout and stochastic depth are off meanwhile. Layers that do not run keep what they have, as do all where a
    forward fails. Every process runs all batches, so all get the same.

    Args:
        model: a stitched model, a supernet or any image classifier.
        batches: each with normalised `pixel_values` `(batch, channels, height, width)`.
        forward_options: for the model's forward, such as a supernet's `path`.

    Returns:
        Number of layers that have new statistics; 0 for a model without BatchNorm.

    Raises:
        ValueError: no batches.

    Example:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        >>> model = ResNetForImageClassification(ResNetConfig(**sizes))
        >>> recalibrate_batch_norm(model, images), recalibrate_batch_norm(small, images)  # a ViT has none
        (6, 0)
    """
    layers = batch_norms(model)
    if not layers:
        return 0
    with evaluating(model), _averaging(layers):
        ran = False
        for batch in batches:
            model(pixel_values=batch["pixel_values"].to(model.device, model.dtype), **forward_options)
            ran = True
        if not ran:
            raise ValueError("got no batches to take BatchNorm statistics from; expected at least one")
        return sum(int(layer.num_batches_tracked) > 0 for layer in layers)


@contextmanager
def _averaging(layers: list[_BatchNorm]) -> Iterator[None]:
    """Layers in training mode with fresh statistics, averaged over batches; what did not run gets its own back."""
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    failed = True
    try:
        yield
        failed = False
    finally:
        for layer, buffers, momentum in zip(layers, before, momenta, strict=True):
            layer.momentum = momentum
            if failed or not layer.num_batches_tracked:
                for name, buffer in layer.named_buffers():
                    buffer.copy_(buffers[name])
