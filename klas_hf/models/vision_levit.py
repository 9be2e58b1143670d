"""LeViT: stages of attention and MLP pairs, each but the first entered by an attention that subsamples.

A block is one attention with the MLP after it, as SN-Net counts them.
"""

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .vision_features import Block, Features, VisionKind, staged_blocks


class LevitKind(VisionKind):
    """LeViT, with one head or with a second one for the teacher averaged in."""

    fixed_size = True
    training = {"drop_path_rate": 0}  # its configuration accepts whole numbers only
    embed = ("levit.patch_embeddings",)
    head = ("classifier", "classifier_distill")

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        names: list[list[tuple[str, ...]]] = []
        entry: tuple[str, ...] = ()
        for stage, depth in enumerate(config.depths):
            per_block = 2 if config.mlp_ratio[stage] > 0 else 1
            layers = f"levit.encoder.stages.{stage}.layers"
            names.append([tuple(f"{layers}.{n * per_block + part}" for part in range(per_block)) for n in range(depth)])
            names[stage][0] = entry + names[stage][0]
            # Subsampling stands at the end of a stage's list, with an MLP of the next stage's width after it.
            down = config.down_ops[stage] if stage < len(config.depths) - 1 else None
            length = 0 if down is None or down[0] != "Subsample" else 2 if down[4] > 0 else 1
            entry = tuple(f"{layers}.{depth * per_block + part}" for part in range(length))
        return staged_blocks(names)

    def run_embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Features:
        hidden = model.levit.patch_embeddings(pixel_values)
        side = int(hidden.shape[1] ** 0.5)
        return Features(hidden, side, side)

    def run_module(self, module: nn.Module, name: str, features: Features) -> Features:
        hidden = module(features.hidden)
        side = int(hidden.shape[1] ** 0.5)
        return Features(hidden, side, side)

    def run_head(self, model: PreTrainedModel, features: Features) -> Tensor:
        pooled = features.hidden.mean(1)
        modules = dict(model.named_children())
        logits = modules["classifier"](pooled)
        return (logits + modules["classifier_distill"](pooled)) / 2 if "classifier_distill" in modules else logits
