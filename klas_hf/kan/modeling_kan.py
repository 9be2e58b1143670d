"""Image classifiers with KAN heads, dense or compressed: one head, or many on one backbone.

    pixels ─► backbone ─► mean of its last feature map ─► KAN head ─► logits

The backbone is any of transformers' backbones, or a `StitchedBackbone`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import ImageClassifierOutput

from klas_hf.kan.compressed import CompressedKANHead, Compression, DamagedHead, check_compressed, codebook_of
from klas_hf.kan.compression import compress_heads, explained_variance
from klas_hf.kan.configuration_kan import KANConfig
from klas_hf.kan.layers import KANHead, KANLayer
from klas_hf.kan.packing import Rows
from klas_hf.models import StitchedBackbone, StitchedForImageClassification
from klas_hf.models.checkpoint_files import load_whole


class KANPreTrainedModel(PreTrainedModel):
    """What classifiers with KAN heads share: the backbone, the codebook if there is one, how they are loaded."""

    config_class = KANConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    codebook: Rows | None

    def __init__(self, config: KANConfig):
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        how = config.how_compressed
        self.codebook = None if how is None else codebook_of(how, config.grid)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, KANLayer):
            module.reset()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, its head as it is stored, compressed or dense.

        Raises:
            ValueError: written by another version of klas_hf, which cannot be read.
            OSError: damaged, incomplete or pickled.
        """
        try:
            loaded = load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            for head in model.heads_by_task().values():
                if isinstance(head, CompressedKANHead):
                    check_compressed(head, model.codebook)
        except DamagedHead as error:
            raise OSError(
                f"could not load the checkpoint {str(pretrained_model_name_or_path)!r}: {error}. Expected the tensors "
                "that config.json describes. Download or save it again"
            ) from error
        return loaded

    def heads_by_task(self) -> dict[str, nn.Module]:
        """The heads, by the name of their task."""
        raise NotImplementedError

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """Means of the backbone's last feature map over its grid: `(batch, channels)`."""
        return self.backbone(pixel_values).feature_maps[-1].mean((-2, -1))

    def run_head(self, head: nn.Module, features: Tensor) -> Tensor:
        """Logits of one head, `(batch, labels)`."""
        return head(features) if self.codebook is None else head(features, self.codebook)

    def _new_head(self, labels: int) -> nn.Module:
        config: KANConfig = self.config
        widths = [self.backbone.channels[-1], *config.hidden_widths, labels]
        how = config.how_compressed
        if how is None:
            return KANHead(widths, config.grid, config.base)
        return CompressedKANHead(widths, config.grid, config.base, how)


class KANForImageClassification(KANPreTrainedModel):
    """An image classifier with a KAN head, as any of transformers: Auto classes, Trainer, pipelines.

    Args:
        config: its configuration; `from_backbone` makes both.

    Example:
        >>> backbone = StitchedModel.from_anchors(small, large, stitch=(2, 1), calibration=images)
        >>> model = KANForImageClassification.from_backbone(backbone, num_labels=3, base="silu")
        >>> result = train_stitches(model, pictures, TrainingConfig(trainable="head", max_steps=2))
        >>> compressed = compress_kan(model, codebook=16)
        >>> compressed.save_pretrained(folder)
        >>> again = KANForImageClassification.from_pretrained(folder)  # or AutoModelForImageClassification
        >>> torch.equal(again(**images[0]).logits, compressed(**images[0]).logits)
        True
    """

    def __init__(self, config: KANConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.head = self._new_head(config.num_labels)
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, **settings: Any) -> "KANForImageClassification":
        """A new, untrained head on a backbone.

        Args:
            backbone: what `AutoBackbone` loads, a `StitchedBackbone`, or a stitched classifier, whose own head is left
                out; a whole classifier becomes one by `StitchedModel.from_path([classifier], "0[:]")`. It is copied.
            settings: fields of `KANConfig`, with `num_labels` or `id2label`.

        Raises:
            TypeError: something else.
            ValueError: settings that do not fit.
        """
        backbone = _as_backbone(backbone)
        model = cls(KANConfig(backbone_config=copy.deepcopy(backbone.config), **settings)).to(backbone.dtype)
        model.backbone.load_state_dict(backbone.state_dict())
        return model.eval()

    def heads_by_task(self) -> dict[str, nn.Module]:
        return {"": self.head}

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Class logits, and their cross-entropy where labels are given.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as the backbone wants them.
            labels: `(batch,)` class numbers.

        Returns:
            logits `(batch, labels)`, loss in nats.
        """
        logits = self.run_head(self.head, self.pooled(pixel_values))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class KANForManyTasks(KANPreTrainedModel):
    """Many compressed KAN heads on one backbone, with one codebook; each call names the head that answers.

    Args:
        config: its configuration; `from_models` makes both.

    Example:
        >>> backbone = StitchedModel.from_anchors(small, large, stitch=(2, 1), calibration=images)
        >>> one = KANForImageClassification.from_backbone(backbone, num_labels=3)
        >>> other = KANForImageClassification.from_backbone(backbone, num_labels=7)
        >>> both = KANForManyTasks.from_models({"pets": one, "plants": other}, codebook=16)
        >>> both(images[0]["pixel_values"], task="plants").logits.shape
        torch.Size([4, 7])
    """

    def __init__(self, config: KANConfig):
        super().__init__(config)
        if not config.tasks or config.compression is None:
            raise ValueError("got a configuration without tasks or compression; expected that of compressed heads")
        self.heads = nn.ModuleDict({task: self._new_head(len(names)) for task, names in config.tasks.items()})
        self.post_init()

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, KANForImageClassification],
        codebook: int,
        *,
        bits: int = 8,
        bias: str = "output",
        seed: int = 0,
    ) -> "KANForManyTasks":
        """Compress the heads of models that have one backbone.

        Args:
            models: by task, with dense heads on one grid; names have no dots.
            codebook: number of shapes, which all the heads share.
            bits, bias, seed: as of `compress_kan`.

        Raises:
            ValueError: no models, backbones that differ, heads of different forms, or already compressed.
        """
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
        return _assembled(cls, config, first, shapes, heads=nn.ModuleDict(zip(models, heads, strict=True)))

    def heads_by_task(self) -> dict[str, nn.Module]:
        return dict(self.heads.items())

    def forward(self, pixel_values: Tensor, task: str) -> ImageClassifierOutput:
        """Class logits `(batch, labels)` of one task, whose names are `config.tasks[task]`.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as the backbone wants them.
            task: which head answers.

        Raises:
            ValueError: no such task.
        """
        if task not in self.heads:
            raise ValueError(f"got task={task!r}; expected one of {list(self.heads)}")
        return ImageClassifierOutput(logits=self.run_head(self.heads[task], self.pooled(pixel_values)))


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


def head_bytes(model: KANPreTrainedModel) -> int:
    """Bytes of all heads of a model and of their codebook, in memory as in the file.

    Args:
        model: dense or compressed.

    Returns:
        The sum over their tensors.

    Example:
        >>> backbone = StitchedModel.from_anchors(small, large, stitch=(2, 1), calibration=images)
        >>> head_bytes(KANForImageClassification.from_backbone(backbone, num_labels=3))  # 24 · 3 edges of 8 float32
        2304
    """
    parts: Sequence[nn.Module | None] = [*model.heads_by_task().values(), model.codebook]
    tensors = [tensor for part in parts if part is not None for tensor in part.state_dict().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _as_backbone(model: PreTrainedModel) -> PreTrainedModel:
    if isinstance(model, BackboneMixin):
        return model
    if isinstance(model, StitchedForImageClassification):
        made = StitchedBackbone(copy.deepcopy(model.config)).to(model.dtype)
        state = model.state_dict()
        made.load_state_dict({name: state.get(name, tensor) for name, tensor in made.state_dict().items()})
        return made.eval()
    raise TypeError(
        f"got a backbone of {type(model).__name__}; expected what AutoBackbone loads, or a stitched model. Of a whole "
        'classifier: StitchedModel.from_path([classifier], "0[:]")'
    )


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
