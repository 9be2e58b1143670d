"""Stitched models: native transformers models, each cut to a slice of its blocks, joined by linear stitching layers.

    tokens ─► embedding ─► slice 0 ─► joint 0 ─► slice 1 ─► … ─► last slice ─► its norm and head

Each slice is a model of its own family running its own forward, so masks, rotary embeddings and kernels are the
family's. All slices keep their keys and values in one cache: each sees the part that holds its own layers, and so its
own length, though `layer_idx` counts on from slice to slice.
"""

import os
from collections.abc import Callable, Mapping
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .checkpoint_files import HUB_OPTIONS, is_delta, load_whole, replacing
from .configuration_stitched import StitchedConfig


class StitchedModel(PreTrainedModel):
    """Base of all stitched models; makes them from anchors (KLAS Sec. 5, SN-Net) and loads them.

    `from_anchors`, `from_path` and `from_pretrained` of this class return the class for the task: a
    `StitchedForCausalLM` for language models, a `StitchedForImageClassification` for image classifiers.

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
    # Patterns of what quantisers leave as it is: the stitching layers, and image classifiers' heads (they find an
    # unembedding by themselves).
    _keep_in_fp32_modules = [r"(model\.)?joints", r"slices\.\d+\.\w*classifier\w*"]

    @classmethod
    def from_anchors(cls, source: Any, target: Any, stitch: Any, **kwargs: Any) -> "StitchedModel":
        """Join the first blocks of `source` to the last blocks of `target`: `from_path` for two anchors.

        Args:
            source, target: Hub id, local folder or PreTrainedModel; the source is the cheaper one.
            stitch: `Stitch(i, j)` or `(i, j)`, or any path through the two.
            kwargs: as for `from_path`; `source_revision` and `target_revision` are commits on the Hub.

        Raises:
            ValueError: a stitch out of range, or anchors that do not fit each other or are in reversed order.
            OSError: an anchor cannot be reached.

        Example:
            >>> model = StitchedModel.from_anchors(
            ...     "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", stitch=(8, 14), calibration=batches
            ... )  # doctest: +SKIP
            >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
            >>> model.stitching_layers()
            [Linear(in_features=16, out_features=24, bias=True)]
        """
        return cls._action("stitch_anchors")(source, target, stitch, **kwargs)

    @classmethod
    def from_path(cls, anchors: Any, path: Any, **kwargs: Any) -> "StitchedModel":
        """The model of a path through anchors; see `klas_hf.stitching.assembly.assemble_path`.

        Args:
            anchors: Hub ids, local folders or PreTrainedModels; the path names them by position.
            path: `Path`, its text, or a `Stitch`.
            kwargs: `calibration` batches for the least-squares start of the stitching layers (None: random, with a
                warning), their `ridge`; `dtype`, `device_map` and others of `from_pretrained`; `revisions` of the
                anchors on the Hub; `image_size` in pixels.

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
        if cls is StitchedModel:
            return _named_class(name, **kwargs).from_pretrained(name, *args, **kwargs)
        if is_delta(name, **kwargs):
            return cls._action("load_delta")(cls, name, *args, **kwargs)
        return load_whole(super().from_pretrained, name, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as any model of transformers, with the code that loads it where klas_hf is not installed.

        A checkpoint that the folder holds stays as it is until the new one is written whole, but for a
        `distributed_checkpoint`, which all processes write in place.

        Raises:
            ValueError: `state_dict` with `push_to_hub`.
        """
        if push_to_hub and state_dict is not None:
            raise ValueError(
                "got state_dict and push_to_hub; expected one of them, as what is pushed is the model's own tensors. "
                "Save first, then upload the folder (huggingface_hub.upload_folder)"
            )
        self.config.auto_map = vars(self.config).get("auto_map", {}) | self.carried_classes
        if kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        with replacing(save_directory, kwargs.get("variant")) as part:
            super().save_pretrained(part, is_main_process, state_dict, **kwargs)
        if push_to_hub:
            names = (
                "commit_message",
                "commit_description",
                "private",
                "token",
                "revision",
                "create_pr",
                "max_shard_size",
            )
            options = {name: kwargs[name] for name in names if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **options)

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

    def stitching_layers(self) -> list[nn.Module]:
        """The linear layer of every joint."""
        return list(self.base_model.joints)

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
            f"got a checkpoint of {named!r}; expected a stitched model, one of {sorted(by_name)}. Load other models "
            "with their own class"
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


class StitchedTextModel(StitchedModel):
    """A stitched decoder without its head: token ids to the last slice's last hidden states."""

    _auto_class = "AutoModel"

    def __init__(self, config: StitchedConfig):
        super().__init__(config)
        self.slices = Slices(AutoModel.from_config(one) for one in config.slice_configs)
        widths = [one.hidden_size for one in config.slice_configs]
        self.joints = nn.ModuleList(nn.Linear(*ends, bias=config.joint_bias) for ends in pairwise(widths))
        for part, norm in zip(self.slices[:-1], config.slice_norms or (), strict=False):
            part.set_submodule(norm, nn.Identity())
        self.layer_bounds = list(pairwise([0, *accumulate(one.num_hidden_layers for one in config.slice_configs)]))
        for part, (first, _) in zip(self.slices[1:], self.layer_bounds[1:], strict=True):
            part.set_input_embeddings(None)
            for module in part.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx += first
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.slices[0].get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.slices[0].set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the slices.

        Args:
            input_ids: `(batch, tokens)`; or `inputs_embeds`: `(batch, tokens, first slice's width)`.
            attention_mask: `(batch, past + tokens)`, 0 at padding.
            past_key_values: one cache for all slices, in their order.

        Returns:
            last_hidden_state `(batch, tokens, last slice's width)`. `hidden_states` holds the input of every block and
            then the normed output; its width may change at a joint.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        common = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **kwargs}
        given: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        outputs: list[Any] = []
        for number, (part, layers) in enumerate(zip(self.slices, self.layer_bounds, strict=True)):
            if number:
                given = {"inputs_embeds": self.joints[number - 1](outputs[-1].last_hidden_state)}
            cache = _slice_cache(past_key_values, *layers, self.config)
            outputs.append(part(past_key_values=cache, return_dict=True, **given, **common))
        last = outputs[-1]
        states = None if last.hidden_states is None else [one.hidden_states[:-1] for one in outputs]
        attentions = None if last.attentions is None else [one.attentions for one in outputs]
        output = BaseModelOutputWithPast(
            last_hidden_state=last.last_hidden_state,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else (*chain.from_iterable(states), last.hidden_states[-1]),
            attentions=None if attentions is None else tuple(chain.from_iterable(attentions)),
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class StitchedForCausalLM(StitchedModel, GenerationMixin):
    """A stitched language model: generates, saves, loads and trains as any causal LM of transformers.

    Args:
        config: `StitchedModel.from_anchors` makes it, and the model.

    Example:
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
        >>> output = model(**batches[0])  # logits (batch, tokens, vocabulary), loss in nats per token
        >>> output.logits.shape, output.loss.isfinite().item()
        (torch.Size([4, 16, 64]), True)
        >>> model.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape
        torch.Size([1, 5])
    """

    _auto_class = "AutoModelForCausalLM"
    carried_classes = {
        "AutoModel": "modeling_stitched.StitchedTextModel",
        # `transformers serve` takes classes from transformers by name, unless this one has an entry.
        "AutoModelForDecision": "modeling_stitched.StitchedForCausalLM",
    }

    _fsdp_plan = {"model.joints.*": "keep_full_weight", "lm_head": "keep_full_weight"}

    def __init__(self, config: StitchedConfig):
        super().__init__(config)
        self.model = StitchedTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Next-token logits, and their cross-entropy where labels are given.

        Args:
            input_ids: `(batch, tokens)`.
            labels: `(batch, tokens)` token ids, -100 where no loss is taken; they are shifted here.
            logits_to_keep: only the last so many positions (0: all), or their indices.

        Returns:
            logits `(batch, kept tokens, vocabulary)`, loss in nats per token.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept, :]
        logits = scale_logits(self.lm_head(hidden), self.config.slice_configs[-1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching (`generate_batch`), whose cache holds one shape of keys and values for all layers.

        Raises:
            ValueError: the slices differ in it, or in their sliding windows.
        """
        shapes, windows = self.config.kv_shapes(), self.config.sliding_windows()
        if len(shapes) > 1 or len(windows) > 1:
            raise ValueError(
                f"got layers with (KV heads, head width) of {sorted(shapes)} and sliding windows of {sorted(windows)} "
                "tokens; continuous batching needs one of each for all layers. Use generate, which has no such limit"
            )
        return super().init_continuous_batching(*args, **kwargs)


def scale_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What some families do to their logits: Granite divides, Cohere multiplies, Gemma 2 caps."""
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


class _CacheSlice(Cache):
    """The layers of one slice inside the cache of all: own lengths and masks, shared storage."""

    def __init__(self, parent: Cache, start: int, stop: int):
        super().__init__(layers=parent.layers[start:stop])
        self.parent = parent

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.parent.update(key_states, value_states, layer_idx, *args, **kwargs)


def _slice_cache(cache: Cache | None, start: int, stop: int, config: StitchedConfig) -> Cache | None:
    if cache is None:
        return None
    if not cache.layers:  # DynamicCache() without a config makes its layers one by one, too late for a slice
        cache.layers.extend(DynamicCache(config=config).layers)
    return _CacheSlice(cache, start, stop)
