"""Supernets of causal language models.

A path's slices are decoders of their own that share the anchors' blocks, so masks and rotary embeddings are the
family's, as in a stitched model.
"""

from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_outputs import CausalLMOutput

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.checkpoints import DecoderCheckpoint
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.budgets import Budget
from klas_hf.costs import Cost, Usage
from klas_hf.models import StitchedForCausalLM
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.paths import Path
from klas_hf.stitching.language import generation_config_of, stitched_config, stitched_state, usable_batches
from klas_hf.stitching.loading import load_parts
from klas_hf.stitching.prefixes import PrefixCache
from klas_hf.stitching.supernet import AnyPath, StitchedSupernet
from klas_hf.stitching.supernet_generation import check_length, generate_with_prefixes
from klas_hf.stitching.supernet_joints import note_origin

_MAKING = Lock()  # while it makes a model, transformers changes settings that are the process's


class StitchedSupernetForCausalLM(StitchedSupernet):
    """Causal language models and stitching layers that train together, and generate on any path.

    Args:
        config: `StitchedSupernet.from_anchors` makes it, and the model.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), "1[:1] 1[3:]"], calibration=batches)
        >>> supernet(**batches[0], path=Stitch(1, 2)).logits.shape
        torch.Size([4, 16, 64])
        >>> supernet.generate(torch.tensor([[5, 6]]), budget="60%", max_new_tokens=3).shape
        torch.Size([1, 5])
    """

    main_input_name = "input_ids"
    anchor_class = LanguageAnchor

    def __init__(self, config: StitchedSupernetConfig):
        super().__init__(config)
        self.anchors = nn.ModuleList(
            AutoModelForCausalLM.from_config(one, dtype=torch.get_default_dtype()) for one in config.anchor_configs
        )
        for anchor, settings in zip(self.anchors, config.generation_configs or [], strict=False):
            anchor.generation_config = GenerationConfig(**settings)
        self.joints = self._made_joints()
        self.loss_type = "ForCausalLM"  # transformers would go by the name of the class
        self.post_init()
        self._path_models: dict[Path, StitchedForCausalLM] = {}
        self._path_tensors: tuple[int, ...] = ()
        # transformers looks for tied embeddings among the children, not among theirs.
        self.all_tied_weights_keys.update(self.get_expanded_tied_weights_keys(all_submodels=True))
        self.supports_gradient_checkpointing = all(anchor.supports_gradient_checkpointing for anchor in self.anchors)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        path: AnyPath | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """Next-token logits of one path, and their cross-entropy where labels are given. No cache is kept.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: `(batch, tokens)`, 0 at padding.
            labels: `(batch, tokens)` token ids, -100 where no loss is taken; they are shifted here.
            path: one of the supernet's; None takes the last anchor.
        """
        logits = self.path_logits(path, {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs})
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutput(loss=loss, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @classmethod
    def _settings(cls, anchors: Sequence[Anchor], paths: Sequence[Path], image_size: Any) -> dict[str, Any]:
        last = anchors[-1].config
        return {
            "generation_configs": [one.model.generation_config.to_diff_dict() for one in anchors],
            "bos_token_id": last.bos_token_id,
            "eos_token_id": last.eos_token_id,
            "pad_token_id": last.pad_token_id,
            "tie_word_embeddings": False,
        }

    @classmethod
    def _usable(cls, calibration: Iterable[Any], anchors: Sequence[Anchor]) -> Iterable[Any]:
        return usable_batches(calibration, anchors[-1].config.bos_token_id)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        path: AnyPath | None = None,
        budget: Budget | Cost | str | float | None = None,
        usage: Usage | None = None,
        prefixes: PrefixCache | None = None,
        **options: Any,
    ) -> Any:
        """Continue prompts on one path, as `generate` of the model that `extract` gives does.

        Args:
            inputs: `(batch, tokens)`; or `input_ids` among the options.
            path: one of the supernet's; without it and a budget, the last anchor.
            budget: in its place, what the path may cost; see `best_path`.
            usage: how it is run, for budgets in seconds.
            prefixes: what earlier requests have read and this one need not (see `PrefixCache`).
            options: of transformers' `generate`.

        Raises:
            ValueError: a path and a budget, an unknown path, a budget that no path meets, a prompt longer than one of
                the path's anchors reads, or prefixes with more than one sequence.

        Example:
            >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), (2, 3)], calibration=batches)
            >>> ids = batches[0]["input_ids"]
            >>> words = supernet.generate(ids, path=(1, 2), max_new_tokens=5)
            >>> torch.equal(words, supernet.extract((1, 2)).generate(ids, max_new_tokens=5))
            True
        """
        if path is not None and budget is not None:
            raise ValueError(f"got path={path} and budget={budget!r}; expected one of them")
        if budget is not None:
            chosen = self.best_path(budget, usage=usage)
        else:
            chosen = self.check_path(f"{len(self.anchors) - 1}[:]" if path is None else path)
        ids = options.pop("input_ids", inputs)
        if ids is None:
            raise ValueError("got no prompt; expected token ids (batch, tokens), as inputs or input_ids")
        model = self.path_model(chosen)
        check_length(model, ids.shape[1])
        if prefixes is None:
            return model.generate(ids, **options)
        return generate_with_prefixes(self, chosen, ids, prefixes, **options)

    def path_model(self, path: AnyPath) -> StitchedForCausalLM:
        """The model of one `path` on the supernet's own weights: for other ways to generate, or as a draft.

        It is made once, and anew where the supernet's tensors are others (`to`, `load_state_dict(assign=True)`). What
        is written to it is written to the supernet.

        Example:
            >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), (2, 3)], calibration=batches)
            >>> draft, ids = supernet.path_model((1, 2)), torch.tensor([[5, 6]])
            >>> supernet.generate(ids, assistant_model=draft, max_new_tokens=3).shape
            torch.Size([1, 5])
        """
        path = self.check_path(path)
        tensors = tuple(one.data_ptr() for one in self.parameters())
        with _MAKING:
            if tensors != self._path_tensors:
                self._path_models.clear()
                self._path_tensors = tensors
            if path not in self._path_models:
                self._path_models[path] = self._model_of(path, shared=True)
            return self._path_models[path]

    def _extracted(self, path: Path) -> StitchedForCausalLM:
        return self._model_of(path, shared=False)

    def _model_of(self, path: Path, shared: bool) -> StitchedForCausalLM:
        """The model of a path, with tensors of its own or the supernet's."""
        anchors = {place: DecoderCheckpoint(self.anchors[place], shared=shared) for place in path.anchors}
        config = stitched_config(anchors, path, len(self.anchors))
        note_origin(config, self, path)
        state = stitched_state(anchors, config)
        for number, joint in enumerate(self.joints_of(path)):
            layer = {f"model.joints.{number}.{name}": tensor.detach() for name, tensor in joint.state_dict().items()}
            state |= layer if shared else {name: tensor.clone() for name, tensor in layer.items()}
        device_map = None if self.device.type == "cpu" else {"": self.device}
        model = load_parts(StitchedForCausalLM, config, dict(state), dtype=self.dtype, device_map=device_map)
        if shared:  # whatever transformers has made of them
            for name, parameter in model.named_parameters():
                parameter.data = state[name]
        model.generation_config = generation_config_of(anchors[path.slices[-1].anchor])
        return model.eval()
