"""A supernet: several anchors with stitching layers between them, of which a forward runs one path (SN-Net).

A path is an anchor run whole, or a stitch: the first blocks of one anchor, a stitching layer, the last blocks of
another. All paths share the anchors' weights.
"""

from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from klas_hf.costs import measure_costs, measure_stitch_costs
from klas_hf.models import StitchedForImageClassification
from klas_hf.models.modeling_stitched_vision import StitchingLayer, stochastic_depth
from klas_hf.models.vision_features import drop_block
from klas_hf.models.vision_kinds import vision_kind
from klas_hf.models.vision_shapes import classifier, trace
from klas_hf.stitches import Stitch
from klas_hf.supernet.configuration import StitchedSupernetConfig

Path = int | Stitch


class StitchedSupernet(PreTrainedModel):
    """Anchors and stitching layers that train together.

    Attributes:
        anchors: the image classifiers, cheapest first.
        stitches: the stitching layers.
        paths: every path: the positions of the anchors that a stitch joins, then the stitches.
    """

    config_class = StitchedSupernetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True

    def __init__(self, config: StitchedSupernetConfig):
        super().__init__(config)
        for one in config.anchor_configs:
            one.id2label, one.label2id = config.id2label, config.label2id
        self.anchors = nn.ModuleList(classifier(one) for one in config.anchor_configs)
        self.stitches = nn.ModuleList(self._layer(number) for number in range(len(set(config.layer_of))))
        self.num_labels = config.num_labels
        self.loss_type = "ForImageClassification"  # transformers would go by the name of the class
        self.post_init()
        self.supports_gradient_checkpointing = all(anchor.supports_gradient_checkpointing for anchor in self.anchors)

    @classmethod
    def from_anchors(cls, anchors: Any, stitches: Any, **kwargs: Any) -> "StitchedSupernet":
        """Join anchors by many stitches; see `klas_hf.supernet.assembly.assemble_supernet`."""
        from klas_hf.supernet.assembly import assemble_supernet

        return assemble_supernet(anchors, stitches, **kwargs)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Every path: the positions of the anchors that a stitch joins, then the stitches."""
        stitches = [Stitch(*stitch) for stitch in self.config.stitches]
        joined = sorted({place for stitch in stitches for place in (stitch.source, stitch.target)})
        return (*joined, *stitches)

    @cached_property
    def path_macs(self) -> tuple[int, ...]:
        """MACs of every path for one image, in the order of `paths`."""
        return tuple(macs for macs, _ in self._path_costs)

    @cached_property
    def path_parameters(self) -> tuple[int, ...]:
        """Parameters of every path, as a model of its own, in the order of `paths`."""
        return tuple(parameters for _, parameters in self._path_costs)

    @cached_property
    def _path_costs(self) -> list[tuple[int, int]]:
        configs, size = self.config.anchor_configs, tuple(self.config.image_size)
        pairs = {(path.source, path.target) for path in self.paths if isinstance(path, Stitch)}
        costs = {pair: measure_stitch_costs(*(configs[one] for one in pair), image_size=size) for pair in pairs}
        whole = [measure_costs(config, image_size=size) for config in configs]
        return [
            costs[path.source, path.target].of(path)
            if isinstance(path, Stitch)
            else (whole[path].macs, whole[path].parameters)
            for path in self.paths
        ]

    def get_input_embeddings(self) -> nn.Module:
        return self.anchors[0].get_input_embeddings()

    def layer_of(self, stitch: Stitch) -> StitchingLayer:
        """The stitching layer that a stitch runs.

        Raises:
            ValueError: the supernet has no such stitch.
        """
        return self.stitches[self.config.layer_of[self._number(stitch)]]

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
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def extract(self, stitch: Stitch | tuple[int, int] | tuple[int, int, int, int]) -> StitchedForImageClassification:
        """The stitched model of one path, with a copy of its weights: what the supernet gives on that path, to the bit.

        Raises:
            ValueError: the supernet has no such stitch.
        """
        from klas_hf.supernet.assembly import extract_stitch

        return extract_stitch(self, Stitch.of(stitch))

    def _sides(self, path: Path) -> list[tuple[PreTrainedModel, slice]]:
        """The models that a path runs, and which of their blocks."""
        if isinstance(path, Stitch):
            self._number(path)
            source, target = self.anchors[path.source], self.anchors[path.target]
            return [(source, slice(None, path.source_stop)), (target, slice(path.target_start, None))]
        if not (isinstance(path, int) and 0 <= path < len(self.anchors)):
            raise ValueError(f"got path={path!r}; expected an anchor from 0 to {len(self.anchors) - 1}, or a stitch")
        return [(self.anchors[path], slice(None))]

    def _number(self, stitch: Stitch) -> int:
        known = self._numbers
        if stitch not in known:
            raise ValueError(
                f"got stitch {stitch}, which this supernet of {len(known)} stitches was not made with; expected one of "
                f"{', '.join(map(str, list(known)[:10]))}{' …' if len(known) > 10 else ''}"
            )
        return known[stitch]

    @cached_property
    def _numbers(self) -> dict[Stitch, int]:
        return {Stitch(*stitch): number for number, stitch in enumerate(self.config.stitches)}

    def _layer(self, layer: int) -> StitchingLayer:
        stop, start, source, target = self.config.stitches[self.config.layer_of.index(layer)]
        first, last = self.config.anchor_configs[source], self.config.anchor_configs[target]
        return StitchingLayer(
            vision_kind(first), vision_kind(last), trace(first)[stop].channels, trace(last)[start].channels
        )
