"""KLAS against SN-Net and the other rules on semantic segmentation, in a few cost buckets (KLAS Sec. 5.4, Tab. 5).

    accelerate launch recipes/segmentation.py --config recipes/ade20k_mask2former.yaml --data ADE20K
    accelerate launch recipes/segmentation.py --config recipes/camvid_mobilenet.yaml --data camvid \\
        --anchors mobilenet_v1_0.25_128 mobilenet_v1_1.0_224

Anchors are segmentation models, or image classifiers that get a new head and are trained first. Then come probes,
scores and a search, one path for every rule and bucket, each trained alike with its head frozen, and mean IoU over
MACs. Data are a folder `<split>/images`, `<split>/labels`, or a Hub id. What is done is kept in the output folder: an
interrupted run goes on where it stopped.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from experiments.segmentation_comparison import SegmentationComparison, SegmentationSettings, SegmentationTask
from experiments.segmentation_report import report
from transformers import AutoConfig, UperNetConfig

from klas_hf import StitchedModel, TrainingConfig, train_stitches
from klas_hf.anchors.dense import is_dense
from klas_hf.data.segmentation import SegmentationSet, load_segmentation
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state


@dataclass
class SegmentationArguments:
    """Which images and which anchors."""

    data: str = field(metadata={"help": "folder with <split>/images and <split>/labels, or Hub id"})
    anchors: list[str] = field(metadata={"help": "Hub ids or folders, cheapest first: dense models, or classifiers"})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "of the numbers in the masks, from 0; None: the anchors' own"}
    )
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    validation_split: str = field(default="validation", metadata={"help": "split that paths are scored on"})
    test_split: str = field(default="test", metadata={"help": "split that everything is measured on"})
    image_column: str = field(default="image", metadata={"help": "of Hub datasets"})
    label_column: str = field(default="annotation", metadata={"help": "of Hub datasets"})
    image_size: list[int] = field(
        default_factory=lambda: [512, 512], metadata={"help": "height and width that images are resized to, in pixels"}
    )
    void: list[int] = field(default_factory=list, metadata={"help": "numbers in the masks that are no class"})
    reduce_labels: bool = field(default=False, metadata={"help": "0 in the masks is no class, 1 the first (ADE20K)"})
    head_width: int = field(default=256, metadata={"help": "of the UperNet that classifiers get as their head"})
    anchor_steps: int = field(default=300, metadata={"help": "training steps of such anchors, head and all"})
    train_images: int | None = field(default=None, metadata={"help": "use at most so many training images"})
    test_images: int | None = field(default=None, metadata={"help": "use at most so many of each other split"})
    output_dir: str = field(default="outputs/segmentation", metadata={"help": "where rows and pictures go"})
    smoke: bool = field(default=False, metadata={"help": "a few images and steps: no result"})

    def __post_init__(self) -> None:
        if len(self.anchors) != 2:
            raise ValueError(f"got {len(self.anchors)} anchors; expected two, the cheaper one first")
        if len(self.image_size) != 2:
            raise ValueError(f"got image_size={self.image_size}; expected height and width")


def main() -> None:
    args, settings, training = parse_options(
        SegmentationArguments, SegmentationSettings, TrainingConfig, description=__doc__.split("\n")[0]
    )
    if args.smoke:
        args = replace(args, train_images=8, test_images=4, anchor_steps=2)
        settings = replace(settings, probe_epochs=1, rules=["klas", "random"], calibration_images=4)
        training = replace(training, max_steps=2, per_device_batch_size=4)
    with input_read(args):
        task = load_task(args)
        anchors = [with_head(anchor, place, args, task, training) for place, anchor in enumerate(args.anchors)]
    comparison = SegmentationComparison(anchors, task, settings, training, args.output_dir, {"data": args.data})
    comparison.run()
    process_state().print(report(comparison))
    process_state().print(f"\nMade: {args.output_dir}/report.md, rows.jsonl, curve.png, predictions.png")


def load_task(args: SegmentationArguments) -> SegmentationTask:
    """The images, of one size."""
    names = args.class_names
    if names is None:
        config = AutoConfig.from_pretrained(args.anchors[-1])
        if not is_dense(config):
            raise ValueError("got no class_names for classifiers as anchors; expected the names of the masks' numbers")
        names = [config.id2label[number] for number in range(config.num_labels)]

    def split(name: str, most: int | None) -> SegmentationSet:
        found = load_segmentation(
            args.data, name, names, (args.image_size[0], args.image_size[1]), image_column=args.image_column,
            label_column=args.label_column, void=args.void, reduce_labels=args.reduce_labels,
        )  # fmt: skip
        return found if most is None else found.select(range(min(most, len(found))))

    return SegmentationTask(
        train=split(args.train_split, args.train_images),
        validation=split(args.validation_split, args.test_images),
        test=split(args.test_split, args.test_images),
    )


def with_head(
    anchor: str, place: int, args: SegmentationArguments, task: SegmentationTask, training: TrainingConfig
) -> Any:
    """A dense anchor: the one named, or a classifier with a UperNet, trained here once and kept."""
    if is_dense(AutoConfig.from_pretrained(anchor)):
        return anchor
    folder = Path(args.output_dir) / "anchors" / str(place)
    if not (folder / "model.safetensors").exists():
        names = task.train.names
        head = UperNetConfig(
            id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)},
            hidden_size=args.head_width, auxiliary_channels=args.head_width,
        )  # fmt: skip
        torch.manual_seed(training.seed)
        model = StitchedModel.from_path([anchor], "0[:]", head=head, image_size=task.train.size)
        config = replace(training, trainable="full", max_steps=args.anchor_steps, batch_norm="train")
        train_stitches(model, task.train, config, output_dir=folder.parent / f"{place}-checkpoints")
        if process_state().is_main_process:
            model.save_pretrained(folder)
        process_state().wait_for_everyone()
    return str(folder)


if __name__ == "__main__":
    main()
