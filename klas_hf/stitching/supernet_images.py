"""Supernets of image classifiers."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.models import StitchedForImageClassification
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.models.modeling_stitched_vision import stochastic_depth
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import classifier
from klas_hf.paths import Path
from klas_hf.stitching.images import check_grids, common_size, stitched_vision_config, usable_images
from klas_hf.stitching.loading import load_parts
from klas_hf.stitching.supernet import AnyPath, StitchedSupernet
from klas_hf.stitching.supernet_joints import note_origin


class StitchedSupernetForImageClassification(StitchedSupernet):
    """Image classifiers and stitching layers that train together (SN-Net).

    Args:
        config: `StitchedSupernet.from_anchors` makes it, and the model.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([small, large], [(1, 2), (2, 1)], calibration=images)
        >>> config = TrainingConfig(max_steps=2, per_device_batch_size=4)
        >>> train_stitches(supernet, pictures, config).steps
        2
        >>> supernet(images[0]["pixel_values"], path=Stitch(2, 1)).logits.shape
        torch.Size([4, 3])
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    anchor_class = VisionAnchor

    def __init__(self, config: StitchedSupernetConfig):
        super().__init__(config)
        for one in config.anchor_configs:
            one.id2label, one.label2id = config.id2label, config.label2id
        self.anchors = nn.ModuleList(classifier(one) for one in config.anchor_configs)
        self.joints = self._made_joints()
        self.num_labels = config.num_labels
        self.loss_type = "ForImageClassification"  # transformers would go by the name of the class
        self.post_init()
        self.supports_gradient_checkpointing = all(anchor.supports_gradient_checkpointing for anchor in self.anchors)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        path: AnyPath | None = None,
        return_dict: bool | None = None,
        drop_path: float | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Class logits of one path, and their cross-entropy where labels are given.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            labels: `(batch,)` class numbers.
            path: one of the supernet's; None takes the last anchor.
            drop_path: stochastic depth of the path's last block in training; None takes the configuration's.
        """
        path = Path.parse(f"{len(self.anchors) - 1}[:]") if path is None else self.check_path(path)
        inputs: dict[str, Any] = {"pixel_values": pixel_values}
        rate = self.config.drop_path_rate if drop_path is None else drop_path
        if rate and self.training:
            sides = [(self.anchors[place], vision_kind(self.anchors[place].config)) for place in path.anchors]
            depth = sum(stop - start for _, start, stop in self.bounds(path))
            inputs["rates"] = iter(stochastic_depth(rate, depth, *sides))
        logits = self.path_logits(path, inputs)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @classmethod
    def _settings(
        cls, anchors: Sequence[Anchor], paths: Sequence[Path], image_size: int | tuple[int, int] | None
    ) -> dict[str, Any]:
        configs = [one.config for one in anchors]
        used = sorted({place for path in paths for place in path.anchors})
        size = common_size([configs[place] for place in used], image_size)
        for path in paths:
            check_grids(configs, path, size)
        sides = copy.deepcopy(configs)
        for side in sides:
            for name, value in vision_kind(side).training.items():
                setattr(side, name, value)
        labels = {"id2label": dict(configs[-1].id2label), "label2id": dict(configs[-1].label2id)}
        return {"anchor_configs": sides, "image_size": list(size)} | labels

    @classmethod
    def _usable(cls, calibration: Iterable[Any], anchors: Sequence[Anchor]) -> Iterable[Any]:
        return usable_images(calibration, *(one.config for one in anchors))

    def _extracted(self, path: Path) -> StitchedForImageClassification:
        given = self.config
        config = stitched_vision_config(given.anchor_configs, path, (given.image_size[0], given.image_size[1]))
        config.drop_path_rate = given.drop_path_rate
        note_origin(config, self, path)
        parts = {f"slices.{number}": self.anchors[one.anchor] for number, one in enumerate(path.slices)}
        parts |= {f"joints.{number}": joint for number, joint in enumerate(self.joints_of(path))}
        state = {
            f"{part}.{name}": tensor.detach().clone()
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }
        model = load_parts(StitchedForImageClassification, config, state, dtype=self.dtype)
        return model.to(self.device).eval()
