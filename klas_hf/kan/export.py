"""Export of classifiers with KAN heads for ExecuTorch, compressed heads as they are stored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from klas_hf.files import write_atomically
from klas_hf.models.modeling_kan import KANForImageClassification


class _Logits(nn.Module):
    """A model as a function of one tensor: pixels, or the features that its head takes."""

    def __init__(self, model: KANForImageClassification, head_only: bool):
        super().__init__()
        self.head, self.codebook = model.head, model.codebook
        self.backbone = nn.Identity() if head_only else model.backbone
        self.head_only = head_only

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs if self.head_only else self.backbone(inputs).feature_maps[-1].mean((-2, -1))
        return self.head(features) if self.codebook is None else self.head(features, self.codebook)


@torch.no_grad()
def export_kan(
    model: KANForImageClassification,
    path: str | Path,
    example: Tensor,
    *,
    head_only: bool = False,
    partitioners: Sequence[Any] | None = None,
) -> Path:
    """Write a program for ExecuTorch's runtime: one method, `forward`, from one tensor to logits.

    Args:
        model: with a dense or compressed head, on the CPU.
        path: of the `.pte` file.
        example: pixels `(batch, channels, height, width)`, or features `(batch, channels)` for a head alone; the
            program takes inputs of this shape.
        head_only: leave the backbone out.
        partitioners: of ExecuTorch's backends, such as `[XnnpackPartitioner()]`; None: its portable kernels.

    Returns:
        The path.

    Raises:
        ImportError: ExecuTorch is missing.

    Example:
        >>> backbone = StitchedModel.from_anchors(small, large, stitch=(2, 1), calibration=images)
        >>> model = compress_kan(KANForImageClassification.from_backbone(backbone, num_labels=3), codebook=16)
        >>> export_kan(model, folder / "model.pte", images[0]["pixel_values"])  # doctest: +SKIP
    """
    try:
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise ImportError("export needs ExecuTorch: pip install executorch") from error
    program = torch.export.export(_Logits(model, head_only).eval(), (example,), strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=None if partitioners is None else list(partitioners))
    buffer = lowered.to_executorch().buffer
    return write_atomically(path, lambda part: part.write_bytes(buffer))
