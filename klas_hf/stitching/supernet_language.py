"""Supernets of causal language models.

A path's two halves are decoders of their own that share the anchors' blocks, so masks and rotary embeddings are the
family's, as in a stitched model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from klas_hf.anchors.decoder_parts import decoder_front, decoder_rear
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.models import StitchedForCausalLM
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.paths import Stitch
from klas_hf.stitching.supernet import Path, StitchedSupernet


class StitchedSupernetForCausalLM(StitchedSupernet):
    """Causal language models and stitching layers that train together. It does not generate: `extract` a path.

    Args:
        config: `StitchedSupernet.from_anchors` makes it, and the model.

    Example:
        >>> supernet = StitchedSupernet.from_anchors([source, target], [(1, 2), (2, 1)], calibration=batches)
        >>> supernet(**batches[0], path=Stitch(2, 1)).logits.shape
        torch.Size([4, 16, 64])
        >>> supernet.extract((2, 1)).generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape
        torch.Size([1, 5])
    """

    main_input_name = "input_ids"

    def __init__(self, config: StitchedSupernetConfig):
        super().__init__(config)
        self.anchors = nn.ModuleList(
            AutoModelForCausalLM.from_config(one, dtype=torch.get_default_dtype()) for one in config.anchor_configs
        )
        for anchor, settings in zip(self.anchors, config.generation_configs or [], strict=False):
            anchor.generation_config = GenerationConfig(**settings)
        self.stitches = nn.ModuleList(
            nn.Linear(*(config.anchor_configs[place].hidden_size for place in (stitch.source, stitch.target)))
            for stitch in self.ends_of_layers()
        )
        self.loss_type = "ForCausalLM"  # transformers would go by the name of the class
        self._parts: dict[tuple[int, int, str], PreTrainedModel] = {}
        self.post_init()
        # transformers looks for tied embeddings among the children, not among theirs.
        self.all_tied_weights_keys.update(self.get_expanded_tied_weights_keys(all_submodels=True))
        self.supports_gradient_checkpointing = all(anchor.supports_gradient_checkpointing for anchor in self.anchors)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        path: Path | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """Next-token logits of one path, and their cross-entropy where labels are given. No cache is kept.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: `(batch, tokens)`, 0 at padding.
            labels: `(batch, tokens)` token ids, -100 where no loss is taken; they are shifted here.
            path: position of an anchor, or a stitch; None takes the last anchor.
        """
        path = len(self.anchors) - 1 if path is None else path
        self.check_path(path)
        inputs = {"attention_mask": attention_mask, "use_cache": False, **kwargs}
        if isinstance(path, Stitch):
            front = self._part(path.source, path.source_stop, "front")
            hidden = front(input_ids=input_ids, **inputs).last_hidden_state
            logits = self.rear_logits(path, hidden, **inputs)
        else:
            logits = self.anchors[path](input_ids=input_ids, **inputs).logits
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutput(loss=loss, logits=logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def rear_logits(self, stitch: Stitch, hidden: Tensor, **inputs: Any) -> Tensor:
        """Logits `(batch, tokens, vocabulary)` from the source's hidden states at a stitch.

        Args:
            stitch: one of the supernet's.
            hidden: `(batch, tokens, source width)` output of the stitch's last source block.
            inputs: `attention_mask` and other inputs of the target's decoder.
        """
        rear = self._part(stitch.target, stitch.target_start, "rear")
        moved = self.layer_of(stitch)(hidden)
        return self.anchor(stitch.target).head(rear(inputs_embeds=moved, **inputs).last_hidden_state)

    def anchor(self, place: int) -> LanguageAnchor:
        """The anchor at a `place`, read by blocks."""
        return LanguageAnchor(self.anchors[place])

    def _part(self, place: int, block: int, side: str) -> PreTrainedModel:
        """A half of an anchor, which shares its modules; made once, and no module of this one."""
        if (place, block, side) not in self._parts:
            make = decoder_front if side == "front" else decoder_rear
            self._parts[place, block, side] = make(self.anchor(place), block)
        part = self._parts[place, block, side]
        part.training = self.training  # its blocks are the anchors', whose modes are set with this module's
        return part

    def _extracted(self, stitch: Stitch) -> StitchedForCausalLM:
        from klas_hf.stitching.supernet_language_parts import extract_decoder

        return extract_decoder(self, stitch)
