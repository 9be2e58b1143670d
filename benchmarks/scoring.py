"""Functional KL of all pairs against the rears' forwards alone, and the fit of a pruned block against ReplaceMe's."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks.measuring import Figure, growth_of, in_child, in_children, seconds
from benchmarks.models import llamas, sequences
from benchmarks.options import Options
from klas_hf import FunctionalScoring, StitchCosts, StitchedModel, score_stitches

GIB = 1024  # MiB
# Divides widths, vocabulary, tokens of a sequence, and, twice, the memory allowed: all products of matrices shrink by
# its cube, so that their shares in the whole stay as they are at full size.
SHRUNK = 16


def figures(options: Options) -> Iterator[Figure]:
    found = in_child(options, "scoring:functional")
    pairs = f"functional KL of {int(found['pairs'])} pairs of two Llamas, maps included"
    yield Figure(f"{pairs}, time", found["seconds"], "the rears' forwards alone", found["rears"], "s", 1.3)
    yield Figure(f"{pairs}, memory beside the models", found["peak"], "4 GiB", 4 * GIB, "MiB", 1)
    found = in_child(options, "scoring:eliminating")
    what = f"the default among {int(found['pairs'])} pairs of two thinner Llamas, candidates eliminated, time"
    yield Figure(what, found["seconds"], "the rears' forwards alone", found["rears"], "s", 1.3)
    counted = in_child(options, "scoring:operations")
    what = f"the default among {int(counted['pairs'])} pairs, Llama 3.2 1B → 3B / {SHRUNK}, operations"
    yield Figure(what, counted["scoring"], "the rears' forwards alone", counted["rears"], "GFLOP", 1.3)
    ours, theirs = in_children(options, ["scoring:merged", "scoring:replace_me"], repeats=1 if options.quick else 2)
    what = "blocks replaced by a merged least-squares map"
    yield Figure(f"{what}, time", ours["seconds"], "ReplaceMe: activations kept, lstsq", theirs["seconds"], "s", 1)
    yield Figure(f"{what}, memory", ours["peak"], "ReplaceMe: activations kept, lstsq", theirs["peak"], "MiB", 1)


def functional(options: Options) -> Mapping[str, float]:
    """Seconds and MiB of scoring all pairs in full, and seconds of their rears on the scored sequences."""
    small, large = llamas(options, scale=4)
    data, fitting = sequences(options, options.sequences), sequences(options, options.sequences, seed=1)
    found, pairs = _scored(small, large, data, FunctionalScoring(calibration=fitting, scored_items=None), options)
    return {**found, "pairs": len(pairs), "rears": _rears(large, pairs, data, options)}


def eliminating(options: Options) -> Mapping[str, float]:
    """The same of the default, which eliminates candidates, at the depths of Llama 3.2 1B and 3B and small widths.

    The rears are those of all candidates, timed on one of the four batches.
    """
    if not options.quick:
        options = replace(options, scale=8, blocks=16, vocabulary=16_032, tokens=64)
    small, large = llamas(options, scale=8)
    data, fitting = (sequences(options, 8, seed, batch_size=2) for seed in range(2))
    found, pairs = _scored(small, large, data, FunctionalScoring(calibration=fitting), options)
    return {**found, "pairs": len(pairs), "rears": _rears(large, pairs, data[:1], options) * len(data)}


def _scored(
    small: LlamaForCausalLM, large: LlamaForCausalLM, data: list[dict[str, Tensor]], settings: FunctionalScoring,
    options: Options,
) -> tuple[Mapping[str, float], list[tuple[int, int]]]:  # fmt: skip
    """Seconds and MiB of scoring, once both anchors have run, and its candidates."""
    with torch.no_grad():
        for model in (small, large):
            model(data[0]["input_ids"].to(options.device))
    scores = []
    found = growth_of(
        lambda: scores.append(score_stitches(small, large, data, tokens=options.tokens, functional=settings))
    )
    return found, _in_range(scores[0].costs)


def operations(options: Options) -> Mapping[str, float]:
    """GFLOP of products of matrices and of factorisations: of a default pass, and of all candidates' rears.

    At the depths of Llama 3.2 1B and 3B and with 128 + 128 sequences, so that candidates are eliminated as there.
    """
    if not options.quick:
        sizes = {"scale": SHRUNK, "blocks": 16, "vocabulary": 128_256 // SHRUNK, "tokens": 128 // SHRUNK}
        options = replace(options, sequences=128, **sizes)
    small, large = llamas(options, scale=SHRUNK)
    for model in (small, large):
        model.set_attn_implementation("eager")  # torch does not count the CPU's kernel of attention
    at_once = 8  # batches of four in one, and as much more memory allowed for them: products only become larger
    data, fitting = (sequences(options, options.sequences, seed, 4 * at_once) for seed in range(2))
    default = FunctionalScoring(calibration=fitting)
    allowed = {name: at_once * getattr(default, name) // SHRUNK**2 for name in ("rear_bytes", "workspace_bytes")}
    settings, scores = replace(default, moment_bytes=default.moment_bytes // SHRUNK**2, **allowed), []
    scoring = _gflop(
        lambda: scores.append(score_stitches(small, large, data, tokens=options.tokens, functional=settings))
    )
    pairs = _in_range(scores[0].costs)
    rears = _rears(large, pairs, data[:1], options, _gflop) * len(data)
    return {"pairs": len(pairs), "scoring": scoring, "rears": rears}


def _gflop(run: Callable[[], object]) -> float:
    factorisations = {
        torch.ops.aten.linalg_cholesky_ex: lambda shape, *_, **__: shape[-1] ** 3 // 3,
        torch.ops.aten.cholesky_solve: lambda right, lower, *_, **__: 2 * lower[-1] ** 2 * right[-1],
    }
    counter = FlopCounterMode(display=False, custom_mapping=factorisations)
    with counter:
        run()
    return counter.get_total_flops() / 1e9


def _in_range(costs: StitchCosts) -> list[tuple[int, int]]:
    """(i, j) of the stitches that cost no less than the source and no more than the target."""
    inside = costs.possible & (costs.macs >= costs.source_total) & (costs.macs <= costs.target_total)
    return [(i + 1, j) for i, j in np.argwhere(inside).tolist() if j > 0]


@torch.no_grad()
def _rears(
    large: LlamaForCausalLM, pairs: list[tuple[int, int]], data: list[dict[str, Tensor]], options: Options,
    measured: Callable[[Callable[[], object]], float] = seconds,
) -> float:  # fmt: skip
    """What transformers' own forwards of the target's blocks behind each joint take; alike ones are measured once."""
    layers, taken = large.model.layers, 0.0
    states = torch.randn(*data[0]["input_ids"].shape, large.config.hidden_size, device=options.device)
    states = states.to(large.dtype)
    for start, count in Counter(start for _, start in pairs).items():
        large.model.layers = nn.ModuleList(layers[start:])
        for batch in data:
            rows = states[: len(batch["input_ids"])]
            taken += count * measured(lambda rows=rows: large(inputs_embeds=rows, use_cache=False).logits)
    large.model.layers = layers
    return taken


# ---- ReplaceMe (arXiv 2505.02819), our own short transcription of its method: "least squares" of its Sec. 3


def _calibration(options: Options) -> list[dict[str, Tensor]]:
    return sequences(options, 4 * options.sequences)


def _left_out(large: LlamaForCausalLM) -> tuple[int, int]:
    blocks = large.config.num_hidden_layers
    return blocks // 2, blocks * 3 // 4


def merged(options: Options) -> Mapping[str, float]:
    _, large = llamas(options, scale=2)
    start, stop = _left_out(large)
    path, data = f"0[:{start}] 0[{stop}:]", _calibration(options)
    items = 4 * options.sequences
    return growth_of(
        lambda: StitchedModel.from_path([large], path, joint="merged", calibration=data, calibration_items=items)
    )


def replace_me(options: Options) -> Mapping[str, float]:
    _, large = llamas(options, scale=2)
    data = _calibration(options)
    return growth_of(lambda: _replaced(copy.deepcopy(large), data, *_left_out(large)))  # ours leaves its anchor, too


@torch.no_grad()
def _replaced(large: LlamaForCausalLM, data: list[dict[str, Tensor]], start: int, stop: int) -> None:
    """Keep what the last block's MLP wrote and the states around the cut for all tokens; map one to the other."""
    kept: dict[str, list[Tensor]] = {"written": [], "before": [], "behind": []}

    def keep(name: str, place: Callable[[tuple, Tensor], Tensor]):
        return lambda _, given, out: kept[name].append(place(given, out).flatten(0, 1))

    last = large.model.layers[start - 1]
    handles = [
        last.mlp.register_forward_hook(keep("written", lambda given, out: out)),
        last.register_forward_hook(keep("before", lambda given, out: out)),
        large.model.layers[stop - 1].register_forward_hook(keep("behind", lambda given, out: out)),
    ]
    for batch in data:
        large.model(batch["input_ids"].to(large.device), use_cache=False)
    for handle in handles:
        handle.remove()
    written, before, behind = (torch.cat(kept.pop(name)).float() for name in ("written", "before", "behind"))
    found = torch.linalg.lstsq(written, behind - before + written).solution
    last.mlp.down_proj.weight.copy_(found.T @ last.mlp.down_proj.weight.float())
    large.model.layers = nn.ModuleList([*large.model.layers[:start], *large.model.layers[stop:]])
