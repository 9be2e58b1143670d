"""A supernet: several anchors with stitching layers between them, of which a forward runs one path (SN-Net).

A path is an anchor run whole, or a stitch: the first blocks of one anchor, a stitching layer, the last blocks of
another. All paths share the anchors' weights.
"""

import copy
import os
from abc import abstractmethod
from functools import cached_property
from importlib import import_module
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from klas_hf.actions import Publishable
from klas_hf.costs import measure_costs, measure_stitch_costs
from klas_hf.models import StitchedModel
from klas_hf.models.checkpoint_files import load_whole, replacing
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.paths import Stitch

Path = int | Stitch


class StitchedSupernet(Publishable, PreTrainedModel):
    """Anchors and stitching layers that train together (SN-Net); base of the supernets of images and of text.

    `from_anchors` and `from_pretrained` of this class return the class for the task: a
    `StitchedSupernetForImageClassification` or a `StitchedSupernetForCausalLM`.

    Attributes:
        anchors: the models, cheapest first.
        stitches: the stitching layers.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([small, large], [(1, 2), (2, 1)], calibration=images)
        >>> supernet.paths  # the anchors, then the stitches
        (0, 1, Stitch(source_stop=1, target_start=2, source=0, target=1), Stitch(source_stop=2, ...))
        >>> pixels = images[0]["pixel_values"]
        >>> torch.equal(supernet.extract((1, 2))(pixels).logits, supernet(pixels, path=Stitch(1, 2)).logits)
        True
        >>> alone = StitchedModel.from_anchors(small, large, (1, 2), calibration=images)
        >>> torch.allclose(alone(pixels).logits, supernet(pixels, path=Stitch(1, 2)).logits, atol=1e-4)
        True
    """

    config_class = StitchedSupernetConfig
    base_model_prefix = ""
    _supports_sdpa = True

    anchors: nn.ModuleList
    stitches: nn.ModuleList

    @classmethod
    def from_anchors(cls, anchors: Any, stitches: Any, **kwargs: Any) -> "StitchedSupernet":
        """Join anchors by many stitches; see `klas_hf.stitching.supernets.assemble_supernet`.

        Args:
            anchors: Hub ids, local folders or models, all image classifiers or all causal language models.
            stitches: a selection, or any stitches; of two anchors `(i, j)`, of more `Stitch(i, j, source, target)`.
            kwargs: `calibration` batches for the least-squares start (None: random, with a warning), `shared` layers
                (see `snnet_groups`), `ridge`, and for the costs `image_size` in pixels or `tokens`.

        Raises:
            ValueError: anchors or stitches that do not fit each other.
        """
        return import_module("klas_hf.stitching.supernets").assemble_supernet(anchors, stitches, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "StitchedSupernet":
        """Load a saved supernet; `StitchedSupernet` itself loads the class that the checkpoint names.

        Raises:
            ValueError: a checkpoint of something else.
        """
        if cls is not StitchedSupernet:
            return load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if k in kwargs}
        config = kwargs.get("config") or StitchedSupernetConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        by_name = {kind.__name__: kind for kind in cls.__subclasses__()}
        (name,) = config.architectures or ["nothing"]
        if name not in by_name:
            raise ValueError(f"got a checkpoint of {name!r}; expected a supernet, one of {sorted(by_name)}")
        return by_name[name].from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as any model of transformers; what the folder holds stays until the new checkpoint is written whole."""
        with replacing(save_directory, kwargs.get("variant")) as part:
            super().save_pretrained(part, *args, **kwargs)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Every path: the positions of the anchors that a stitch joins, then the stitches."""
        stitches = [Stitch(*stitch) for stitch in self.config.stitches]
        joined = sorted({place for stitch in stitches for place in (stitch.source, stitch.target)})
        return (*joined, *stitches)

    @cached_property
    def path_macs(self) -> tuple[int, ...]:
        """MACs of every path for one image, or one sequence of `config.tokens`, in the order of `paths`."""
        return tuple(macs for macs, _ in self._path_costs)

    @cached_property
    def path_parameters(self) -> tuple[int, ...]:
        """Parameters of every path, as a model of its own, in the order of `paths`."""
        return tuple(parameters for _, parameters in self._path_costs)

    @cached_property
    def _path_costs(self) -> list[tuple[int, int]]:
        configs, given = self.config.anchor_configs, self.config
        size = None if given.image_size is None else (given.image_size[0], given.image_size[1])
        pairs = {(path.source, path.target) for path in self.paths if isinstance(path, Stitch)}
        costs = {
            pair: measure_stitch_costs(*(configs[one] for one in pair), image_size=size, tokens=given.tokens)
            for pair in pairs
        }
        whole = [measure_costs(config, image_size=size, tokens=given.tokens) for config in configs]
        return [
            costs[path.source, path.target].of(path)
            if isinstance(path, Stitch)
            else (whole[path].macs, whole[path].parameters)
            for path in self.paths
        ]

    def get_input_embeddings(self) -> nn.Module:
        return self.anchors[0].get_input_embeddings()

    def layer_of(self, stitch: Stitch) -> nn.Module:
        """The stitching layer that a `stitch` runs.

        Raises:
            ValueError: the supernet has no such stitch.
        """
        return self.stitches[self.config.layer_of[self.check_path(stitch)]]

    def extract(self, stitch: Stitch | tuple[int, int] | tuple[int, int, int, int]) -> StitchedModel:
        """The stitched model of one `stitch`, with a copy of its weights: what the supernet gives on that path.

        Raises:
            ValueError: the supernet has no such stitch.
        """
        stitch = Stitch.of(stitch)
        self.check_path(stitch)
        return self._extracted(stitch)

    @abstractmethod
    def _extracted(self, stitch: Stitch) -> StitchedModel: ...

    def check_path(self, path: Path) -> int:
        """The number of a `path`: of a stitch among the supernet's, or of an anchor.

        Raises:
            ValueError: there is no such path.
        """
        if isinstance(path, Stitch):
            known = self._numbers
            if path in known:
                return known[path]
            raise ValueError(
                f"got stitch {path}, which this supernet of {len(known)} stitches was not made with; expected one of "
                f"{', '.join(map(str, list(known)[:10]))}{' …' if len(known) > 10 else ''}"
            )
        if not (isinstance(path, int) and 0 <= path < len(self.anchors)):
            raise ValueError(f"got path={path!r}; expected an anchor from 0 to {len(self.anchors) - 1}, or a stitch")
        return path

    @cached_property
    def _numbers(self) -> dict[Stitch, int]:
        return {Stitch(*stitch): number for number, stitch in enumerate(self.config.stitches)}

    def ends_of_layers(self) -> list[Stitch]:
        """A stitch of every stitching layer."""
        layers = range(len(set(self.config.layer_of)))
        return [Stitch(*self.config.stitches[self.config.layer_of.index(layer)]) for layer in layers]


def note_origin(config: Any, supernet: StitchedSupernet, stitch: Stitch) -> None:
    """Write into a stitched model's configuration where its anchors and its layer come from, and its training."""
    given = supernet.config
    config.training = copy.deepcopy(given.training)
    if given.anchor_names:
        config.anchor_names, config.anchor_revisions = list(given.anchor_names), list(given.anchor_revisions)
    if given.layer_fits:
        config.joint_fits = [given.layer_fits[given.layer_of[supernet.check_path(stitch)]]]
