"""Paths through causal language models as models, reading only the tensors that are used."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from klas_hf.anchors.batches import TokenBatch, token_batches
from klas_hf.anchors.checkpoints import DecoderCheckpoint, decoder_keys
from klas_hf.anchors.decoder_parts import cut_config
from klas_hf.anchors.families import DECODER_FAMILIES, DecoderFamily, decoder_family
from klas_hf.anchors.language import HUB_OPTIONS, explained_access, hub_options
from klas_hf.anchors.vocabularies import check_vocabularies
from klas_hf.anchors.weights import evaluating
from klas_hf.models import StitchedConfig, StitchedForCausalLM
from klas_hf.models.modeling_stitched import StitchedTextModel
from klas_hf.paths import Path as AnchorPath
from klas_hf.stitching.calibration import sampled
from klas_hf.stitching.joints import Joint, check_joint, check_writers, fit_joints, merge_joints
from klas_hf.stitching.loading import load_parts, prefix_map, warn_of_random_stitches


def stitch_decoders(
    anchors: Sequence[str | Path | PreTrainedModel],
    path: AnchorPath,
    *,
    calibration: Iterable[Any] | None = None,
    calibration_items: int | None = None,
    ridge: float | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    revisions: Sequence[str | None] | None = None,
    joint: Joint = "least_squares",
    **kwargs: Any,
) -> StitchedForCausalLM:
    """Make the model of a path through causal language models; see `assemble_path`.

    The anchors' configurations are cut to the kept blocks, the tensors of those blocks are renamed (a block's number
    changes with the cut), and transformers loads them as it would any checkpoint: no other tensor is read. The model
    gets the last anchor's generation config.
    """
    with ExitStack() as files:
        opened = {
            place: files.enter_context(DecoderCheckpoint(anchors[place], **hub_options(kwargs, revision)))
            for place, revision in enumerate(revisions or [None] * len(anchors))
            if place in path.anchors
        }
        first, last = opened[path.slices[0].anchor], opened[path.slices[-1].anchor]
        config = stitched_config(opened, path, len(anchors))
        check_joint(
            joint, path, list(pairwise(one.hidden_size for one in config.slice_configs)), calibration is not None
        )
        if joint == "merged":
            known = sorted(name for name, family in DECODER_FAMILIES.items() if family.writer)
            writers = {place: (one.config.model_type, one.family.writer) for place, one in opened.items()}
            check_writers(path, writers, f"one of {known}")
        config.identity_joints = joint in ("identity", "merged")
        check_vocabularies(first.name, first.config, last.name, last.config, **hub_options(kwargs))
        batches = None
        if calibration is not None:
            chosen = _sampled(calibration, config, calibration_items)
            batches = usable_batches(chosen, config.bos_token_id)
        loading = {"dtype": last.dtype if dtype in (None, "auto") else dtype, "device_map": device_map}
        options = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
        model = load_parts(StitchedForCausalLM, config, stitched_state(opened, config), **loading, **options)
        model.generation_config = generation_config_of(last)
        layers = model.stitching_layers()
        if joint == "merged" and batches is not None and path.joints:
            _merge(model, opened, batches, ridge, dtype=loading["dtype"], device_map=prefix_map(device_map))
        elif layers and batches is None:
            warn_of_random_stitches()
        elif batches is not None and layers:
            _fit(model, opened, batches, ridge, joint, dtype=loading["dtype"], device_map=prefix_map(device_map))
    return model.eval()


def check_direction(names: Sequence[str | None], configs: Sequence[PreTrainedConfig]) -> None:
    """Raise ValueError if the blocks of the first of two anchors have more parameters than the second's.

    And if a family is not known.
    """
    for config in configs:
        decoder_family(config)
    sizes = []
    for name, config in zip(names, configs, strict=True):
        with explained_access(str(name)):
            sizes.append(_size(config))
    if sizes[0] > sizes[1]:
        raise ValueError(
            f"got the source {names[0]} larger than the target {names[1]}: reversed; expected the cheaper anchor "
            "as the source. Swap source and target"
        )


def _size(config: PreTrainedConfig) -> int:
    """Parameters of the blocks, without allocating them."""
    with no_init_weights(), torch.device("meta"):
        model = MODEL_MAPPING[type(config)](cut_config(config, 0, 1))
    embedding = model.get_input_embeddings().weight.numel()
    return (sum(p.numel() for p in model.parameters()) - embedding) * config.num_hidden_layers


def stitched_config(anchors: Mapping[int, DecoderCheckpoint], path: AnchorPath, count: int) -> StitchedConfig:
    """The configuration of the model of a path through some of `count` anchors.

    Raises:
        ValueError: the path is out of range.
    """
    depths = [anchors[place].config.num_hidden_layers if place in anchors else 0 for place in range(count)]
    bounds = path.bounds(depths)
    last = anchors[bounds[-1][0]]
    configs = [
        cut_config(anchors[place].config, start, stop, fed=number > 0)
        for number, (place, start, stop) in enumerate(bounds)
    ]
    given: dict[str, Any] = {"slice_configs": configs, "slices": [list(one) for one in bounds]}
    return StitchedConfig(
        **given,
        anchor_blocks=depths,
        slice_norms=[anchors[place].family.norm for place, *_ in bounds],
        head_bias=last.family.head_bias,
        tie_word_embeddings=bounds[0][0] == bounds[-1][0] and last.ties,
        anchor_names=[anchors[place].name if place in anchors else None for place in range(count)],
        anchor_revisions=[anchors[place].revision if place in anchors else None for place in range(count)],
        bos_token_id=last.config.bos_token_id,
        eos_token_id=last.config.eos_token_id,
        pad_token_id=last.config.pad_token_id,
        architectures=["StitchedForCausalLM"],
    )


def _sampled(calibration: Iterable[Any], config: StitchedConfig, items: int | None) -> Iterator[TokenBatch]:
    width = max(one.hidden_size for one in config.slice_configs)
    return sampled(
        calibration,
        lambda data: token_batches(data, config.bos_token_id, config.vocab_size),
        lambda batch: width * len(batch) / max(1, int(batch.attention_mask.sum())),
        items,
    )


def usable_batches(calibration: Iterable[Any], bos_token_id: int | None) -> Iterable[TokenBatch]:
    """The batches from the first with a counted token on; reads that far, so that empty data fail before long work.

    Raises:
        ValueError: no batch has a token that is neither padding nor BOS.
    """
    batches = token_batches(calibration, bos_token_id)
    for batch in batches:
        if batch.counted.any():
            return chain([batch], batches)
    raise ValueError(
        "got calibration batches without a token that is neither padding nor BOS; expected text. Check the "
        "attention masks, and that an iterator was not used up before"
    )


def _fit(
    model: StitchedForCausalLM, anchors: Mapping[int, DecoderCheckpoint], calibration: Iterable[TokenBatch],
    ridge: float | None, joint: Joint, **loading: Any,
) -> None:  # fmt: skip
    """Fit the joints; `loading` are `dtype` and `device_map` of the anchors' first blocks."""

    def pairs(number: int) -> Callable[[TokenBatch], tuple[Tensor, Tensor]]:
        wanted = _wanted(model, anchors, loading, number)

        def rows_of(batch: TokenBatch) -> tuple[Tensor, Tensor]:
            state = _front_states(model.model, number, batch)
            return _counted(state, batch), _counted(wanted(batch, state), batch)

        return rows_of

    fit_joints(model, pairs, calibration, ridge, joint)


def _merge(
    model: StitchedForCausalLM, anchors: Mapping[int, DecoderCheckpoint], calibration: Iterable[TokenBatch],
    ridge: float | None, **loading: Any,
) -> None:  # fmt: skip
    """Merge the joints into the blocks before; `loading` as for `_fit`."""
    writers: list[nn.Module] = []
    for part, (place, *_) in zip(model.model.slices[:-1], model.config.slices, strict=False):
        family = anchors[place].family
        writers.append(part.get_submodule(family.blocks)[-1].get_submodule(cast(str, family.writer)))

    def parts(number: int) -> Callable[[TokenBatch], tuple[Tensor, Tensor, Tensor]]:
        wanted = _wanted(model, anchors, loading, number)

        def rows_of(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
            written: list[Tensor] = []
            handle = writers[number].register_forward_hook(lambda _, args, output: written.append(output))
            try:
                state = _front_states(model.model, number, batch)
            finally:
                handle.remove()
            return (
                _counted(state, batch),
                _counted(written[-1].to(state.device), batch),
                _counted(wanted(batch, state), batch),
            )

        return rows_of

    merge_joints(model, writers, parts, calibration, ridge)


def _wanted(
    model: StitchedForCausalLM, anchors: Mapping[int, DecoderCheckpoint], loading: Mapping[str, Any], number: int
) -> Callable[[TokenBatch, Tensor], Tensor]:
    """What makes of a batch, and the states that enter a joint, those that the next slice has in its own anchor."""
    (before, _, stop), (place, start, _) = model.config.slices[number : number + 2]
    if not number and before == place and stop < start:  # the path has run the first of these blocks
        between = _blocks(anchors[place], stop, start, **loading)
        return lambda batch, state: _next_states(between, state, batch)
    prefix = _blocks(anchors[place], 0, start, **loading)
    return lambda batch, state: _last_hidden(prefix, batch)


def _counted(hidden: Tensor, batch: TokenBatch) -> Tensor:
    return hidden[batch.counted.to(hidden.device)]


def _front_states(model: StitchedTextModel, joint: int, batch: TokenBatch) -> Tensor:
    """`(batch, tokens, width)` that enters a joint of a stitched decoder."""
    with evaluating(model):
        hidden = _last_hidden(model.slices[0], batch)
        for layer, part in zip(model.joints[:joint], model.slices[1 : joint + 1], strict=True):
            hidden = _next_states(part, layer(hidden), batch)
    return hidden


def _next_states(part: PreTrainedModel, hidden: Tensor, batch: TokenBatch) -> Tensor:
    mask = batch.attention_mask.to(hidden.device)
    with evaluating(part):
        return part(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state


def _last_hidden(decoder: PreTrainedModel, batch: TokenBatch) -> Tensor:
    embedding = decoder.get_input_embeddings().weight
    batch = batch if embedding.is_meta else batch.to(embedding.device)  # offloaded modules fetch their inputs
    with evaluating(decoder):
        return decoder(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


def stitched_state(anchors: Mapping[int, DecoderCheckpoint], config: StitchedConfig) -> dict[str, Any]:
    """Name in the stitched model → tensor; the stitching layers' are random."""
    state: dict[str, Any] = {}
    final = len(config.slices) - 1
    for number, (place, start, stop) in enumerate(config.slices):
        anchor = anchors[place]
        names = slice_keys(anchor.keys, anchor.family, start, stop, embeds=number == 0, norm=number == final)
        state |= {f"model.slices.{number}.{name}": anchor.tensor(key) for name, key in names.items()}
    last = anchors[config.slices[-1][0]]
    for name, key in last.head_keys().items():
        if name != "weight" or not config.tie_word_embeddings:
            state[f"lm_head.{name}"] = last.tensor(key)
    widths = [one.hidden_size for one in config.slice_configs]
    for number, ends in enumerate(() if config.identity_joints else pairwise(widths)):
        layer = nn.Linear(*ends, bias=config.joint_bias)
        state |= {f"model.joints.{number}.{name}": tensor for name, tensor in layer.state_dict().items()}
    return state


def slice_keys(
    keys: Iterable[str], family: DecoderFamily, start: int, stop: int, *, embeds: bool, norm: bool
) -> dict[str, str]:
    """Name in a decoder of `blocks[start:stop]` → key in the anchor's checkpoint, of every tensor that it reads.

    Args:
        keys: of the checkpoint.
        embeds: whether it begins with the embedding.
        norm: whether it ends with the final norm.
    """
    without = tuple([] if norm else [f"{family.norm}."]) + tuple([] if embeds else [f"{family.embeddings}."])
    found = {}
    for name, key in decoder_keys(keys, family):
        renamed = _renumber(name, family, start, stop)
        if renamed is not None and not name.startswith(without):
            found[renamed] = key
    return found


def _renumber(name: str, family: DecoderFamily, start: int, stop: int) -> str | None:
    """The name of a tensor after the cut; None if its block is cut away."""
    block = re.match(rf"{re.escape(family.blocks)}\.(\d+)\.", name)
    if block is None:
        return name
    number = int(block[1])
    return f"{family.blocks}.{number - start}.{name[block.end() :]}" if start <= number < stop else None


def _blocks(anchor: DecoderCheckpoint, start: int, stop: int, **loading: Any) -> PreTrainedModel:
    """`anchor.blocks[start:stop]` without its final norm, to be read only; fed states unless they are its first."""
    config, family = cut_config(anchor.config, start, stop, fed=start > 0), anchor.family
    decoder: Any = MODEL_MAPPING[type(config)]

    class Blocks(decoder):
        # transformers converts checkpoints, as of experts, for classes of its own.
        __module__ = decoder.__module__

        def __init__(self, config: PreTrainedConfig):
            super().__init__(config)
            self.set_submodule(family.norm, nn.Identity())
            if start:
                self.set_input_embeddings(None)

    names = slice_keys(anchor.keys, family, start, stop, embeds=not start, norm=False)
    state = {name: anchor.tensor(key, copied=False) for name, key in names.items()}
    return load_parts(Blocks, config, state, **loading)


def generation_config_of(anchor: DecoderCheckpoint) -> GenerationConfig:
    """The anchor's generation config, with its list of EOS tokens."""
    if anchor.generation_config is not None:
        return copy.deepcopy(anchor.generation_config)
    return GenerationConfig.from_model_config(anchor.config)
