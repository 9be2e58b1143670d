"""A supernet: anchors with stitching layers between their blocks, of which a forward runs one path (SN-Net).

All paths share the anchors' weights. Every stitching layer starts from least squares, in one pass over the calibration
data for the first joints of all paths, and in one more for every joint behind: it maps what its path really gives.
"""

import copy
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from klas_hf.actions import Publishable
from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.dense import is_dense
from klas_hf.anchors.language import hub_options
from klas_hf.anchors.loading import load_anchors
from klas_hf.budgets import Budget
from klas_hf.costs import Cost, Usage
from klas_hf.models import StitchedModel
from klas_hf.models.checkpoint_files import HUB_OPTIONS, explained_damage, load_whole, save_processor
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.models.replacing import WrittenWhole
from klas_hf.paths import Path, Stitch
from klas_hf.stitching.calibration import sampled
from klas_hf.stitching.loading import RANDOM_STITCH, fill_from
from klas_hf.stitching.supernet_budgets import best_path, path_costs, ranked
from klas_hf.stitching.supernet_joints import (
    check_directions,
    check_paths,
    costs_of,
    features_per_row,
    fit_supernet,
    shared_layers,
)

AnyPath = Path | Stitch | str | Sequence[int]


class StitchedSupernet(Publishable, WrittenWhole, PreTrainedModel):
    """Anchors and stitching layers that train together (SN-Net); base of the supernets of images and of text.

    `from_anchors` and `from_pretrained` of this class return the class for the task: a
    `StitchedSupernetForImageClassification` or a `StitchedSupernetForCausalLM`.

    Attributes:
        anchors: the models.
        joints: the stitching layers.

    Example:
        >>> paths = [(1, 2), "1[:1] 0[1:2] 1[2:]"]
        >>> supernet = StitchedSupernet.from_anchors([small, large], paths, calibration=images)
        >>> [str(path) for path in supernet.paths]  # the anchors, then the paths
        ['0[:]', '1[:]', '0[:1] 1[2:]', '1[:1] 0[1:2] 1[2:]']
        >>> pixels = images[0]["pixel_values"]
        >>> torch.equal(supernet.extract(paths[1])(pixels).logits, supernet(pixels, path=paths[1]).logits)
        True
        >>> alone = StitchedModel.from_anchors(small, large, (1, 2), calibration=images)
        >>> torch.allclose(alone(pixels).logits, supernet(pixels, path=Stitch(1, 2)).logits, atol=1e-4)
        True
    """

    config_class = StitchedSupernetConfig
    base_model_prefix = ""
    _supports_sdpa = True
    anchor_class: ClassVar[type[Anchor]]

    anchors: nn.ModuleList
    joints: nn.ModuleList
    # Of each anchor, or of the checkpoint that this was loaded from: where a tokenizer or image processor lies.
    processors_from: Sequence[tuple[str, dict[str, Any]] | None] = ()

    @classmethod
    def from_anchors(
        cls,
        anchors: Sequence[Any],
        paths: Iterable[AnyPath],
        *,
        calibration: Iterable[Any] | None = None,
        calibration_items: int | None = None,
        shared: Sequence[int] | None = None,
        ridge: float | None = None,
        image_size: int | tuple[int, int] | None = None,
        tokens: int = 128,
        revisions: Sequence[str | None] | None = None,
        **loading: Any,
    ) -> "StitchedSupernet":
        """Join anchors on many paths.

        Args:
            anchors: Hub ids, local folders or models, all image classifiers or all causal language models; they are
                read, never changed. Paths name them by position.
            paths: a selection of stitches, or any paths.
            calibration: batches of images (see `image_batches`) or token ids (`token_batches`) on which all stitching
                layers are fitted by least squares; None leaves them random, with a warning.
            calibration_items: how many sequences or images of it are read; None: 256, or as many more as make ten rows
                per feature.
            shared: a number per path of one joint; paths of one number share it (see `snnet_groups`). None: none do.
            ridge: penalty of the fits; None chooses (see `LeastSquares.solve`).
            image_size: pixels of the images, where the anchors' configurations are for different ones.
            tokens: length of the sequences that the costs of language models are counted for.
            revisions: of the anchors on the Hub.
            loading: of anchors named by Hub id or folder, as for `from_pretrained`: dtype, device_map, token, …; by
                themselves they lie on accelerate's device, in their checkpoints' dtype.

        Returns:
            The supernet in eval mode.

        Raises:
            ValueError: dense models, an anchor listed twice, different classes or vocabularies, anchors for text and
                for images, no paths, one listed twice, out of range, between different grids, a `Stitch` from a dearer
                anchor to a cheaper (a path may lead either way), or layers shared between widths.
        """
        given = list(paths)
        chosen = [Path.of(path) for path in given]
        loaded = load_anchors(anchors, revisions, **loading)
        if any(is_dense(one.model) for one in loaded):
            raise ValueError(
                "got dense models for a supernet; expected image classifiers or causal language models. Make each path "
                "by itself: StitchedModel.from_path"
            )
        kind = next(kind for kind in StitchedSupernet.__subclasses__() if kind.anchor_class is type(loaded[0]))
        check_paths(loaded, chosen)
        layers = shared_layers(loaded, chosen, shared)
        config = StitchedSupernetConfig(
            **{"anchor_configs": [copy.deepcopy(one.config) for one in loaded], "tokens": tokens}
            | kind._settings(loaded, chosen, image_size),
            paths=[str(path) for path in chosen],
            joint_of=layers,
            anchor_names=[one.path for one in loaded],
            anchor_revisions=[one.revision for one in loaded],
            architectures=[kind.__name__],
        )
        check_directions(costs_of(config), given)
        batches = None
        if calibration is not None:
            chosen_data = sampled(calibration, loaded[-1].read, features_per_row(loaded), calibration_items)
            batches = kind._usable(chosen_data, loaded)
        with torch.device("meta"):
            supernet = kind(config).eval()
        last = loaded[-1].model
        for model, one, named in zip(supernet.anchors, loaded, anchors, strict=True):
            fill_from(model, one.model, last.device, last.dtype, copied=not isinstance(named, str | os.PathLike))
        supernet.joints = supernet._made_joints().to(device=last.device, dtype=last.dtype).eval()
        commits = revisions or [None] * len(anchors)
        supernet.processors_from = [
            None if isinstance(one, PreTrainedModel) else (str(one), hub_options(loading, commit))
            for one, commit in zip(anchors, commits, strict=True)
        ]
        if batches is None:
            warnings.warn(RANDOM_STITCH, stacklevel=2)
            return supernet
        fit_supernet(supernet, loaded, batches, ridge)
        return supernet

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "StitchedSupernet":
        """Load a saved supernet; `StitchedSupernet` itself loads the class that the checkpoint names.

        Raises:
            ValueError: a checkpoint of something else.
        """
        if cls is not StitchedSupernet:
            loaded = load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            place = str(pretrained_model_name_or_path), {k: kwargs[k] for k in HUB_OPTIONS if k in kwargs}
            model.processors_from = [place] * len(model.anchors)
            return loaded
        hub = {k: kwargs[k] for k in (*HUB_OPTIONS, "subfolder") if k in kwargs}
        with explained_damage(pretrained_model_name_or_path, hub, []):
            read = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)[0]
            (name,) = getattr(kwargs.get("config"), "architectures", None) or read.get("architectures") or ["nothing"]
        by_name = {kind.__name__: kind for kind in cls.__subclasses__()}
        if name not in by_name:
            raise ValueError(
                f"got {str(pretrained_model_name_or_path)!r}, a checkpoint of {name!r}; expected a supernet, one of "
                f"{sorted(by_name)}. StitchedSupernet.from_anchors makes one"
            )
        return by_name[name].from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_processor(self, folder: str | os.PathLike) -> None:
        """Save the tokenizer or image processor of the last anchor, unless the folder has one."""
        for place in filter(None, self.processors_from[-1:]):
            save_processor(self.main_input_name, *place, folder)

    @classmethod
    @abstractmethod
    def _settings(
        cls, anchors: Sequence[Anchor], paths: Sequence[Path], image_size: int | tuple[int, int] | None
    ) -> dict[str, Any]:
        """Fields of the configuration that only this kind of data has, and ValueError where paths do not fit it."""

    @classmethod
    @abstractmethod
    def _usable(cls, calibration: Iterable[Any], anchors: Sequence[Anchor]) -> Iterable[Any]:
        """The batches, checked before long work."""

    @abstractmethod
    def _extracted(self, path: Path) -> StitchedModel: ...

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Every path: the anchors that a path uses, alone, then the paths that the supernet was made with."""
        made = [Path.parse(path) for path in self.config.paths]
        alone = [Path.parse(f"{place}[:]") for place in sorted({place for path in made for place in path.anchors})]
        return tuple(dict.fromkeys([*alone, *made]))

    @cached_property
    def path_costs(self) -> tuple[Cost, ...]:
        """What each path costs as a model of its own, in the order of `paths`; MACs are those of one image, or of one
        sequence of `config.tokens`."""
        return tuple(path_costs(self)[0].values())

    @cached_property
    def kept_costs(self) -> dict[Usage | None, tuple[dict[Path, Cost], Cost]]:
        """Of each usage that was asked for, the costs of the paths and of the dearest anchor."""
        return {}

    def best_path(self, budget: Budget | Cost | str | float, *, usage: Usage | None = None) -> Path:
        """The best of the supernet's paths within a budget: by `rank`, or else the one of most MACs.

        Args:
            budget: what it may cost (see `Budget.of`); a share is of the dearest anchor's MACs.
            usage: how it is run, for budgets in seconds or of quantised weights; parts are timed once.

        Raises:
            ValueError: no path is within it, or it is above the dearest anchor; the nearest are named.
        """
        return best_path(self, Budget.of(budget), usage)

    def rank(self, losses: Mapping[AnyPath, float]) -> None:
        """Keep in the configuration how good the paths are, by which `best_path` chooses.

        Args:
            losses: of every path, the anchors included: a loss, a functional KL or anything of which less is better.

        Raises:
            ValueError: a path without a number, or one that is not the supernet's.

        Example:
            >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), (2, 3)], calibration=batches)
            >>> rows = evaluate_supernet(supernet, batches, rule="mine", rows=RowFile(folder / "rows.jsonl", {}))
            >>> supernet.rank({row.path: row.metrics["loss"] for row in rows})
            >>> supernet.best_path("80%") in supernet.paths, len(supernet.config.ranking)
            (True, 4)
        """
        self.config.ranking = [str(path) for path in ranked(self, losses)]

    def get_input_embeddings(self) -> nn.Module:
        return self.anchors[0].get_input_embeddings()

    def anchor(self, place: int) -> Anchor:
        """The anchor at a `place`, read by blocks."""
        return self.read_anchors[place]

    def joints_of(self, path: AnyPath) -> list[nn.Module]:
        """The stitching layers that a `path` runs, in order.

        Raises:
            ValueError: the supernet has no such path.
        """
        path = self.check_path(path)
        return [self.joints[n] for n in self.config.joint_of[self.numbers[path]]] if path.joints else []

    def extract(self, path: AnyPath) -> StitchedModel:
        """The stitched model of one `path`, with a copy of its weights: what the supernet gives on that path.

        Raises:
            ValueError: the supernet has no such path.
        """
        path = self.check_path(path)
        model = self._extracted(path)
        if self.processors_from:
            model.processor_from = self.processors_from[path.slices[0].anchor]
        return model

    def check_path(self, path: AnyPath) -> Path:
        """A `path` in one form: of those that the supernet was made with, or an anchor alone.

        Raises:
            ValueError: there is no such path.
        """
        path = Path.of(path)
        known = list(self.numbers)
        if path not in known and not (path.joints == 0 and path.slices[0].anchor < len(self.anchors)):
            raise ValueError(
                f"got path {path}, which this supernet of {len(known)} paths was not made with; expected one of "
                f"{', '.join(map(str, known[:10]))}{' …' if len(known) > 10 else ''}, or an anchor alone, such as 0[:]"
            )
        return path

    def path_logits(self, path: AnyPath | None, inputs: Mapping[str, Any]) -> Tensor:
        """What one path answers; None is the last anchor.

        Args:
            inputs: of the anchors' own forward.
        """
        path = Path.parse(f"{len(self.anchors) - 1}[:]") if path is None else self.check_path(path)
        place, _, stop = self.bounds(path)[0]
        state = self.behind(path, self.anchor(place).front(inputs, stop), inputs, path.joints)
        return self.anchor(path.slices[-1].anchor).logits(state)

    def logits_of(self, paths: Sequence[Path], batch: Any) -> Iterator[Tensor]:
        """What each path answers to a batch; each anchor runs once for all paths that begin with it."""
        stops: dict[int, int] = {}
        for path in paths:
            place, _, stop = self.bounds(path)[0]
            stops[place] = max(stop, stops.get(place, 0))
        states = {place: self.anchor(place).states(batch, stop) for place, stop in stops.items()}
        for path in paths:
            place, _, stop = self.bounds(path)[0]
            state = self.behind(path, states[place][stop], batch.inputs, path.joints)
            yield self.anchor(path.slices[-1].anchor).logits(state)

    def behind(self, path: Path, state: Any, inputs: Mapping[str, Any], joints: int) -> Any:
        """The state on a path behind some of its joints and the slice that follows them.

        Args:
            path: one of the supernet's.
            state: what enters the first joint.
            inputs: of the anchors' own forward.
            joints: how many.
        """
        behind = list(zip(self.joints_of(path), self.bounds(path)[1:], strict=True))
        for joint, (place, start, stop) in behind[:joints]:
            state = self.anchor(place).run(joint(state), inputs, start, stop)
        return state

    def bounds(self, path: Path) -> list[tuple[int, int, int]]:
        """(anchor, start, stop) of every slice of a `path`."""
        return path.bounds([one.num_blocks for one in self.read_anchors])

    @cached_property
    def read_anchors(self) -> list[Anchor]:
        """The anchors, read by blocks."""
        return [self.anchor_class(model) for model in self.anchors]

    @cached_property
    def numbers(self) -> dict[Path, int]:
        """The place in the configuration of every path that the supernet was made with."""
        return {Path.parse(path): number for number, path in enumerate(self.config.paths)}

    def _joint_ends(self) -> list[tuple[int, int, int, int]]:
        """(anchor, stop) and (anchor, start) that every stitching layer leads from and to."""
        ends: dict[int, tuple[int, int, int, int]] = {}
        for path, number in self.numbers.items():
            for layer, (one, other) in zip(self.config.joint_of[number], pairwise(path.slices), strict=True):
                ends.setdefault(layer, (one.anchor, one.stop or 0, other.anchor, other.start))
        return [ends[layer] for layer in sorted(ends)]

    def _made_joints(self) -> nn.ModuleList:
        ends = self._joint_ends()
        return nn.ModuleList(self.anchor(a).joint(stop, self.anchor(b), start) for a, stop, b, start in ends)
