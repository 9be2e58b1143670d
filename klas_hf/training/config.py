"""Settings of a training run, as values that recipes and configuration files share."""

from dataclasses import dataclass, field

TRAINABLE = ("stitch", "lora", "head", "backbone", "full")
PRECISIONS = ("auto", "no", "bf16")
OPTIMIZERS = ("adamw", "muon", "sgd")
DISTILLATIONS = ("soft", "hard")
SAMPLINGS = ("uniform", "bucket")
BATCH_NORMS = ("frozen", "train")


@dataclass(frozen=True)
class Augmentation:
    """Which augmentations are applied, in the order of the fields. The defaults apply none.

    Attributes:
        crop_padding: black pixels added on each side before a random crop of the old size; 0: none.
        crop_scale: least and greatest share of the area that a random resized crop keeps; None: none.
        horizontal_flip: half of the images are mirrored.
        randaugment: number of operations per image and their magnitude, above 0 and below 30; None: none.
        erasing: probability that a rectangle of an image is erased to the mean colour.
        mixup: α of the Beta distribution of mixup's λ; 0: none.
        cutmix: the same for CutMix. Where both are given, each batch gets one of them, by a fair coin.
        label_smoothing: share of a target that is spread over all labels.

    Raises:
        ValueError: a number out of its range, or both kinds of crop.

    Example:
        >>> augmentation = Augmentation(crop_padding=4, horizontal_flip=True, mixup=0.8)
        >>> config = TrainingConfig(trainable="full", augmentation=augmentation)
        >>> config.augmentation.mixup
        0.8
    """

    crop_padding: int = 0
    crop_scale: tuple[float, float] | None = None
    horizontal_flip: bool = False
    randaugment: tuple[int, int] | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_scale", "randaugment"):  # YAML gives lists, which cannot be hashed
            value = getattr(self, name)
            if value is not None and len(value) != 2:
                raise ValueError(f"got {name}={value}; expected two numbers, or None")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.crop_padding < 0:
            raise ValueError(f"got crop_padding={self.crop_padding}; expected 0 (none) or a number of pixels")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"got crop_scale={self.crop_scale}; expected a range within (0, 1], such as (0.35, 1.0)")
        if self.crop_padding and self.crop_scale is not None:
            raise ValueError(
                f"got crop_padding={self.crop_padding} and crop_scale={self.crop_scale}; expected one of them"
            )
        if self.randaugment is not None and not (self.randaugment[0] >= 1 and 0 < self.randaugment[1] < 30):
            raise ValueError(
                f"got randaugment={self.randaugment}; expected (operations, magnitude) with at least one operation "
                "and a magnitude above 0 and below 30, such as (2, 9)"
            )
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name}={getattr(self, name)}; expected 0 (none) or the α of a Beta distribution")
        for name in ("erasing", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"got {name}={getattr(self, name)}; expected a number from 0 to 1")


@dataclass(frozen=True)
class TrainingConfig:
    """How a stitched model or a supernet is trained, of text or of images.

    The defaults are those of the KLAS paper's language models where it gives them (App. H). SN-Net (CVPR 2023) trains
    image classifiers in full for 50 epochs with a weight decay of 0.05, and halves the loss between labels and a hard
    teacher: `distillation_weight=0.5, distillation="hard"`; its learning rates are per 512 images of a step: 5e-5 for
    DeiT; for Swin 5e-4 for the stitching layers and a tenth of that for the anchors. Each field says what it is in its
    metadata: `--help` of the command line and docs/reference.md show it.

    Raises:
        ValueError: an unknown choice, a number out of range, or settings of the augmentation that do not fit.

    Example:
        >>> config = TrainingConfig(trainable="stitch", max_steps=2, per_device_batch_size=4)
        >>> config.learning_rate, config.lora_rank
        (0.0001, 16)
        >>> TrainingConfig(augmentation=Augmentation(mixup=0.8)).augmentation.cutmix
        0.0
    """

    trainable: str = field(
        default="lora",
        metadata={
            "help": "what learns: 'stitch' the stitching layers alone, 'lora' these and LoRA on the anchors, 'head' a "
            "KAN head alone, 'backbone' all but a dense model's head, 'full'"
        },
    )
    epochs: float = field(default=10.0, metadata={"help": "passes over the data"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many optimiser steps; None: epochs"})
    per_device_batch_size: int = field(default=8, metadata={"help": "examples per process and forward"})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "forwards per optimiser step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate (the paper gives none)"})
    stitch_learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate of the stitching layers; None: learning_rate"}
    )
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the steps with rising rate (1 epoch of 10)"})
    optimizer: str = field(default="adamw", metadata={"help": "'adamw', 'sgd', or 'muon' for matrices"})
    momentum: float = field(default=0.9, metadata={"help": "of sgd"})
    weight_decay: float = field(default=0.0, metadata={"help": "of matrices only; AdamW's is decoupled"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    mixed_precision: str = field(
        default="auto",
        metadata={"help": "'no' (fp32), 'bf16' (autocast, fp32 weights) or 'auto': bf16 where a GPU has it"},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations to save memory"})
    distillation_weight: float = field(
        default=0.0, metadata={"help": "share of the loss that comes from the teacher's logits; 0: none"}
    )
    distillation: str = field(
        default="soft",
        metadata={"help": "'soft' KL(teacher || student), 'hard' cross-entropy with the teacher's best class"},
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "softens both distributions"})
    distillation_until_passed: bool = field(
        default=False,
        metadata={"help": "distil no more once held-out loss is .1 nats below the teacher's"},
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA updates"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the LoRA updates"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the LoRA updates"})
    low_rank_stitches: int = field(
        default=0,
        metadata={
            "help": "rank of an update that stitching layers learn while themselves frozen (SN-Net v2); 0: they learn"
        },
    )
    sampling: str = field(
        default="uniform",
        metadata={"help": "a supernet's path: 'uniform' over paths, 'bucket' over cost buckets, then in the bucket"},
    )
    sampling_buckets: int = field(default=20, metadata={"help": "cost buckets of equal width for sampling='bucket'"})
    drop_path: float | None = field(
        default=None,
        metadata={"help": "stochastic depth rate of the last block, rising linearly; None: the model's own"},
    )
    batch_norm: str = field(
        default="frozen", metadata={"help": "running statistics of BatchNorm: 'frozen' are used, 'train' updates them"}
    )
    mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406],
        metadata={"help": "of pixels from 0 to 1, per channel, taken off by the anchors' processing"},
    )
    std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225], metadata={"help": "that the processing divides by"}
    )
    augmentation: Augmentation | None = field(
        default=None, metadata={"help": "what is done to images before the model sees them; None: nothing"}
    )
    num_workers: int = field(default=0, metadata={"help": "processes that load data; 0: the training process"})
    eval_steps: int | None = field(
        default=None, metadata={"help": "optimiser steps between measurements on held-out data; None: a tenth of all"}
    )
    save_steps: int = field(default=100, metadata={"help": "optimiser steps between checkpoints"})
    seed: int = field(default=0, metadata={"help": "of every random choice: data order, dropout, LoRA's start"})

    def __post_init__(self) -> None:
        self._one_of("trainable", TRAINABLE)
        self._one_of("optimizer", OPTIMIZERS)
        self._one_of("mixed_precision", PRECISIONS)
        self._one_of("distillation", DISTILLATIONS)
        self._one_of("sampling", SAMPLINGS)
        self._one_of("batch_norm", BATCH_NORMS)
        self._at_least(
            1, "per_device_batch_size", "gradient_accumulation_steps", "lora_rank", "save_steps", "sampling_buckets"
        )
        self._at_least(0, "low_rank_stitches", "num_workers", "seed")
        self._within(0, 1, "warmup_ratio", "distillation_weight", "momentum")
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"got max_steps={self.max_steps}; expected a number of steps, 0 or more, or None")
        if self.max_steps is None and self.epochs <= 0:
            raise ValueError(f"got epochs={self.epochs} and no max_steps; expected a positive number of epochs")
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise ValueError(f"got drop_path={self.drop_path}; expected a number from 0 to below 1, or None")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(
                f"got mean={self.mean} and std={self.std}; expected one number per channel in each, std above 0"
            )

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"got {name}={getattr(self, name)!r}; expected one of {known}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"got {name}={getattr(self, name)}; expected at least {least}")

    def _within(self, low: float, high: float, *names: str) -> None:
        for name in names:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"got {name}={getattr(self, name)}; expected a number from {low} to {high}")
