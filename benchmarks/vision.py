"""What stitching image classifiers costs beside its bounds, as ratios in one run.

    python benchmarks/vision.py

Anchors are random models of published shapes: Swin-T, -S and -B, ResNet-18 and -50, and a ViT-S of fewer blocks. What
is compared is run in turns, and medians count, so that a busy machine slows both. Loading and memory are measured in
processes of their own.
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from klas_hf import (
    StitchedModel,
    StitchedSupernet,
    StitchedSupernetForImageClassification,
    measure_stitch_costs,
    score_stitches,
    train_probes,
)
from klas_hf.anchors.images import image_batches
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.paths import Stitch
from klas_hf.probes import ImageProbeConfig, ImageProbeNet
from klas_hf.scores.compared import ImageScoring

CLASSES = 1000


@dataclass
class Options:
    repeats: int = field(default=5, metadata={"help": "turns that medians are over; the first is a warm-up besides"})
    loads: int = field(
        default=2, metadata={"help": "processes that load each model, after one to warm up; 0: all in this process"}
    )
    images: int = field(default=20, metadata={"help": "images of the probes' and of the scoring pass"})
    vit_blocks: int = field(default=6, metadata={"help": "blocks of the ViT whose probes are trained"})
    threads: int = field(default=1, metadata={"help": "torch threads"})
    smoke: bool = field(default=False, metadata={"help": "tiny models, one turn: no result"})
    child: str | None = field(default=None, metadata={"help": "internal: what a child process measures"})
    folder: str | None = field(default=None, metadata={"help": "internal: where the models are"})

    def __post_init__(self) -> None:
        if self.smoke:
            self.repeats, self.loads, self.images, self.vit_blocks = 1, 0, 10, 2


def main() -> None:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "the stitching layer is random")
    if options.child:
        print(json.dumps(CHILDREN[options.child](options, Path(options.folder))))
        return
    print(f"torch {torch.__version__}, {options}\n")
    print("| what | ours | bound | ratio | aim |\n|---|---|---|---|---|")
    probing(options)
    small, large = (model(config) for config in swins(options.smoke)[::2])
    supernet(options, small, large)
    counting(options)
    with tempfile.TemporaryDirectory() as name:
        loading(options, small, large, Path(name))
    running(options, small, large)
    scoring(options)


# ---- shapes


def swins(smoke: bool) -> list[PreTrainedConfig]:
    """Swin-T, -S and -B, or three tiny ones."""
    if smoke:
        common = {"image_size": 64, "window_size": 2, "num_heads": [1, 2, 2, 2], "num_labels": CLASSES}
        shapes = [(8, [1, 1, 2, 1]), (8, [1, 1, 4, 1]), (12, [1, 1, 4, 1])]
        return [SwinConfig(embed_dim=width, depths=depths, **common) for width, depths in shapes]
    shapes = [(96, [2, 2, 6, 2], 3), (96, [2, 2, 18, 2], 3), (128, [2, 2, 18, 2], 4)]
    return [
        SwinConfig(
            embed_dim=width, depths=depths, num_heads=[heads * 2**stage for stage in range(4)], num_labels=CLASSES
        )
        for width, depths, heads in shapes
    ]


def resnets(smoke: bool) -> list[PreTrainedConfig]:
    """ResNet-18 and -50, or two tiny ones."""
    small = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8} if smoke else {
        "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]
    }  # fmt: skip
    large = {"hidden_sizes": [32, 64], "depths": [2, 2], "embedding_size": 8} if smoke else {}
    return [
        ResNetConfig(layer_type="basic", num_labels=CLASSES, **small),
        ResNetConfig(layer_type="bottleneck", num_labels=CLASSES, **large),
    ]


def vit(options: Options) -> PreTrainedConfig:
    """ViT-S/16 with fewer blocks, or a tiny ViT."""
    size = {"image_size": 64, "hidden_size": 16} if options.smoke else {"image_size": 224, "hidden_size": 384}
    return ViTConfig(
        num_hidden_layers=options.vit_blocks, num_attention_heads=size["hidden_size"] // 16 // 4 or 1,
        intermediate_size=4 * size["hidden_size"], num_labels=CLASSES, **size,
    )  # fmt: skip


def model(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForImageClassification.from_config(copy.deepcopy(config)).eval()


def batches(options: Options, batch_size: int, count: int) -> list[dict[str, Tensor]]:
    size = 64 if options.smoke else 224
    return [
        {"pixel_values": torch.randn(batch_size, 3, size, size), "labels": torch.randint(0, CLASSES, (batch_size,))}
        for _ in range(count)
    ]


def middle(small: PreTrainedConfig, large: PreTrainedConfig) -> Stitch:
    """The stitch from the middle of the third stage of one Swin to that of another."""
    places = [sum(config.depths[:2]) + config.depths[2] // 2 for config in (small, large)]
    return Stitch(*places)


# ---- measuring


def report(what: str, ours: float, bound: float, aim: str) -> None:
    print(f"| {what} | {ours:.4g} | {bound:.4g} | {ours / max(bound, 1e-9):.3f} | {aim} |", flush=True)


def in_turns(repeats: int, *runs: Callable[[], object], warm_up: bool = True) -> list[float]:
    """Median seconds of each of several runs, which take turns after a warm-up of all, or of the first alone."""
    for run in runs if warm_up else runs[:1]:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, seconds in zip(runs, times, strict=True):
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
    return [median(seconds) for seconds in times]


def in_children(
    repeats: int, folder: Path, options: Options, *names: str, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Medians of what child processes measure; they take turns after a warm-up of all."""
    if not repeats:
        return {name: CHILDREN[name](options, folder) for name in names}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats + warm_up):
        for name in names:
            command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
            command += ["--threads", str(options.threads), *(["--smoke"] if options.smoke else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {
        name: {key: median(one[key] for one in measured[warm_up:]) for key in measured[0]}
        for name, measured in found.items()
    }


def resident(kind: str) -> int:
    """KiB resident now (VmRSS) or at most so far (VmHWM), on Linux; getrusage would report the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind))


def kib(module: nn.Module) -> float:
    """KiB of all tensors of a module."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()) / 1024


# ---- probes


def probing(options: Options) -> None:
    """All probes in one pass against one run per block."""
    anchor = VisionAnchor(model(vit(options)))
    batch_size = max(1, options.images // 5)
    train = batches(options, batch_size, 4)
    held = batches(options, batch_size, 1)
    config = ImageProbeConfig(epochs=3, patience=3)
    blocks = range(anchor.num_blocks)

    def together() -> None:
        train_probes(anchor, train, copy.deepcopy(config), validation=held)

    def alone(*, whole: bool) -> None:
        for block in blocks:
            one_probe(anchor, train, held, config, block, None if whole else block + 1)

    seconds = in_turns(1, together, lambda: alone(whole=True), lambda: alone(whole=False), warm_up=False)
    aim = 0.8 * anchor.num_blocks
    report(f"one run per block against all {len(blocks)} probes in one pass, s", *seconds[1::-1], f">= {aim:.1f}")
    report("the same, each run stopping at its block, s", seconds[2], seconds[0], "for information")


def one_probe(
    anchor: VisionAnchor,
    train: list[dict[str, Tensor]],
    held: list[dict[str, Tensor]],
    config: ImageProbeConfig,
    block: int,
    stop: int | None,
) -> None:
    """The probe of one block by itself: features of this block alone, kept, then the epochs."""

    def features(data: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [
            (anchor.kind.pooled(anchor.states(batch, stop)[block + 1]), batch.labels) for batch in image_batches(data)
        ]

    kept, validation = features(train), features(held)
    every = torch.cat([x for x, _ in kept])
    mean, spread = every.mean(0), every.std(0)
    probe = nn.Linear(every.shape[1], CLASSES)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for _ in range(config.epochs):
        for x, labels in kept:
            optimizer.zero_grad()
            F.cross_entropy(probe((x - mean) / spread), labels).backward()
            optimizer.step()
        with torch.no_grad():
            for x, labels in validation:
                F.cross_entropy(probe((x - mean) / spread), labels)


# ---- supernet


def supernet(options: Options, small: PreTrainedModel, large: PreTrainedModel) -> None:
    """A step on one path of a supernet against the same path as a plain module."""
    stitch = middle(small.config, large.config)
    others = [Stitch(stitch.source_stop, stitch.target_start + move) for move in (-1, 1)]
    net = StitchedSupernet.from_anchors([small, large], [stitch, *others])
    plain = net.extract(stitch)
    batch = batches(options, 1, 1)[0]
    ours, bound = in_turns(options.repeats, lambda: step(net, batch, path=stitch), lambda: step(plain, batch))
    report("supernet step (forward and backward) against the path as a module, s", ours, bound, "<= 1.05")
    with tempfile.TemporaryDirectory() as name:
        net.config.save_pretrained(Path(name) / "supernet")
        plain.config.save_pretrained(Path(name) / "plain")
        weights = kib(net)
        found = in_children(min(options.loads, 1), Path(name), options, "supernet_step", "plain_step", warm_up=0)
    # The path's activations and gradients are what a step of the plain module takes beyond its weights.
    one_path = found["plain_step"]["peak"] - found["plain_step"]["weights"]
    report(
        "its peak memory against anchors + stitches + one path, KiB", found["supernet_step"]["peak"],
        weights + one_path, "<= 1.05",
    )  # fmt: skip


def step(network: nn.Module, batch: dict[str, Tensor], **options: object) -> None:
    network.train()
    network.zero_grad(set_to_none=True)
    logits = network(pixel_values=batch["pixel_values"], **options).logits
    F.cross_entropy(logits, batch["labels"]).backward()


def supernet_step(options: Options, folder: Path) -> dict[str, float]:
    config = StitchedSupernet.config_class.from_pretrained(folder / "supernet")
    make = StitchedSupernetForImageClassification
    return step_memory(options, lambda: make(config), path=config.paths[0])


def plain_step(options: Options, folder: Path) -> dict[str, float]:
    config = AutoConfig.from_pretrained(folder / "plain")
    return step_memory(options, lambda: AutoModelForImageClassification.from_config(config))


def step_memory(options: Options, make: Callable[[], nn.Module], **forward: object) -> dict[str, float]:
    """KiB that the process grew by with a model in it, and at the peak of steps on it."""
    batch = batches(options, 1, 1)[0]
    # What torch allocates for itself is there before: a convolution and a product, forth and back.
    warm = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.LazyLinear(4))
    warm(batch["pixel_values"]).sum().backward()
    before = resident("VmRSS")
    network = make()
    weights = kib(network)
    for _ in range(2):
        step(network, batch, **forward)
    return {"weights": weights, "peak": resident("VmHWM") - before}


# ---- costs, loading


def counting(options: Options) -> None:
    configs = swins(options.smoke)
    begun = time.perf_counter()
    pairs = [measure_stitch_costs(configs[a], configs[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    stitches = sum(int(pair.possible.sum()) for pair in pairs)
    seconds = time.perf_counter() - begun
    report(f"costs of all {stitches} stitches of Swin Ti/S/B, s", seconds, 10, "<= 1 (10 s)")


def loading(options: Options, small: PreTrainedModel, large: PreTrainedModel, folder: Path) -> None:
    """`from_anchors` of two folders against `from_pretrained` of the stitched model."""
    stitch = middle(small.config, large.config)
    small.save_pretrained(folder / "source")
    large.save_pretrained(folder / "target")
    StitchedModel.from_anchors(folder / "source", folder / "target", stitch).save_pretrained(folder / "stitched")
    found = in_children(options.loads, folder, options, "load_anchors", "load_stitched")
    for key, unit, aim in (("seconds", "s", "<= 1.1"), ("peak", "peak KiB", "<= 1.05")):
        values = [found[name][key] for name in ("load_anchors", "load_stitched")]
        report(f"from_anchors of Swin-T and -B against from_pretrained, {unit}", *values, aim)


def load_anchors(options: Options, folder: Path) -> dict[str, float]:
    small, large = swins(options.smoke)[::2]
    return load(lambda: StitchedModel.from_anchors(folder / "source", folder / "target", middle(small, large)))


def load_stitched(options: Options, folder: Path) -> dict[str, float]:
    return load(lambda: AutoModelForImageClassification.from_pretrained(folder / "stitched"))


def load(make: Callable[[], nn.Module]) -> dict[str, float]:
    """Seconds, and KiB that the process grew by at its peak, to load a model and touch all its weights."""
    before = resident("VmRSS")
    begun = time.perf_counter()
    network = make()
    for parameter in network.parameters():
        parameter.sum()
    return {"seconds": time.perf_counter() - begun, "peak": resident("VmHWM") - before}


CHILDREN: dict[str, Callable[[Options, Path], dict[str, float]]] = {
    "supernet_step": supernet_step,
    "plain_step": plain_step,
    "load_anchors": load_anchors,
    "load_stitched": load_stitched,
}


# ---- forward, scoring


@torch.no_grad()
def running(options: Options, small: PreTrainedModel, large: PreTrainedModel) -> None:
    """The stitched forward against the time of its parts inside the two whole anchors."""
    stitch = middle(small.config, large.config)
    stitched = StitchedModel.from_anchors(small, large, stitch)
    pixels = batches(options, 1, 1)[0]["pixel_values"]
    first, last = VisionAnchor(small), VisionAnchor(large)
    used = [
        [*first.kind.embed, *(name for block in first.blocks[: stitch.source_stop] for name in block.modules)],
        [*(name for block in last.blocks[stitch.target_start :] for name in block.modules), *last.kind.head],
    ]
    times: list[list[float]] = [[], []]
    for _ in range(options.repeats + 1):
        parts = 0.0
        for network, names in zip((small, large), used, strict=True):
            with timed(network, names) as seconds:
                network(pixels)
            parts += sum(seconds)
        begun = time.perf_counter()
        stitched(pixels)
        times[0].append(time.perf_counter() - begun)
        times[1].append(parts)
    ours, bound = (median(seconds[1:]) for seconds in times)
    report("stitched forward against its parts inside the anchors, s", ours, bound, "<= 1.03")


@contextmanager
def timed(network: nn.Module, names: list[str]) -> Iterator[list[float]]:
    """Seconds that each of some submodules takes in a forward of the whole."""
    begun, seconds = {}, []
    present = dict(network.named_modules())
    handles = []
    for module in (present[name] for name in names if name in present):
        handles.append(module.register_forward_pre_hook(lambda m, _: begun.__setitem__(m, time.perf_counter())))
        handles.append(module.register_forward_hook(lambda m, *_: seconds.append(time.perf_counter() - begun[m])))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def scoring(options: Options) -> None:
    """A scoring pass of ResNet-18 and -50 against both forwards alone."""
    anchors = [model(config) for config in resnets(options.smoke)]
    data = batches(options, max(1, options.images // 5), 3)
    learnt = batches(options, 2, 2)
    probes = tuple(train_probes(one, learnt, ImageProbeConfig(epochs=1), validation=learnt[:1]) for one in anchors)
    assert all(isinstance(probe, ImageProbeNet) for probe in probes)

    def forwards() -> None:
        with torch.no_grad():
            for batch in data:
                for one in anchors:
                    one(batch["pixel_values"])

    def scored(moment_images: int, count: int = len(data)) -> None:
        score_stitches(
            *anchors, data[:count], probes=probes, images=ImageScoring(moment_images=moment_images), score="klas"
        )

    scored(0, count=1)
    plain, bare = in_turns(min(options.repeats, 3), forwards, lambda: scored(0), warm_up=False)
    begun = time.perf_counter()
    scored(options.images)
    full = time.perf_counter() - begun
    report("scoring pass, ResNet-18 → 50, against both forwards, s", bare, plain, "for information")
    report("the same, every image also for CKA and DM, s", full, plain, "for information")


if __name__ == "__main__":
    main()
