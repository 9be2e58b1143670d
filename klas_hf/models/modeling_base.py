"""What all stitched models are: made from anchors, saved with their code, loaded, published."""

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .checkpoint_files import HUB_OPTIONS, explained_damage, is_delta, load_whole, save_processor
from .configuration_stitched import StitchedConfig
from .replacing import WrittenWhole


class StitchedModel(WrittenWhole, PreTrainedModel):
    """Base of all stitched models; makes them from anchors (KLAS Sec. 5, SN-Net) and loads them.

    `from_anchors`, `from_path` and `from_pretrained` of this class return the class for the task: a
    `StitchedForCausalLM` for language models, a `StitchedForImageClassification` for image classifiers. Of dense models
    (Mask2Former, UperNet) the first two return transformers' own class on a `StitchedBackbone`, which loads itself.

    Example:
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
        >>> model.save_pretrained(folder)
        >>> again = StitchedModel.from_pretrained(folder)  # AutoModelForCausalLM loads it too
        >>> type(again).__name__, torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
        ('StitchedForCausalLM', True)
    """

    config_class = StitchedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: list[str] = ["past_key_values"]
    _fsdp_plan = {"joints.*": "keep_full_weight"}
    # Auto class → other class that loads the same checkpoint, for machines without klas_hf.
    carried_classes: ClassVar[dict[str, str]] = {}
    # What rooms above this one do, by name; klas_hf gives it. The code that a checkpoint carries has none.
    actions: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    # Where the tokenizer or image processor that is saved with the model lies: Hub id or folder, options of the Hub.
    processor_from: tuple[str, dict[str, Any]] | None = None
    # Patterns of what quantisers leave as it is: the stitching layers, and image classifiers' heads (they find an
    # unembedding by themselves).
    _keep_in_fp32_modules = [r"(model\.)?joints", r"slices\.\d+\.\w*classifier\w*"]

    @classmethod
    def from_anchors(
        cls, source: Any, target: Any, stitch: Any = None, *, budget: Any = None, **kwargs: Any
    ) -> "StitchedModel":
        """Join the first blocks of `source` to the last blocks of `target`, or take the best path within a budget.

        Args:
            source, target: Hub id, local folder or PreTrainedModel; the source is the cheaper one.
            stitch: `Stitch(i, j)` or `(i, j)`, or any path through the two.
            budget: in its place, what the model may cost: a share of the dearer anchor's MACs (0.6 or "60%"),
                parameters ("2B"), bytes of weights ("4 GB"), seconds per token as it will be run ("20 ms", with
                `usage`, a `Usage`), several of these ("4 GB, 20 ms") or a `Cost`. Paths of every kind are searched on
                the calibration data (`search_paths`) with the settings `search`, a `SearchConfig`; what was found is
                in the config, as `search`.
            kwargs: as for `from_path`; `source_revision` and `target_revision` are commits on the Hub.

        Raises:
            ValueError: not one of stitch and budget, a budget that no path meets, a stitch out of range, or anchors
                that do not fit each other or are in reversed order.
            OSError: an anchor cannot be reached.

        Example:
            >>> model = StitchedModel.from_anchors(
            ...     "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", stitch=(8, 14), calibration=batches
            ... )  # doctest: +SKIP
            >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
            >>> model.stitching_layers()
            [Linear(in_features=16, out_features=24, bias=True)]
            >>> model = StitchedModel.from_anchors(source, target, budget="70%", calibration=batches)
            >>> model.config.search["budget"], model.config.search["share"] <= 0.7
            ('70%', True)
        """
        return cls._action("stitch_anchors")(source, target, stitch, budget=budget, **kwargs)

    @classmethod
    def from_path(cls, anchors: Any, path: Any, **kwargs: Any) -> "StitchedModel":
        """The model of a path through anchors; see `klas_hf.stitching.assembly.assemble_path`.

        Args:
            anchors: Hub ids, local folders or PreTrainedModels; the path names them by position.
            path: `Path`, its text, or a `Stitch`.
            kwargs: `calibration` batches for the least-squares start of the stitching layers (None: random, with a
                warning), of which `calibration_items` sequences or images are read (None: 256, or as many more as make
                ten rows per feature); the `ridge` of the fits; `joint`: "least_squares"; "merged" into the blocks of
                one anchor, without layers; or how a rival joins these: "identity" (no layer), "linear_patch"
                or "cosine"; `dtype`, `device_map` and others of `from_pretrained`; `revisions` of the anchors on the
                Hub; `image_size` in pixels; of image classifiers `head`, the configuration of a dense model that they
                become the backbone of.

        Raises:
            ValueError: a path out of range, or anchors that do not fit each other.
            OSError: an anchor cannot be reached.

        Example:
            >>> model = StitchedModel.from_path([source, target], "1[:1] 1[2:3] 1[3:]", calibration=batches)
            >>> model.config.path, model.config.num_hidden_layers  # of 4 blocks, the second is a linear map
            ('1[:1] 1[2:3] 1[3:]', 3)
        """
        return cls._action("assemble_path")(anchors, path, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "StitchedModel":
        """Load a stitched checkpoint, whole or a delta; `StitchedModel` itself loads the class that it names.

        Raises:
            ValueError: not a stitched model, or written by a newer klas_hf.
            OSError: damaged, incomplete or pickled; a delta's anchors are not to be had, or others than they were.
        """
        name = pretrained_model_name_or_path
        if name is None:  # from tensors in memory
            return super().from_pretrained(name, *args, **kwargs)
        hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
        with explained_damage(name, hub, []):
            if cls is StitchedModel:
                return _named_class(name, **kwargs).from_pretrained(name, *args, **kwargs)
            if is_delta(name, **kwargs):
                loaded = cls._action("load_delta")(cls, name, *args, **kwargs)
            else:
                loaded = load_whole(super().from_pretrained, name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.processor_from = str(name), hub
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as any model of transformers, with the code that loads it where klas_hf is not installed.

        The tokenizer or image processor goes along, unless the folder has one: of the anchor that embeds, or of the
        checkpoint that this was loaded from, where that was on the Hub or in a folder. See `WrittenWhole` for the rest.
        """
        self.config.auto_map = vars(self.config).get("auto_map", {}) | self.carried_classes
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish the model at `repo_id` in one commit, with a card; `kwargs` as for `klas_hf.hub.publish`."""
        return self._action("publish")(self, repo_id, **kwargs)

    @classmethod
    def _action(cls, name: str) -> Callable[..., Any]:
        if not cls.actions:
            raise ImportError(
                "got the code that a checkpoint carries, which can use whole stitched checkpoints only; expected "
                "klas_hf for anchors, deltas and the Hub. Install it (pip install klas_hf) and import it before "
                "loading, or merge the delta where it is installed"
            )
        return cls.actions[name]

    def save_processor(self, folder: str | os.PathLike) -> None:
        """Save the tokenizer or image processor that goes with the model, if there is one and the folder has none."""
        if self.processor_from is not None:
            save_processor(self.main_input_name, *self.processor_from, folder)

    def stitching_layers(self) -> list[nn.Module]:
        """The linear layer of every joint; none where joints are identities."""
        return [joint for joint in self.base_model.joints if not isinstance(joint, nn.Identity)]

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """What is loaded in another dtype than asked for: not what is only kept from quantisers."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name not in StitchedModel._keep_in_fp32_modules}

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the 2D `attention_mask` as it is: each slice makes its own 4D masks from its own part of the cache.

        Args:
            attention_mask: `(batch, tokens)`, 0 at padding.
            kwargs: what transformers passes beside it.
        """
        return attention_mask


def _named_class(name: Any, config: PreTrainedConfig | None = None, **kwargs: Any) -> type[StitchedModel]:
    """The class that a checkpoint names."""
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    architectures = (config or AutoConfig.from_pretrained(name, **hub)).architectures
    by_name = {kind.__name__: kind for kind in _descendants(StitchedModel)}
    (named,) = architectures or ["nothing"]
    if named not in by_name:
        raise ValueError(
            f"got {str(name)!r}, a checkpoint of {named!r}; expected a stitched model, one of {sorted(by_name)}. Load "
            "other models with their own class"
        )
    return by_name[named]


def _descendants(kind: type[StitchedModel]) -> list[type[StitchedModel]]:
    return [one for child in kind.__subclasses__() for one in (child, *_descendants(child)) if one.__name__[0] != "_"]


_PLANS = ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan")
_NAMES = (
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_load_missing",
)


class Slices(nn.ModuleList):
    """Models in a list that hands on what transformers asks a model's direct children for."""

    def __getattr__(self, name: str) -> Any:
        if name in _PLANS:  # looked up with all numbers replaced by stars
            return {f"*.{key}": value for part in self for key, value in (getattr(part, name, None) or {}).items()}
        if name in _NAMES:
            return set().union(*(getattr(part, name, None) or () for part in self))
        return super().__getattr__(name)
