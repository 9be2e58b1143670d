"""Stitching two causal language models, reading only the tensors that are used."""

import copy
import re
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.checkpoints import DecoderCheckpoint
from klas_hf.anchors.decoder_parts import cut_config
from klas_hf.anchors.families import DecoderFamily
from klas_hf.anchors.language import HUB_OPTIONS
from klas_hf.anchors.vocabularies import check_vocabularies
from klas_hf.anchors.weights import evaluating
from klas_hf.maths.least_squares import LeastSquares, LinearFit
from klas_hf.models import StitchedConfig, StitchedForCausalLM
from klas_hf.paths import Stitch
from klas_hf.processes import progress, shared_out, sum_over_processes
from klas_hf.stitching.loading import RANDOM_STITCH, load_parts, with_revision


def stitch_decoders(
    source: str | Path | PreTrainedModel,
    target: str | Path | PreTrainedModel,
    stitch: Stitch,
    *,
    calibration: Iterable[Any] | None = None,
    ridge: float | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    source_revision: str | None = None,
    target_revision: str | None = None,
    **kwargs: Any,
) -> StitchedForCausalLM:
    """Join two causal language models; see `stitch_anchors`.

    The two configurations are cut to the kept blocks, the tensors of those blocks are renamed (a block's number changes
    with the cut), and transformers loads them as it would any checkpoint: no other tensor is read. The model gets the
    target's generation config.
    """
    hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
    with ExitStack() as files:
        first = files.enter_context(DecoderCheckpoint(source, **with_revision(hub, source_revision)))
        last = files.enter_context(DecoderCheckpoint(target, **with_revision(hub, target_revision)))
        _check_pair(first, last, stitch, hub)
        config = stitched_config(first, last, stitch)
        batches = None if calibration is None else usable_batches(calibration, config.bos_token_id)
        loading = {"dtype": last.dtype if dtype in (None, "auto") else dtype, "device_map": device_map}
        options = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        state = stitched_state(first, last, stitch, config)
        model = load_parts(StitchedForCausalLM, config, state, **loading, **options)
        model.generation_config = target_generation_config(last)
        if batches is None:
            warnings.warn(RANDOM_STITCH, stacklevel=4)
        else:
            prefix = _target_prefix(last, stitch, **loading)
            fit = fit_stitch(model.model.source, prefix, batches, config.bos_token_id, ridge)
            set_stitch(model, fit)
    return model.eval()


def stitched_config(first: DecoderCheckpoint, last: DecoderCheckpoint, stitch: Stitch) -> StitchedConfig:
    """The configuration of the stitched model of two anchors."""
    source_config = cut_config(first.config, 0, stitch.source_stop)
    target_config = cut_config(last.config, stitch.target_start, last.config.num_hidden_layers)
    for name, value in last.family.fed_hidden.items():
        setattr(target_config, name, value)
    return StitchedConfig(
        source_config=source_config,
        target_config=target_config,
        source_stop=stitch.source_stop,
        target_start=stitch.target_start,
        source_blocks=first.config.num_hidden_layers,
        target_blocks=last.config.num_hidden_layers,
        source_norm=first.family.norm,
        head_bias=last.family.head_bias,
        source_name=first.name,
        target_name=last.name,
        source_revision=first.revision,
        target_revision=last.revision,
        bos_token_id=last.config.bos_token_id,
        eos_token_id=last.config.eos_token_id,
        pad_token_id=last.config.pad_token_id,
        architectures=["StitchedForCausalLM"],
    )


def usable_batches(calibration: Iterable[Any], bos_token_id: int | None) -> Iterable[TokenBatch]:
    """The batches from the first with a counted token on; reads that far, so that empty data fail before long work.

    Raises:
        ValueError: no batch has a token that is neither padding nor BOS.
    """
    batches = token_batches(calibration)
    for batch in batches:
        if batch.counted(bos_token_id).any():
            return chain([batch], batches)
    raise ValueError(
        "got calibration batches without a token that is neither padding nor BOS; expected text. Check the "
        "attention masks, and that an iterator was not used up before"
    )


@torch.no_grad()
def fit_stitch(
    source: PreTrainedModel,
    target: PreTrainedModel,
    calibration: Iterable[Any],
    bos_token_id: int | None,
    ridge: float | None = None,
) -> LinearFit:
    """Least-squares map from the last hidden states of `source` to those of `target`, in one pass.

    Args:
        source, target: decoders cut at the stitch, without final norms.
        calibration: batches of token ids; padding and BOS are left out.

    Raises:
        ValueError: no token left, or activations that are not finite.
    """
    device = next(source.parameters()).device
    equations = LeastSquares(source.config.hidden_size, target.config.hidden_size, device)
    with evaluating(source), evaluating(target):
        for batch in progress(shared_out(token_batches(calibration)), "calibrating the stitching layer"):
            counted = batch.counted(bos_token_id)
            x, y = (_last_hidden(side, batch) for side in (source, target))
            equations.update(x[counted.to(x.device)], y[counted.to(y.device)])
    equations.combine(sum_over_processes)
    return equations.solve(ridge)


@torch.no_grad()
def set_stitch(model: StitchedForCausalLM, fit: LinearFit) -> None:
    """Put a fit into the stitching layer, and its figures into the config."""
    layer = model.stitching_layer()
    layer.weight.copy_(fit.weight)
    layer.bias.copy_(fit.bias)
    model.config.stitch_fit = {"r2": fit.r2, "ridge": fit.ridge, "tokens": fit.rows}


def _last_hidden(decoder: PreTrainedModel, batch: TokenBatch) -> Tensor:
    batch = batch.to(decoder.get_input_embeddings().weight.device)
    return decoder(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


def _check_pair(first: DecoderCheckpoint, last: DecoderCheckpoint, stitch: Stitch, hub: dict[str, Any]) -> None:
    stitch.check(first.config.num_hidden_layers, last.config.num_hidden_layers)
    if _size(first.config) > _size(last.config):
        raise ValueError(
            f"got the source {first.name} larger than the target {last.name}: reversed; expected the cheaper anchor "
            "as the source. Swap source and target"
        )
    check_vocabularies(first.name, first.config, last.name, last.config, **hub)


def _size(config: PreTrainedConfig) -> int:
    """Parameters of the blocks, without allocating them."""
    with torch.device("meta"):
        model = MODEL_MAPPING[type(config)](cut_config(config, 0, 1))
    embedding = model.get_input_embeddings().weight.numel()
    return (sum(p.numel() for p in model.parameters()) - embedding) * config.num_hidden_layers


def stitched_state(
    first: DecoderCheckpoint, last: DecoderCheckpoint, stitch: Stitch, config: StitchedConfig
) -> dict[str, Any]:
    """Name in the stitched model → tensor; the stitching layer's are random."""
    state = _side(first, 0, stitch.source_stop, "model.source.", without=(f"{first.family.norm}.",))
    state |= _side(
        last, stitch.target_start, config.target_blocks, "model.target.", without=(f"{last.family.embeddings}.",)
    )
    state |= {f"lm_head.{name}": last.tensor(key) for name, key in last.head_keys().items()}
    layer = nn.Linear(config.embedding_size, config.hidden_size, bias=config.stitch_bias)
    return state | {f"model.stitch.{name}": tensor for name, tensor in layer.state_dict().items()}


def _side(
    anchor: DecoderCheckpoint, start: int, stop: int, prefix: str, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Name in the stitched model → tensor, for the parts of one anchor that are kept."""
    state = {}
    for name, key in anchor.decoder_keys():
        renamed = _renumber(name, anchor.family, start, stop)
        if renamed is not None and not name.startswith(without):
            state[prefix + renamed] = anchor.tensor(key)
    return state


def _renumber(name: str, family: DecoderFamily, start: int, stop: int) -> str | None:
    """The name of a tensor after the cut; None if its block is cut away."""
    block = re.match(rf"{re.escape(family.blocks)}\.(\d+)\.", name)
    if block is None:
        return name
    number = int(block[1])
    return f"{family.blocks}.{number - start}.{name[block.end() :]}" if start <= number < stop else None


def _target_prefix(anchor: DecoderCheckpoint, stitch: Stitch, **loading: Any) -> PreTrainedModel:
    """`target.blocks[:j]` without its final norm: what the stitching layer has to imitate."""
    config = cut_config(anchor.config, 0, stitch.target_start)
    state = _side(anchor, 0, stitch.target_start, "")
    model = load_parts(MODEL_MAPPING[type(config)], config, state, **loading)
    model.set_submodule(anchor.family.norm, nn.Identity())
    return model


def target_generation_config(anchor: DecoderCheckpoint) -> GenerationConfig:
    """The target's generation config, with its list of EOS tokens."""
    if anchor.generation_config is not None:
        return copy.deepcopy(anchor.generation_config)
    return GenerationConfig.from_model_config(anchor.config)
