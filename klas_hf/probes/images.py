"""Probes of image classifiers: one linear classifier on the pooled features of every block (KLAS Alg. 1).

    logits_i = W_i · pool(block i's output) + b_i

Pooling is the mean over the grid, class tokens left out. On maps this is the paper's 1×1 convolution followed by the
mean: both are linear, so their order does not matter. `klas_hf.probes.image_training` trains them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.actions import Publishable
from klas_hf.anchors.images import ImageBatch
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.models.checkpoint_files import load_whole
from klas_hf.models.replacing import WrittenWhole


class ImageProbeConfig(PreTrainedConfig):
    """How image probes are trained, of which anchor they are, and how good they became.

    Args:
        epochs: passes over the training data, at most.
        patience: epochs without a lower validation loss after which a probe is done; its best weights are kept.
        learning_rate, weight_decay: of AdamW, on standardised features.
        shuffled_labels: train on randomly permuted labels (KLAS App. D.2: the score without class semantics).
        seed: of the permutation.
        anchor_name, anchor_revision, anchor_fingerprint, widths: filled in by the training.
        accuracy, validation_loss, best_epoch: of each block's probe, on the validation data; loss in nats per image.

    Raises:
        ValueError: epochs or patience below 1.

    Example:
        >>> probes = train_probes(small, images[:3], ImageProbeConfig(epochs=2), validation=images[3:])
        >>> probes.config.widths, len(probes.config.accuracy)
        ([16, 16, 16], 3)
    """

    model_type = "klas_image_probes"

    epochs: int = 20
    patience: int = 2
    learning_rate: float = 0.01
    weight_decay: float = 0.01
    shuffled_labels: bool = False
    seed: int = 0
    anchor_name: str | None = None
    anchor_revision: str | None = None
    anchor_fingerprint: str | None = None
    widths: list[int] | None = None
    accuracy: list[float] | None = None
    validation_loss: list[float] | None = None
    best_epoch: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least 1")
        super().__post_init__(**kwargs)


class ImageProbeNet(Publishable, WrittenWhole, PreTrainedModel):
    """One linear probe per block of an image classifier (Alg. 1); saves, loads and goes to the Hub as any model.

    Args:
        config: with the widths of the blocks and the labels; `train_probes` makes both.

    Example:
        >>> _ = train_probes(small, images, ImageProbeConfig(epochs=1)).save_pretrained(folder)
        >>> probes = ImageProbeNet.from_pretrained(folder)
        >>> probes.log_probs([torch.zeros(8, 16)] * 3).shape  # blocks, images, labels
        torch.Size([3, 8, 3])
    """

    config_class = ImageProbeConfig
    base_model_prefix = ""
    main_input_name = "pooled"

    def __init__(self, config: ImageProbeConfig):
        super().__init__(config)
        self.probes = nn.ModuleList(nn.Linear(width, config.num_labels) for width in config.widths or [])
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "ImageProbeNet":
        """Load saved probes.

        Raises:
            OSError: they are damaged, incomplete or pickled.
        """
        return load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The problem is convex: zero is as good a start as any, and needs no seed.
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def log_probs(
        self, pooled: Sequence[Tensor], anchor: VisionAnchor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Class log-probabilities of all probes, fp32, in nats.

        Args:
            pooled: `(images, width)` of every block.
            anchor: the anchor that the probes are of; these have no need of it.
            out: fp32 tensor to write to; None makes one.

        Returns:
            `(blocks, images, labels)`.
        """
        logits = [probe(x.to(probe.weight)) for probe, x in zip(self.probes, pooled, strict=True)]
        log_probs = torch.stack(logits).float().log_softmax(-1)
        return log_probs if out is None else out.copy_(log_probs)

    @property
    def summary(self) -> dict[str, Any]:
        """What scores say about the probes that they were measured with, as plain JSON values."""
        return {"accuracy": self.config.accuracy, "epochs": self.config.best_epoch}

    def check(self, anchor: VisionAnchor) -> None:
        """Raise ValueError unless these are the probes of this `anchor`, of its very weights."""
        if self.config.anchor_fingerprint != anchor.fingerprint:
            raise ValueError(
                f"got probes of {self.config.anchor_name} (weights {str(self.config.anchor_fingerprint)[:12]}) for "
                f"{anchor.name} (weights {anchor.fingerprint[:12]}): other weights; expected the model they were "
                "trained on. Train probes for this anchor with train_probes"
            )


def pooled_features(anchor: VisionAnchor, batch: ImageBatch) -> list[Tensor]:
    """Pooled output of every block, `num_blocks` tensors `(images, width)`, fp32."""
    return [anchor.probed(state, batch).float() for state in anchor.states(batch)[1:]]
