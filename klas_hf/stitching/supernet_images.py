"""Supernets of image classifiers."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from klas_hf.models import StitchedForImageClassification
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.models.modeling_stitched_vision import StitchingLayer, stochastic_depth
from klas_hf.models.vision_features import drop_block
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import classifier, trace
from klas_hf.paths import Stitch
from klas_hf.stitching.supernet import Path, StitchedSupernet


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

    def __init__(self, config: StitchedSupernetConfig):
        super().__init__(config)
        for one in config.anchor_configs:
            one.id2label, one.label2id = config.id2label, config.label2id
        self.anchors = nn.ModuleList(classifier(one) for one in config.anchor_configs)
        self.stitches = nn.ModuleList(self._layer(stitch) for stitch in self.ends_of_layers())
        self.num_labels = config.num_labels
        self.loss_type = "ForImageClassification"  # transformers would go by the name of the class
        self.post_init()
        self.supports_gradient_checkpointing = all(anchor.supports_gradient_checkpointing for anchor in self.anchors)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        path: Path | None = None,
        return_dict: bool | None = None,
        drop_path: float | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Class logits of one path, and their cross-entropy where labels are given.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            labels: `(batch,)` class numbers.
            path: position of an anchor, or a stitch; None takes the last anchor.
            drop_path: stochastic depth of the path's last block in training; None takes the configuration's.
        """
        path = len(self.anchors) - 1 if path is None else path
        sides = self._sides(path)
        kinds = [vision_kind(model.config) for model, _ in sides]
        kinds[0].check_pixels(pixel_values, sides[0][0].config)
        kinds[-1].check_size(pixel_values, sides[-1][0].config)
        blocks = [kind.blocks(model.config)[part] for kind, (model, part) in zip(kinds, sides, strict=True)]
        rate = self.config.drop_path_rate if drop_path is None else drop_path
        pairs = [(model, kind) for kind, (model, _) in zip(kinds, sides, strict=True)]
        rates = iter(stochastic_depth(rate if self.training else 0.0, sum(map(len, blocks)), *pairs))
        features = kinds[0].run_embed(sides[0][0], pixel_values)
        for number, (model, kind) in enumerate(pairs):
            if number:
                assert isinstance(path, Stitch)
                features = self.layer_of(path)(features)
            for block in blocks[number]:
                features = drop_block(features, kind.run_block(model, block, features), next(rates))
        logits = pairs[-1][1].run_head(pairs[-1][0], features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _sides(self, path: Path) -> list[tuple[PreTrainedModel, slice]]:
        """The models that a path runs, and which of their blocks."""
        self.check_path(path)
        if isinstance(path, Stitch):
            source, target = self.anchors[path.source], self.anchors[path.target]
            return [(source, slice(None, path.source_stop)), (target, slice(path.target_start, None))]
        return [(self.anchors[path], slice(None))]

    def _layer(self, stitch: Stitch) -> StitchingLayer:
        first, last = (self.config.anchor_configs[place] for place in (stitch.source, stitch.target))
        return StitchingLayer(
            vision_kind(first),
            vision_kind(last),
            trace(first)[stitch.source_stop].channels,
            trace(last)[stitch.target_start].channels,
        )

    def _extracted(self, stitch: Stitch) -> StitchedForImageClassification:
        from klas_hf.stitching.supernet_image_parts import extract_classifier

        return extract_classifier(self, stitch)
