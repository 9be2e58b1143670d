"""Settings of a training run, as a value that recipes and configuration files share."""

from dataclasses import dataclass, field

TRAINABLE = ("stitch", "lora", "full")
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class TrainingConfig:
    """How a stitched model is trained. The defaults are those of the KLAS paper where it gives them (App. H)."""

    trainable: str = field(
        default="lora",
        metadata={
            "help": "what learns: 'stitch' the stitching layer alone, 'lora' that and LoRA on both sides, 'full'"
        },
    )
    epochs: float = field(default=10.0, metadata={"help": "passes over the data"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many optimiser steps; None: epochs"})
    per_device_batch_size: int = field(default=8, metadata={"help": "sequences per process and forward"})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "forwards per optimiser step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate (the paper gives none)"})
    stitch_learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate of the stitching layer; None: learning_rate"}
    )
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the steps with rising rate (1 epoch of 10)"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices only"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    mixed_precision: str = field(default="no", metadata={"help": "'no' (fp32) or 'bf16' (autocast, fp32 weights)"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations to save memory"})
    distillation_weight: float = field(
        default=0.0, metadata={"help": "share of the loss that is KL(teacher || student) on logits; 0: none"}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "softens both distributions"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA updates"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the LoRA updates"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the LoRA updates"})
    save_steps: int = field(default=100, metadata={"help": "optimiser steps between checkpoints"})
    seed: int = field(default=0, metadata={"help": "of data order, dropout and LoRA's start"})

    def __post_init__(self) -> None:
        _one_of("trainable", self.trainable, TRAINABLE)
        _one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        for name in ("per_device_batch_size", "gradient_accumulation_steps", "lora_rank", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least 1")
        for name in ("warmup_ratio", "distillation_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected a number from 0 to 1")
        if self.max_steps is None and self.epochs <= 0:
            raise ValueError(f"got epochs={self.epochs} and no max_steps; expected a positive number of epochs")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"got {name}={value!r}; expected one of {known}")
