"""Two causal language models before they are stitched: vocabularies, special tokens, templates, positions, caches."""

import json
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from klas_hf.anchors.checkpoints import head_keys
from klas_hf.anchors.families import decoder_family
from klas_hf.anchors.vocabularies import check_vocabularies, tokenizer_vocabulary
from klas_hf.cli.findings import Finding, attempted, ok, problem, warning
from klas_hf.cli.headers import StoredTensor
from klas_hf.cli.output import human_count
from klas_hf.models.configuration_stitched import kv_shape
from klas_hf.paths import Stitch
from klas_hf.stitch_costs import StitchCosts
from klas_hf.stitching.language import slice_keys

Configs = tuple[PreTrainedConfig, PreTrainedConfig]
Tensors = dict[str, StoredTensor]


def examine_decoders(names: tuple[str, str], configs: Configs) -> list[Finding]:
    """All findings that need neither costs nor weights."""
    tokenizers = _tokenizer(names[0]), _tokenizer(names[1])
    return [
        attempted("vocabulary", lambda: _vocabularies(names, configs, tokenizers)),
        _tokenizers(tokenizers),
        *_special_tokens(configs, tokenizers[1]),
        _end_of_sequence(names, configs),
        _chat_templates(tokenizers),
        _rope(configs),
        _context(configs),
        _caches(configs),
        _ties(configs),
    ]


def blocks_finding(configs: Configs) -> Finding:
    """Families, depths and widths."""
    sides = [f"{c.model_type}, {c.num_hidden_layers} blocks {c.hidden_size} wide" for c in configs]
    stitches = configs[0].num_hidden_layers * (configs[1].num_hidden_layers - 1)
    return ok("blocks", f"{sides[0]} → {sides[1]}; {stitches} stitches have a score")


def block_parameters_finding(costs: StitchCosts) -> list[Finding]:
    """A problem where the source's blocks are larger, which is refused even if they cost fewer MACs."""
    sizes = [int(blocks.sum()) for blocks in (costs.source_parameters, costs.target_parameters)]
    if sizes[0] <= sizes[1]:
        return []
    found = f"reversed: the source's blocks have {sizes[0]:,} parameters, the target's {sizes[1]:,}"
    return [problem("direction", found, "swap source and target")]


def kept_decoder_keys(tensors: tuple[Tensors, Tensors], configs: Configs, stitch: Stitch) -> tuple[set[str], set[str]]:
    """Which tensors of source and target a stitched model reads."""
    families, depth = [decoder_family(config) for config in configs], configs[1].num_hidden_layers
    first = slice_keys(tensors[0], families[0], 0, stitch.source_stop, embeds=True, norm=False)
    last = slice_keys(tensors[1], families[1], stitch.target_start, depth, embeds=False, norm=True)
    return {*first.values()}, {*last.values(), *head_keys(tensors[1], families[1], configs[1]).values()}


def calibration_keys(tensors: Tensors, config: PreTrainedConfig, stitch: Stitch) -> set[str]:
    """Which tensors of the target are read besides, to fit the stitching layer: its embedding and first blocks."""
    family = decoder_family(config)
    return {*slice_keys(tensors, family, 0, stitch.target_start, embeds=True, norm=True).values()}


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    return None if tokenizer_vocabulary(name) is None else AutoTokenizer.from_pretrained(name)


def _vocabularies(names: tuple[str, str], configs: Configs, tokenizers: tuple[Any, Any]) -> str:
    check_vocabularies(names[0], configs[0], names[1], configs[1])
    compared = "the same tokens" if all(tokenizers) else "sizes compared only: an anchor has no tokenizer with it"
    return f"{configs[0].vocab_size:,} entries in both; {compared}"


def _tokenizers(tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]) -> Finding:
    """Whether text is cut alike; equal vocabularies do not make sure of it."""
    first, last = tokenizers
    missing = [side for side, one in zip(("source", "target"), tokenizers, strict=True) if one is None]
    if first is None or last is None:
        remedy = "save the tokenizer into the anchor's folder, or make sure yourself that both are alike"
        return warning("tokenizer", f"none with the {' and the '.join(missing)}", remedy)
    differing = _differing_parts(first, last)
    if differing:
        remedy = "the stitched model goes with the target's; compare what both make of your text"
        return warning("tokenizer", f"the anchors' differ in {', '.join(differing)}", remedy)
    return ok("tokenizer", f"{type(last).__name__}, equal in both")


def _differing_parts(first: PreTrainedTokenizerBase, last: PreTrainedTokenizerBase) -> list[str]:
    """Names of the parts of two fast tokenizers that differ; a slow one is its class and settings."""
    if not (first.is_fast and last.is_fast):
        return [] if type(first) is type(last) and first.init_kwargs == last.init_kwargs else ["class or settings"]
    parts = [json.loads(one.backend_tokenizer.to_str()) for one in (first, last)]
    compared = (parts[0].keys() | parts[1].keys()) - {"version", "truncation", "padding"}  # these any call may set
    return sorted(name for name in compared if parts[0].get(name) != parts[1].get(name))


def _special_tokens(configs: Configs, tokenizer: PreTrainedTokenizerBase | None) -> list[Finding]:
    """BOS, EOS and padding of both configurations, and of the tokenizer that goes with the stitched model."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    first, last = ({name: getattr(config, name) for name in names} for config in configs)
    shown = ", ".join(f"{name.removesuffix('_token_id').upper()} {last[name]}" for name in names)
    differing = [f"{name} {first[name]} → {last[name]}" for name in names if first[name] != last[name]]
    findings = [
        warning(
            "special tokens", f"the anchors differ: {', '.join(differing)}", "the stitched model takes the target's"
        )
        if differing
        else ok("special tokens", f"{shown}, equal in both")
    ]
    if tokenizer is None:
        return findings
    own = {name: getattr(tokenizer, name) for name in names}
    against = [f"{name} {own[name]}, not {last[name]}" for name in names[:2] if not _agrees(own[name], last[name])]
    if against:
        remedy = "set them alike in the target's config.json and tokenizer_config.json"
        findings.append(warning("special tokens", f"the target's tokenizer has {', '.join(against)}", remedy))
    if last["pad_token_id"] is None and own["pad_token_id"] is None:
        remedy = "set tokenizer.pad_token = tokenizer.eos_token before you make batches"
        findings.append(warning("special tokens", "the target has no padding token", remedy))
    return findings


def _agrees(own: int | None, configured: int | list[int] | None) -> bool:
    """Whether a tokenizer's token is one of the configuration's; what either leaves open agrees."""
    if own is None or configured is None:
        return True
    return own in configured if isinstance(configured, list) else own == configured


def _end_of_sequence(names: tuple[str, str], configs: Configs) -> Finding:
    """The EOS tokens that stop generation: of the generation config, which may list more than the configuration."""
    ends = [_ends(name, config) for name, config in zip(names, configs, strict=True)]
    if not ends[1]:
        remedy = "put eos_token_id into the target's generation_config.json"
        return warning("end of sequence", "the target has no EOS token: generation stops at its length only", remedy)
    if ends[0] != ends[1]:
        found = f"source {ends[0] or 'none'}, target {ends[1]}"
        return warning("end of sequence", found, "the stitched model takes the target's generation config")
    return ok("end of sequence", f"{ends[1]} in both")


def _ends(name: str, config: PreTrainedConfig) -> list[int]:
    try:
        found = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # no generation_config.json
        found = config.eos_token_id
    return [] if found is None else sorted(found) if isinstance(found, list) else [found]


def _chat_templates(tokenizers: tuple[Any, Any]) -> Finding:
    first, last = (None if one is None else one.chat_template for one in tokenizers)
    if first == last:
        return ok("chat template", "none in either" if last is None else "equal in both")
    if last is None:
        found, remedy = "the source has one, the target none", "set tokenizer.chat_template of the stitched model"
    elif first is None:
        found, remedy = "the target has one, the source none", "a base model and a chat model: expect to fine-tune"
    else:
        found, remedy = "the anchors' differ", "the stitched model goes with the target's"
    return warning("chat template", found, remedy)


def _rope(configs: Configs) -> Finding:
    """Positions; each side keeps its own rotary embedding, so that differences do no harm."""
    first, last = (json.dumps(config.rope_parameters, sort_keys=True, default=str) for config in configs)
    if first == last:
        return ok("RoPE", f"{last} in both")
    return ok("RoPE", f"{first} → {last}; each side keeps its own")


def _context(configs: Configs) -> Finding:
    first, last = (config.max_position_embeddings for config in configs)
    if first == last:
        return ok("context", f"{last:,} positions in both")
    found = f"{first:,} and {last:,} positions: the stitched model has {min(first, last):,}"
    return warning("context", found, "keep prompts and answers within it")


def _caches(configs: Configs) -> Finding:
    """KV heads and their width, which decide how the keys and values can be kept."""
    first, last = (kv_shape(config) for config in configs)
    shown = [f"{heads} KV heads {width} wide" for heads, width in (first, last)]
    if first == last:
        return ok("KV cache", f"{shown[0]} in both: dynamic and static caches, continuous batching")
    found = f"{shown[0]} → {shown[1]}: no continuous batching (generate_batch); static caches from transformers 5.19"
    return warning("KV cache", found, "use generate, or anchors with equal KV shapes")


def _ties(configs: Configs) -> Finding:
    sides = ["tied" if config.tie_word_embeddings else "untied" for config in configs]
    sizes = [config.vocab_size * config.hidden_size for config in configs]
    return ok(
        "embeddings",
        f"source {sides[0]}, target {sides[1]}; stored are the source's embedding ({human_count(sizes[0])} parameters) "
        f"and the target's head ({human_count(sizes[1])})",
    )
