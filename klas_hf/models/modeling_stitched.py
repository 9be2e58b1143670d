"""Stitched models: native transformers models, each cut to a slice of its blocks, joined by linear stitching layers.

    tokens ─► embedding ─► slice 0 ─► joint 0 ─► slice 1 ─► … ─► last slice ─► its norm and head

Each slice is a model of its own family running its own forward, so masks, rotary embeddings and kernels are the
family's. All slices keep their keys and values in one cache: each sees the part that holds its own layers, and so its
own length, though `layer_idx` counts on from slice to slice.
"""

from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_stitched import StitchedConfig
from .modeling_base import Slices, StitchedModel
from .vllm_attention import VLLM, prepare_attention


class StitchedTextModel(StitchedModel):
    """A stitched decoder without its head: token ids to the last slice's last hidden states."""

    _auto_class = "AutoModel"

    def __init__(self, config: StitchedConfig):
        super().__init__(config)
        self.slices = Slices(AutoModel.from_config(one) for one in config.slice_configs)
        widths = [one.hidden_size for one in config.slice_configs]
        self.joints = nn.ModuleList(
            nn.Identity() if config.identity_joints else nn.Linear(*ends, bias=config.joint_bias)
            for ends in pairwise(widths)
        )
        for part, norm in zip(self.slices[:-1], config.slice_norms or (), strict=False):
            part.set_submodule(norm, nn.Identity())
        self.layer_bounds = list(pairwise([0, *accumulate(one.num_hidden_layers for one in config.slice_configs)]))
        for part, (first, _) in zip(self.slices[1:], self.layer_bounds[1:], strict=True):
            part.set_input_embeddings(None)
            for module in part.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx += first
        if config._attn_implementation == VLLM:
            prepare_attention(config, self.slices)
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
            hidden_states=None if states is None else (*chain.from_iterable(states), last.last_hidden_state),
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
        embedding = {module: name for name, module in self.named_modules()}[self.get_input_embeddings()]
        # What transformers ties where the configuration says so; families differ in the embedding's name.
        self._tied_weights_keys = {"lm_head.weight": f"{embedding}.weight"}
        self.post_init()
        if config.tie_word_embeddings:  # tensor parallelism cuts the embedding by rows of the vocabulary
            self._tp_plan = {**self.tp_plan, "lm_head": "colwise_gather_output"}

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
