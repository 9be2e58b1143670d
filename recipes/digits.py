"""KLAS against SN-Net, Min-KL, CKA and chance on scikit-learn's handwritten digits: the whole vision path in minutes.

    accelerate launch recipes/digits.py

Three small ViTs and three small Swins are trained once (and kept in the cache folder), then every rule's supernet is
fine-tuned for the same steps under several seeds and measured on held-out digits. Nothing is downloaded. The report
says who won, by how much, and how sure that is.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from experiments.image_comparison import ComparisonSettings, ImageComparison, ImageTask
from experiments.image_report import report
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from klas_hf import TrainingConfig, evaluate, train_stitches
from klas_hf.data.digits import load_digits_split
from klas_hf.data.images import image_batches
from klas_hf.files import write_folder_atomically
from klas_hf.options import parse_options
from klas_hf.processes import process_state

MEAN, STD = (0.3,), (0.37,)  # of the digits' pixels
SIZE, CLASSES = 8, 10


def vit(depth: int, width: int) -> PreTrainedConfig:
    return ViTConfig(
        image_size=SIZE, patch_size=2, num_channels=1, num_labels=CLASSES, num_hidden_layers=depth, hidden_size=width,
        num_attention_heads=4, intermediate_size=2 * width, initializer_range=0.15,
    )  # fmt: skip


def swin(depths: list[int], width: int) -> PreTrainedConfig:
    return SwinConfig(
        image_size=SIZE, patch_size=1, num_channels=1, num_labels=CLASSES, depths=depths, embed_dim=width,
        num_heads=[2, 4], window_size=4, mlp_ratio=2.0, drop_path_rate=0.0, initializer_range=0.15,
    )  # fmt: skip


def resnet(depths: list[int], width: int) -> PreTrainedConfig:
    return ResNetConfig(
        num_channels=1, num_labels=CLASSES, layer_type="basic", embedding_size=8, depths=depths,
        hidden_sizes=[width, 2 * width],
    )  # fmt: skip


SCALE = {"resnet": 4}  # pixels are repeated, because the stem halves the image twice
FAMILIES = {
    "vit": {"ViT-6×16": vit(6, 16), "ViT-8×32": vit(8, 32), "ViT-12×64": vit(12, 64)},
    "resnet": {
        "ResNet-2,2×8": resnet([2, 2], 8),
        "ResNet-2,4×16": resnet([2, 4], 16),
        "ResNet-3,6×32": resnet([3, 6], 32),
    },
    "swin": {"Swin-2,2×8": swin([2, 2], 8), "Swin-2,4×16": swin([2, 4], 16), "Swin-2,6×32": swin([2, 6], 32)},
}


@dataclass
class DigitsArguments:
    families: list[str] = field(
        default_factory=lambda: ["vit", "swin"], metadata={"help": f"which anchors: {', '.join(FAMILIES)}"}
    )
    output_dir: str = field(default="outputs/digits", metadata={"help": "where rows, scores and pictures go"})
    cache_dir: str = field(default="outputs/digits_anchors", metadata={"help": "where trained anchors are kept"})
    anchor_steps: int = field(default=400, metadata={"help": "training steps of each anchor"})
    smoke: bool = field(default=False, metadata={"help": "a few steps, one seed, one family: no result"})

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.families) - set(FAMILIES)):
            raise ValueError(f"got the families {unknown}; expected some of {sorted(FAMILIES)}")


@dataclass
class DigitsSettings(ComparisonSettings):
    """The comparison's settings, with defaults for these data."""

    buckets: int = field(default=10, metadata={"help": "cost buckets between two anchors"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of the fine-tuning"})


@dataclass(frozen=True)
class DigitsTraining(TrainingConfig):
    """Fine-tuning of the supernets, with defaults for these data."""

    trainable: str = field(default="full", metadata={"help": "what learns"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forwards per optimiser step"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices only"})
    max_steps: int | None = field(default=300, metadata={"help": "optimiser steps"})
    per_device_batch_size: int = field(default=64, metadata={"help": "images per process and forward"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    save_steps: int = field(default=1000, metadata={"help": "optimiser steps between checkpoints"})


def main() -> None:
    args, settings, training = parse_options(
        DigitsArguments, DigitsSettings, DigitsTraining, description=__doc__.split("\n")[0]
    )
    if args.smoke:
        args.families, args.anchor_steps = args.families[:1], 3
        settings = replace(settings, seeds=[0], probe_epochs=2, buckets=2)
        training = replace(training, max_steps=2)
    for family in args.families:
        train, validation, test = load_digits_split(scale=SCALE.get(family, 1))
        task = ImageTask(train, validation, test, MEAN, STD)
        process_state().print(
            f"\n# {family}: {len(train)} digits to train on, {len(validation)} to score on, {len(test)} held out"
        )
        cache = Path(args.cache_dir) / f"{family}-{args.anchor_steps}-steps"
        anchors = [anchor(name, config, task, args, cache) for name, config in FAMILIES[family].items()]
        comparison = ImageComparison(
            anchors, list(FAMILIES[family]), task, settings, training, Path(args.output_dir) / family
        )
        comparison.run()
        process_state().print(report(comparison))


def anchor(
    name: str,
    config: PreTrainedConfig,
    task: ImageTask,
    args: DigitsArguments,
    cache: Path,
) -> PreTrainedModel:
    """A classifier trained on the digits, from the cache if it is there."""
    folder = cache / name.replace("×", "x").replace(",", "-")
    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(config)
        # Not the supernets' settings: what is in the cache depends on the number of steps alone.
        steps = DigitsTraining(
            max_steps=args.anchor_steps, learning_rate=4e-3, batch_norm="train", mean=list(MEAN), std=list(STD)
        )
        result = train_stitches(model, task.train, steps)
        measured = evaluate(model, image_batches(task.test, 64, task.mean, task.std))
        process_state().print(
            f"{name}: {result.steps} steps in {result.seconds:.0f} s, accuracy {measured.metrics['accuracy']:.4f}"
        )
        if process_state().is_main_process:
            write_folder_atomically(folder, model.save_pretrained)
        process_state().wait_for_everyone()
    return AutoModelForImageClassification.from_pretrained(folder)


if __name__ == "__main__":
    main()
