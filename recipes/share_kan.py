"""SHARe-KAN: how small can a KAN head be made after its training, and at what cost? On digits, or your own images.

    python recipes/share_kan.py
    python recipes/share_kan.py --data imagenette --test_split val --backbone mobilenet_v1_0.25_128 --steps 150
    python recipes/share_kan.py --config recipes/share_kan_voc2007.yaml --data VOCdevkit/VOC2007

A KAN head is trained on a frozen backbone under several seeds, then compressed without data: to a codebook of shapes
(SHARe-KAN, arXiv 2512.15742) of several sizes in float32 and int8, with shapes learnt on another seed's head, by
rounding of its coefficients, and by magnitude pruning. Beside them stands an MLP of the same widths. Accuracy is
measured on held-out images and, as a transfer, on the same with noise, or on `--transfer_data`. Of images with any
number of labels (`--multi_label`: VOC, COCO) mean average precision stands for accuracy. Without data, the
backbone is a small ViT trained on scikit-learn's digits: offline, two minutes on one core.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from digits import MEAN, STD, DigitsTraining, vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed

from klas_hf import (
    KANForImageClassification,
    ResultRow,
    RowFile,
    StitchedModel,
    TrainingConfig,
    compress_kan,
    head_bytes,
    train_stitches,
)
from klas_hf.anchors.weights import fingerprint
from klas_hf.data.digits import load_digits_split
from klas_hf.data.image_processing import common_processing
from klas_hf.data.images import ImageSet, image_batches, load_images
from klas_hf.data.multilabel import MultiLabelSet, load_multilabel_images
from klas_hf.evaluation.multilabel import mean_average_precision
from klas_hf.files import write_atomically, write_folder_atomically
from klas_hf.kan.rivals import pruned_kan, rounded_kan
from klas_hf.options import input_read, parse_options
from klas_hf.plotting import Series, lines
from klas_hf.processes import process_state
from klas_hf.rows import by_model
from klas_hf.tables import format_mean, markdown_table, mean_and_error


@dataclass
class ShareKANArguments:
    data: str | None = field(
        default=None, metadata={"help": "imagefolder, parquet or Hub id of labelled images; None: the digits"}
    )
    backbone: str | None = field(default=None, metadata={"help": "Hub id or folder of an image classifier, with data"})
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    test_split: str = field(default="validation", metadata={"help": "split that everything is measured on"})
    transfer_data: str | None = field(
        default=None,
        metadata={"help": "images of the same classes to measure on too; None: the test images, with noise"},
    )
    multi_label: bool = field(
        default=False, metadata={"help": "an image has any number of labels: VOC's folders, or a column of lists"}
    )
    image_column: str = field(default="image", metadata={"help": "of parquet files and the Hub"})
    label_column: str = field(default="label", metadata={"help": "the same; a dot leads into a column of mappings"})
    image_size: int | None = field(default=None, metadata={"help": "pixels; None: the backbone's own"})
    hidden: int = field(default=64, metadata={"help": "width of the head's hidden layer"})
    intervals: int = field(default=10, metadata={"help": "of the splines' grid, which are cubic"})
    base: str = field(default="none", metadata={"help": "'none' (splines alone) or 'silu'"})
    codebooks: list[int] = field(default_factory=lambda: [16, 64, 256, 1024], metadata={"help": "numbers of shapes"})
    bits: list[int] = field(default_factory=lambda: [8, 4, 3, 2], metadata={"help": "of rounded coefficients"})
    pruned: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7], metadata={"help": "shares of edges"})
    steps: int = field(default=300, metadata={"help": "training steps of each head, 64 images each"})
    learning_rate: float = field(default=1e-2, metadata={"help": "peak learning rate of the heads"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the heads and their training"})
    output_dir: str = field(default="outputs/share_kan", metadata={"help": "where rows, table and picture go"})
    cache_dir: str = field(default="outputs/share_kan_backbone", metadata={"help": "where the digits' ViT is kept"})
    smoke: bool = field(default=False, metadata={"help": "a few steps, one seed: no result"})

    def __post_init__(self) -> None:
        if (self.data is None) != (self.backbone is None):
            raise ValueError(f"got data={self.data} and backbone={self.backbone}; expected both, or none for digits")
        if self.multi_label and self.data is None:
            raise ValueError(
                "got multi_label without data; expected images of any number of labels (the digits have one)"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"got seeds={self.seeds}; expected at least one, each once")
        if self.smoke:
            self.seeds, self.steps, self.codebooks, self.bits, self.pruned = self.seeds[:1], 2, [16, 64], [4], [0.5]


Images = ImageSet | MultiLabelSet


@dataclass(frozen=True)
class Task:
    """Images and the backbone whose features the heads read.

    Attributes:
        train, test, transfer: images; what is learnt from, and what is measured on.
        mean, std: of the normalisation.
        backbone: a stitched model of the whole classifier, whose own head is left out.
    """

    train: Images
    test: Images
    transfer: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: PreTrainedModel


def main() -> None:
    (args,) = parse_options(ShareKANArguments, description=__doc__.split("\n")[0])
    with input_read(args):
        task = digits_task(args) if args.data is None else images_task(args)
    study = Study(args, task)
    for seed in args.seeds:
        study.run(seed)
    table = study.report()
    process_state().print(f"\n{table}\nMade: {study.output}/rows.jsonl, report.md, curve.png")


# ---- data


def digits_task(args: ShareKANArguments) -> Task:
    """Digits of 8×8 pixels, and a ViT of 4 blocks that has learnt them, from the cache if it is there."""
    train, _, test = load_digits_split()
    steps = 3 if args.smoke else 300
    folder = Path(args.cache_dir) / f"vit-{steps}-steps"
    if not folder.exists():
        set_seed(0)
        model = AutoModelForImageClassification.from_config(vit(4, 32))
        config = DigitsTraining(max_steps=steps, learning_rate=4e-3, mean=list(MEAN), std=list(STD))
        train_stitches(model, train, config)
        write_folder_atomically(folder, model.save_pretrained)
    return Task(train, test, noisy(test), MEAN, STD, StitchedModel.from_path([folder], "0[:]"))


def images_task(args: ShareKANArguments) -> Task:
    """Images processed as the backbone takes them."""
    processing = common_processing([args.backbone], args.image_size)
    load = partial(load_multilabel_images if args.multi_label else load_images, processing=processing,
                   image_column=args.image_column, label_column=args.label_column)  # fmt: skip
    train = load(args.data, args.train_split)
    load = partial(load, names=train.names) if args.multi_label else load
    test = load(args.data, args.test_split)
    other = noisy(test) if args.transfer_data is None else load(args.transfer_data, args.test_split)
    for one, name in ((test, args.test_split), (other, "transfer_data")):
        if one.names != train.names:
            raise ValueError(f"got {name} of the classes {one.names[:5]} …; expected those trained on")
    backbone = StitchedModel.from_path([args.backbone], "0[:]", image_size=processing.size)
    return Task(train, test, other, processing.mean, processing.std, backbone)


def noisy(images: Images) -> Images:
    """The same images with normal noise, of an eighth of the brightness scale, always the same."""
    pixels = torch.stack([images[index][0] for index in range(len(images))])
    noise = 32 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return type(images)((pixels + noise).round().clamp(0, 255).to(torch.uint8), images.labels, images.names)


# ---- the study


def head_macs(model: KANForImageClassification) -> int:
    """MACs of the head's matrix products for one image; a look-up has hardly any."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.run_head(model.head, torch.zeros(1, model.backbone.channels[-1], device=model.device))
    return counter.get_total_flops() // 2


class Study:
    """Heads of every form, measured alike; what is in the rows is not measured again."""

    def __init__(self, args: ShareKANArguments, task: Task):
        self.args, self.task, self.output = args, task, Path(args.output_dir)
        self.backbone = fingerprint(task.backbone)
        kept = ("hidden", "intervals", "base", "codebooks", "bits", "pruned", "steps", "learning_rate")
        settings = {name: getattr(args, name) for name in kept} | ({"multi_label": True} if args.multi_label else {})
        self.rows = RowFile(self.output / "rows.jsonl", {"recipe": "share_kan", "data": args.data, **settings})
        self.heads: dict[int, KANForImageClassification] = {}
        self.features: dict[str, tuple[Tensor, Tensor]] = {}
        self.metric = "mean average precision" if args.multi_label else "accuracy"

    def run(self, seed: int) -> None:
        """Train a head and an MLP, and measure every form of the head."""
        if self.rows.find(self.row("mlp", seed)):  # the last to be written
            return
        for form, model, size in self.forms(seed):
            metrics = {"head_bytes": size} | {name: self.score(model, name) for name in ("test", "transfer")}
            row = replace(self.row(form, seed), macs=head_macs(model), metrics=metrics)
            row = replace(row, parameters=sum(one.numel() for one in model.head.parameters()))
            if self.rows.find(row) is None:
                self.rows.append(row)
            process_state().print(
                f"seed {seed}  {form:44} {size:9,} bytes  {self.metric} {metrics['test']:.4f}", flush=True
            )

    def forms(self, seed: int) -> Iterator[tuple[str, KANForImageClassification, int]]:
        """Name, model and bytes of its head."""
        dense = self.head(seed)
        yield "dense", dense, head_bytes(dense)
        for codebook in self.args.codebooks:
            for bits in (32, 8):
                small = compress_kan(dense, codebook, bits=bits, seed=seed)
                yield f"SHARe-KAN {'int8' if bits == 8 else 'fp32'}, K={codebook}", small, head_bytes(small)
        codebook = self.args.codebooks[len(self.args.codebooks) // 2]
        small = compress_kan(dense, codebook, bias="edge", seed=seed)
        yield f"SHARe-KAN int8, bias per edge, K={codebook}", small, head_bytes(small)
        shapes = compress_kan(self.head(seed + 1), codebook, bits=32, seed=seed).codebook.read()
        small = compress_kan(dense, shapes)
        yield f"SHARe-KAN int8, another head's shapes, K={codebook}", small, head_bytes(small)
        for bits in self.args.bits:
            rival = rounded_kan(dense, bits)
            yield f"rounded, int{bits}", rival.model, rival.head_bytes
        for share in self.args.pruned:
            rival = pruned_kan(dense, share)
            yield f"pruned, {share:.0%}", rival.model, rival.head_bytes
        mlp = self.mlp(seed)
        yield "mlp", mlp, head_bytes(mlp)

    def head(self, seed: int) -> KANForImageClassification:
        """A trained KAN head on the backbone."""
        if seed not in self.heads:
            set_seed(seed)
            self.heads[seed] = self.trained(self.new(), seed)
        return self.heads[seed]

    def mlp(self, seed: int) -> KANForImageClassification:
        """The same with a linear layer, GELU and another in place of the KAN layers."""
        set_seed(seed)
        model = self.new()
        inputs, hidden = model.backbone.channels[-1], self.args.hidden
        model.head = nn.Sequential(
            nn.LayerNorm(inputs, elementwise_affine=False), nn.Linear(inputs, hidden), nn.GELU(),
            nn.Linear(hidden, model.config.num_labels),
        )  # fmt: skip
        return self.trained(model, seed)

    def new(self) -> KANForImageClassification:
        """An untrained head of the study's form."""
        args, names = self.args, self.task.train.names
        return KANForImageClassification.from_backbone(
            self.task.backbone, hidden_widths=[args.hidden], grid_intervals=args.intervals, base=args.base,
            id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)},
            problem_type="multi_label_classification" if args.multi_label else None,
        )  # fmt: skip

    def trained(self, model: KANForImageClassification, seed: int) -> KANForImageClassification:
        """After the study's steps; the backbone stays as it is."""
        config = TrainingConfig(
            trainable="head", max_steps=self.args.steps, per_device_batch_size=64, gradient_accumulation_steps=1,
            learning_rate=self.args.learning_rate, mean=list(self.task.mean), std=list(self.task.std), seed=seed,
            save_steps=self.args.steps,
        )  # fmt: skip
        train_stitches(model, self.task.train, config)
        return model

    @torch.no_grad()
    def score(self, model: KANForImageClassification, name: str) -> float:
        """Accuracy or mean average precision on the test or the transfer images, whose features all heads share."""
        if name not in self.features:
            batches = image_batches(getattr(self.task, name), 64, self.task.mean, self.task.std)
            found = [(model.pooled(one["pixel_values"].to(model.device)), one["labels"]) for one in batches]
            features, labels = zip(*found, strict=True)
            self.features[name] = torch.cat(features), torch.cat(labels).to(model.device)
        features, labels = self.features[name]
        logits = torch.cat([model.run_head(model.head, part) for part in features.split(64)])
        if self.args.multi_label:
            return mean_average_precision(logits.float().cpu(), labels.cpu())
        return float((logits.argmax(-1) == labels).double().mean())

    def row(self, form: str, seed: int) -> ResultRow:
        """The row of one form of head, still without figures."""
        return ResultRow(form, None, seed, 0, 0, {}, made_from=[self.backbone], setting={"form": form})

    def report(self) -> str:
        """Table and picture of all seeds."""
        groups = by_model(self.rows.rows)
        whole = next(group[0].value("head_bytes") for group in groups if group[0].rule == "dense")
        other = "with noise" if self.args.transfer_data is None else "on the transfer images"
        cells = [["head", "bytes", "smaller", self.metric, other]]
        for group in groups:
            size = group[0].value("head_bytes")
            accuracies = [format_mean([row.value(name) for row in group]) for name in ("test", "transfer")]
            cells.append([group[0].rule, f"{size:,.0f}", f"{whole / size:.1f}×", *accuracies])
        table = markdown_table(cells)
        write_atomically(self.output / "report.md", lambda part: part.write_text(table + "\n", encoding="utf-8"))
        self.draw(groups)
        return table

    def draw(self, groups: list[list[ResultRow]]) -> None:
        """Accuracy against bytes, a line per kind of head."""
        kinds = {"dense": "dense KAN", "SHARe-KAN fp32, K": "SHARe-KAN, fp32", "SHARe-KAN int8, K": "SHARe-KAN, int8",
                 "rounded": "rounded coefficients", "pruned": "pruned edges", "mlp": "MLP"}  # fmt: skip
        series = []
        for start, label in kinds.items():
            points = sorted(
                (group[0].value("head_bytes"), *mean_and_error([row.value("test") for row in group]))
                for group in groups
                if group[0].rule.startswith(start)
            )
            sizes, means, errors = zip(*points, strict=True)
            series.append(Series(label, sizes, means, errors if len(groups[0]) > 1 else None))
        title = f"A KAN head after its training: {'digits' if self.args.data is None else Path(self.args.data).name}"
        lines(series, "bytes of the head", self.metric, title, self.output / "curve", log_x=True)


if __name__ == "__main__":
    main()
