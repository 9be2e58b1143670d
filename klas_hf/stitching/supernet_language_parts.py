"""Supernets of causal language models: from anchors, and their paths as models."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.checkpoints import DecoderCheckpoint
from klas_hf.anchors.decoder_parts import decoder_front
from klas_hf.anchors.language import captured_outputs, load_anchor
from klas_hf.anchors.vocabularies import check_vocabularies
from klas_hf.anchors.weights import evaluating
from klas_hf.costs import measure_stitch_costs
from klas_hf.maths.least_squares import LinearFit
from klas_hf.models import StitchedForCausalLM
from klas_hf.models.configuration_supernet import StitchedSupernetConfig
from klas_hf.paths import Stitch
from klas_hf.stitching.language import generation_config_of, stitched_config, stitched_state, usable_batches
from klas_hf.stitching.loading import load_parts
from klas_hf.stitching.supernet import note_origin
from klas_hf.stitching.supernet_language import StitchedSupernetForCausalLM
from klas_hf.stitching.supernets import SupernetParts


class LanguageParts(SupernetParts):
    """Causal language models that are to be joined."""

    def __init__(self, anchors: Sequence[Any], tokens: int):
        self.anchors = [load_anchor(anchor) for anchor in anchors]
        self.tokens = tokens
        self.models = [anchor.model for anchor in self.anchors]
        self.names = [anchor.path for anchor in self.anchors]
        self.revisions = [anchor.revision for anchor in self.anchors]

    def check(self, stitches: Sequence[Stitch]) -> None:
        seen: dict[str, str] = {}
        for anchor in self.anchors:
            if anchor.fingerprint in seen:
                raise ValueError(f"got the anchor {anchor.name} twice; expected different anchors. List each one once")
            seen[anchor.fingerprint] = anchor.name
        for source, target in sorted({(stitch.source, stitch.target) for stitch in stitches}):
            first, last = self.anchors[source], self.anchors[target]
            check_vocabularies(first.path, first.config, last.path, last.config)
            measure_stitch_costs(first.config, last.config, tokens=self.tokens).check_direction()
        for stitch in stitches:
            stitch.check(*(self.anchors[place].num_blocks for place in (stitch.source, stitch.target)))

    def settings(self) -> dict[str, Any]:
        last = self.models[-1].config
        return {
            "tokens": self.tokens,
            "generation_configs": [model.generation_config.to_diff_dict() for model in self.models],
            "bos_token_id": last.bos_token_id,
            "eos_token_id": last.eos_token_id,
            "pad_token_id": last.pad_token_id,
            "tie_word_embeddings": False,
            "architectures": [StitchedSupernetForCausalLM.__name__],
        }

    def empty(self, config: StitchedSupernetConfig) -> StitchedSupernetForCausalLM:
        return StitchedSupernetForCausalLM(config)

    def widths(self, place: int) -> list[int]:
        anchor = self.anchors[place]
        return [anchor.width] * (anchor.num_blocks + 1)

    def usable(self, calibration: Iterable[Any], stitches: Sequence[Stitch]) -> Iterable[Any]:
        return usable_batches(calibration, self._bos)

    def batches(self, calibration: Iterable[Any]) -> Iterable[Any]:
        return token_batches(calibration)

    def states(self, place: int, batch: TokenBatch, stop: int) -> list[Tensor]:
        anchor = self.anchors[place]
        inputs = {
            "input_ids": batch.input_ids.to(anchor.device),
            "attention_mask": batch.attention_mask.to(anchor.device),
            "use_cache": False,
        }
        front, embedding = decoder_front(anchor, stop), decoder_front(anchor, 0)
        with evaluating(front), captured_outputs(anchor.blocks[:stop]) as outputs:
            front(**inputs)
            return [embedding(**inputs).last_hidden_state, *outputs]

    def rows(
        self, pair: tuple[int, int], states: tuple[list[Tensor], list[Tensor]], batch: TokenBatch
    ) -> tuple[list[Tensor], list[Tensor]]:
        counted, device = batch.counted(self._bos), self.anchors[pair[0]].device
        source, target = ([h[counted.to(h.device)].to(device) for h in side] for side in states)
        return source, target

    def set_layer(self, layer: Any, fit: LinearFit) -> None:
        with torch.no_grad():
            layer.weight.copy_(fit.weight)
            layer.bias.copy_(fit.bias)

    @property
    def _bos(self) -> int | None:
        return self.models[-1].config.bos_token_id


def extract_decoder(supernet: StitchedSupernetForCausalLM, stitch: Stitch) -> StitchedForCausalLM:
    """The stitched model of one of a supernet's stitches, with a copy of its weights."""
    anchors = {place: DecoderCheckpoint(supernet.anchors[place]) for place in stitch.path.anchors}
    config = stitched_config(anchors, stitch.path, len(supernet.anchors))
    note_origin(config, supernet, stitch)
    state = stitched_state(anchors, config)
    layer = supernet.layer_of(stitch).state_dict()
    state |= {f"model.joints.0.{name}": tensor.detach().clone() for name, tensor in layer.items()}
    model = load_parts(StitchedForCausalLM, config, state, dtype=supernet.dtype)
    model.generation_config = generation_config_of(anchors[stitch.target])
    return model.to(supernet.device).eval()
