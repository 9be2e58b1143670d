"""Supernets of causal language models.

A path's slices are decoders of their own that share the anchors' blocks, so masks and rotary embeddings are the
family's, as in a stitched model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_outputs import CausalLMOutput

from klas_hf.anchors.anchor import Anchor
from klas_hf.anchors.checkpoints import DecoderCheckpoint
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.models import StitchedForCausalLM
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.paths import Path
from klas_hf.stitching.language import generation_config_of, stitched_config, stitched_state, usable_batches
from klas_hf.stitching.loading import load_parts
from klas_hf.stitching.supernet import AnyPath, StitchedSupernet, note_origin


class StitchedSupernetForCausalLM(StitchedSupernet):
    """Causal language models and stitching layers that train together. It does not generate: `extract` a path.

    Args:
        config: `StitchedSupernet.from_anchors` makes it, and the model.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), "1[:1] 1[3:]"], calibration=batches)
        >>> supernet(**batches[0], path=Stitch(1, 2)).logits.shape
        torch.Size([4, 16, 64])
        >>> supernet.extract("1[:1] 1[3:]").generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape
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

    def _extracted(self, path: Path) -> StitchedForCausalLM:
        anchors = {place: DecoderCheckpoint(self.anchors[place]) for place in path.anchors}
        config = stitched_config(anchors, path, len(self.anchors))
        note_origin(config, self, path)
        state = stitched_state(anchors, config)
        for number, joint in enumerate(self.joints_of(path)):
            state |= {f"model.joints.{number}.{name}": t.detach().clone() for name, t in joint.state_dict().items()}
        model = load_parts(StitchedForCausalLM, config, state, dtype=self.dtype)
        model.generation_config = generation_config_of(anchors[path.slices[-1].anchor])
        return model.to(self.device).eval()
