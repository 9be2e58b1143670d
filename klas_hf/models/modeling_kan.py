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

from .checkpoint_files import load_whole
from .configuration_kan import KANConfig
from .configuration_stitched_vision import StitchedVisionConfig
from .kan_compressed import CompressedKANHead, DamagedHead, check_compressed, codebook_of
from .kan_layers import KANHead, KANLayer
from .kan_packing import Rows
from .modeling_base import StitchedModel
from .modeling_stitched_vision import StitchedBackbone, StitchedForImageClassification
from .replacing import WrittenWhole


class KANPreTrainedModel(WrittenWhole, PreTrainedModel):
    """What classifiers with KAN heads share: the backbone, the codebook if there is one, how they are loaded."""

    config_class = KANConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    codebook: Rows | None

    def __init__(self, config: KANConfig):
        super().__init__(config)
        # By name: code that a checkpoint carries may be loaded twice, for configurations and for models.
        stitched = config.backbone_config.model_type == StitchedVisionConfig.model_type
        new = StitchedBackbone._from_config if stitched else AutoBackbone.from_config
        self.backbone = new(config.backbone_config)
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

    _auto_class = "AutoModelForImageClassification"  # a checkpoint carries its code

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

    _auto_class = "AutoModel"

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
        return StitchedModel._action("compress_tasks")(models, codebook, bits=bits, bias=bias, seed=seed)

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
