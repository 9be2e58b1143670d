"""Running what was stitched: forward, decode and supernet steps, against the same blocks inside their anchors."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from benchmarks.measuring import Figure, growth_of, in_child, in_turns, seconds
from benchmarks.models import classifier, halves, images, llamas, middle, swins
from benchmarks.options import Options
from klas_hf import (
    Stitch,
    StitchedModel,
    StitchedSupernet,
    StitchedSupernetConfig,
    StitchedSupernetForImageClassification,
)
from klas_hf.anchors.vision import VisionAnchor


def figures(options: Options) -> Iterator[Figure]:
    small, large = llamas(options, scale=2)
    stitch = halves(small.config, large.config)
    text = StitchedModel.from_anchors(small, large, stitch)
    yield _text(options, (small, large), text, stitch, "forward of 256 tokens", 256, past=0)
    yield _text(options, (small, large), text, stitch, "decode of one token after 256", 1, past=256)
    del small, large, text
    swin = [classifier(config) for config in swins(options)[::2]]
    stitch = middle(swin[0].config, swin[1].config)
    yield _image(options, swin, stitch)
    yield from _supernet(options, swin, stitch)


# ---- text


@torch.no_grad()
def _text(
    options: Options, anchors: tuple[PreTrainedModel, PreTrainedModel], text: PreTrainedModel, stitch: Stitch,
    what: str, tokens: int, past: int,
) -> Figure:  # fmt: skip
    """The stitched model's time, and the sum of its blocks' times as the anchors run them, with the ends once."""
    ids, before = (torch.randint(2, options.vocabulary, (1, n), device=options.device) for n in (tokens, max(past, 1)))
    runs = [_step(model, ids, before if past else None) for model in (text, *anchors)]
    runs += [_step(_without_blocks(anchor), ids, None) for anchor in anchors]
    times = in_turns(options.repeats if options.quick else 4 * options.repeats, *runs)  # they are short
    blocks = [
        (times[1 + place] - times[3 + place]) / anchor.config.num_hidden_layers for place, anchor in enumerate(anchors)
    ]
    depth = anchors[1].config.num_hidden_layers - stitch.target_start
    bound = stitch.source_stop * blocks[0] + depth * blocks[1] + times[4]
    return Figure(f"stitched Llamas, {what}", times[0], "its blocks inside the anchors", bound, "s", 1.03)


def _step(model: PreTrainedModel, ids: Tensor, past: Tensor | None) -> Callable[[], object]:
    """A forward, or a decode after `past` that leaves the cache as it was."""
    if past is None:
        return lambda: model(ids, use_cache=False, logits_to_keep=1)
    cache = model(past, use_cache=True).past_key_values

    def run() -> None:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return run


def _without_blocks(anchor: PreTrainedModel) -> PreTrainedModel:
    """What shares the ends of an anchor, and has no blocks."""
    empty = copy.copy(anchor)
    empty._modules = dict(anchor._modules)
    body = empty._modules["model"] = copy.copy(anchor.model)
    body._modules = dict(anchor.model._modules) | {"layers": nn.ModuleList()}
    body.config = empty.config = copy.deepcopy(anchor.config)
    empty.config.num_hidden_layers, empty.config.layer_types = 0, None
    return empty


# ---- images


@torch.no_grad()
def _image(options: Options, anchors: list[PreTrainedModel], stitch: Stitch) -> Figure:
    """The stitched model's time, and that of its parts inside the two whole anchors."""
    stitched = StitchedModel.from_anchors(*anchors, stitch)
    pixels = images(options, 1, 1)[0]["pixel_values"]
    first, last = (VisionAnchor(anchor) for anchor in anchors)
    used = [
        [*first.kind.embed, *(name for block in first.blocks[: stitch.source_stop] for name in block.modules)],
        [*(name for block in last.blocks[stitch.target_start :] for name in block.modules), *last.kind.head],
    ]
    times: list[tuple[float, float]] = []
    for _ in range(options.repeats + 1):
        parts = 0.0
        for anchor, names in zip(anchors, used, strict=True):
            with _timed(anchor, names) as taken:
                anchor(pixels)
            parts += sum(taken)
        times.append((seconds(lambda: stitched(pixels)), parts))
    ours, bound = (min(column) for column in zip(*times[1:], strict=True))
    return Figure("stitched Swins, forward", ours, "its blocks inside the anchors", bound, "s", 1.03)


@contextmanager
def _timed(network: nn.Module, names: list[str]) -> Iterator[list[float]]:
    """Seconds that each of some submodules takes in a forward of the whole."""
    begun: dict[nn.Module, float] = {}
    taken: list[float] = []
    present, handles = dict(network.named_modules()), []
    for module in (present[name] for name in names if name in present):
        handles.append(module.register_forward_pre_hook(lambda m, _: begun.__setitem__(m, time.perf_counter())))
        handles.append(module.register_forward_hook(lambda m, *_: taken.append(time.perf_counter() - begun[m])))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


# ---- a supernet


def _supernet(options: Options, anchors: list[PreTrainedModel], stitch: Stitch) -> Iterator[Figure]:
    net = StitchedSupernet.from_anchors(anchors, _beside(stitch))
    plain, batch = net.extract(stitch), images(options, 1, 1)[0]
    ours, theirs = in_turns(options.repeats, lambda: _train(net, batch, path=stitch), lambda: _train(plain, batch))
    yield Figure("supernet step, time", ours, "the path as a plain module", theirs, "s", 1.05)
    with TemporaryDirectory() as folder:
        net.config.save_pretrained(Path(folder, "supernet"))
        plain.config.save_pretrained(Path(folder, "plain"))
        ours, path = (in_child(options, f"running:{how}_step", folder)["peak"] for how in ("supernet", "plain"))
    # What a step of the plain module takes beyond its weights is one path's activations and gradients.
    bound = _mebibytes(net) + path - _mebibytes(plain)
    yield Figure("supernet step, memory", ours, "anchors + stitches + one path", bound, "MiB", 1.05)


def supernet_step(options: Options, folder: str) -> Mapping[str, float]:
    config = StitchedSupernetConfig.from_pretrained(Path(folder, "supernet"))
    return _step_memory(options, lambda: StitchedSupernetForImageClassification(config), path=config.paths[0])


def plain_step(options: Options, folder: str) -> Mapping[str, float]:
    config = AutoConfig.from_pretrained(Path(folder, "plain"))
    return _step_memory(options, lambda: AutoModelForImageClassification.from_config(config))


def _step_memory(options: Options, make: Callable[[], nn.Module], **forward: Any) -> Mapping[str, float]:
    """MiB that a process grows by to make a model and take two steps on it."""
    batch = images(options, 1, 1)[0]
    # What torch allocates for itself is there before: a convolution and a product, forth and back.
    warm = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.LazyLinear(4))
    warm(batch["pixel_values"]).sum().backward()

    def run() -> None:
        network = make()
        for _ in range(2):
            _train(network, batch, **forward)

    return growth_of(run)


def _beside(stitch: Stitch) -> list[Stitch]:
    return [Stitch(stitch.source_stop, stitch.target_start + move) for move in (0, -1, 1)]


def _train(network: nn.Module, batch: dict[str, Tensor], **options: Any) -> None:
    network.train()
    network.zero_grad(set_to_none=True)
    F.cross_entropy(network(pixel_values=batch["pixel_values"], **options).logits, batch["labels"]).backward()


def _mebibytes(module: nn.Module) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()) / 2**20
