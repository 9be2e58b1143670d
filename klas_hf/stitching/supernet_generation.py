"""Generation on a path of a language supernet, by a model of the path that shares the supernet's weights."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from klas_hf.anchors.families import decoder_family
from klas_hf.anchors.language import LanguageAnchor
from klas_hf.anchors.weights import evaluating
from klas_hf.models import StitchedForCausalLM
from klas_hf.paths import Path
from klas_hf.stitching.prefixes import Known, PrefixCache, Steps, cache_of, joined, partings, steps_of


def check_length(model: StitchedForCausalLM, tokens: int) -> None:
    """Raise ValueError for a prompt that leaves no room for a token within what every slice's anchor can read."""
    limits = [one.max_position_embeddings for one in model.config.slice_configs]
    if tokens >= min(limits):
        raise ValueError(
            f"got a prompt of {tokens:,} tokens for {model.config.path}, whose slices read up to "
            f"{', '.join(f'{one:,}' for one in limits)}; expected fewer than {min(limits):,}. Shorten it, or take "
            "another path"
        )


def generate_with_prefixes(supernet: Any, path: Path, ids: Tensor, prefixes: PrefixCache, **options: Any) -> Any:
    """What `generate` of the path's model gives, without reading what `prefixes` knows of the tokens.

    Args:
        supernet: of language models.
        path: one of its.
        ids: `(1, tokens)`.
        options: of `generate`.

    Raises:
        ValueError: several sequences, padding, or a mode of decoding that reads tokens which it then drops.
    """
    model = supernet.path_model(path)
    if not is_single(model, ids, options):
        raise ValueError(
            f"got prefixes with {len(ids)} prompts and {sorted(options)}; expected one prompt without padding and one "
            "answer, greedy or sampled, without a draft or a cache of your own. Leave prefixes out"
        )
    steps = {one: _steps(supernet, one) for one in supernet.paths}
    parted = partings(steps)
    own = steps.get(path) or _steps(supernet, path)
    weights = weights_of(supernet)
    known = prefixes.find(ids[0].tolist(), own, weights)
    cache = cache_of(known)
    states = _catch_up(supernet, path, known, cache, [number for number, step in enumerate(own) if step in parted])
    with _states_behind(model, [number for number, step in enumerate(own) if step in parted]) as further:
        # Unasked, transformers takes pad tokens within a prompt for padding.
        output = model.generate(ids, past_key_values=cache, **{"attention_mask": torch.ones_like(ids)} | options)
    sequences = output if isinstance(output, Tensor) else output.sequences
    seen = sequences[0, : cache.get_seq_length()].tolist()
    found = {number: joined([states.get(number), *parts]) for number, parts in further.items()}
    prefixes.keep(seen, own, cache, found, weights)
    return output


def weights_of(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes when a weight is replaced or, as far as torch counts that, written to."""
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in module.parameters())


def _steps(supernet: Any, path: Path) -> list[Steps]:
    joints = supernet.config.joint_of[supernet.numbers[path]] if path.joints else []
    return steps_of(supernet.bounds(path), joints)


def is_single(model: StitchedForCausalLM, ids: Tensor, options: dict[str, Any]) -> bool:
    """Whether one sequence is continued token by token, which is what prefixes are kept for."""
    settings: GenerationConfig = copy.deepcopy(options.get("generation_config") or model.generation_config)
    settings.update(**options)
    mode, mask = settings.get_generation_mode(options.get("assistant_model")), options.get("attention_mask")
    return (
        ids.shape[0] == 1
        and (settings.num_return_sequences or 1) == 1
        and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and (mask is None or bool(mask.all()))
        and "past_key_values" not in options
    )


@torch.no_grad()
def _catch_up(supernet: Any, path: Path, known: Known, cache: Cache, parted: Sequence[int]) -> dict[int, Tensor]:
    """Run the blocks behind the front on the tokens that only the front has seen; the states at partings, whole."""
    states = dict(known.states)
    if known.front == len(known.layers) or known.tokens == known.behind:
        return states
    state, first = known.states[known.front - 1][:, known.behind :], 0
    with evaluating(supernet) if supernet.training else nullcontext():
        for number, (place, start, stop) in enumerate(supernet.bounds(path)):
            last = first + stop - start
            if last > known.front:
                if first >= known.front:
                    state = supernet.joints_of(path)[number - 1](state)
                begin = max(first, known.front)
                cuts = [one + 1 for one in parted if begin < one + 1 < last]
                for one, other in zip([begin, *cuts], [*cuts, last], strict=True):
                    anchor, layers = cast(LanguageAnchor, supernet.anchor(place)), cache.layers[one:other]
                    state = anchor.go_on(state, layers, start + one - first, start + other - first)
                    if other - 1 in parted:
                        states[other - 1] = joined([known.states.get(other - 1), state])
            first = last
    return states


@contextmanager
def _states_behind(model: StitchedForCausalLM, numbers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """What comes out of some blocks of a path's model, by number, forward by forward of this thread."""
    thread, found = get_ident(), {number: list[Tensor]() for number in numbers}
    blocks = [
        block
        for part, config in zip(model.model.slices, model.config.slice_configs, strict=True)
        for block in part.get_submodule(decoder_family(config).blocks)
    ]

    def keep_for(number: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if get_ident() == thread:
                found[number].append(output[0] if isinstance(output, tuple) else output)

        return keep

    handles = [blocks[number].register_forward_hook(keep_for(number)) for number in numbers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
