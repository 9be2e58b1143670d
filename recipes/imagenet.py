"""KLAS against SN-Net and the other rules on ImageNet, or any images that the anchors' classes cover (KLAS Sec. 5).

    accelerate launch recipes/imagenet.py --config recipes/imagenet_swin.yaml --data imagenet-1k
    accelerate launch recipes/imagenet.py --config recipes/imagenette_mobilenet.yaml --data imagenette \\
        --anchors mobilenet_v1_0.25_128 mobilenet_v1_0.5_160 mobilenet_v1_0.75_192 mobilenet_v1_1.0_224

Anchors are measured first, then come probes, all scores, each rule's selection, one supernet per rule and seed, and the
curves on the test split. Data are a folder of images, parquet files or a Hub id. What is done is kept in the output
folder: an interrupted run goes on where it stopped.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.image_comparison import ComparisonSettings, ImageComparison
from experiments.image_report import report

from klas_hf import TrainingConfig
from klas_hf.data.image_data import ImageDataArguments, load_task
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state


@dataclass
class ImageNetArguments:
    output_dir: str = field(default="outputs/imagenet", metadata={"help": "where rows, scores and pictures go"})
    smoke: bool = field(default=False, metadata={"help": "a few images and steps, one seed: no result"})


def main() -> None:
    data, args, settings, training = parse_options(
        ImageDataArguments, ImageNetArguments, ComparisonSettings, TrainingConfig,
        description=__doc__.split("\n")[0],
    )  # fmt: skip
    if args.smoke:
        data = replace(data, train_images=80, test_images=40)
        settings = replace(settings, seeds=settings.seeds[:1], probe_epochs=2, rules=["klas", "random"], buckets=2)
        training = replace(training, max_steps=2, per_device_batch_size=8)
    state = process_state()
    state.print(f"{state.num_processes} process(es) on {state.device}")
    with input_read(data):
        task = load_task(data)
    state.print(
        f"{len(task.train)} images to train on, {len(task.validation)} to score on, {len(task.test)} to measure on; "
        f"{task.size[0]}×{task.size[1]} pixels; {task.train.skipped + task.test.skipped} corrupt ones left out"
    )
    names = [Path(anchor).name for anchor in data.anchors]
    about = {"data": data.data, "data_seed": data.data_seed}
    comparison = ImageComparison(data.anchors, names, task, settings, training, args.output_dir, about)
    comparison.run()
    state.print(report(comparison))
    state.print(f"\nMade: {args.output_dir}/report.md, stitches.md, rows.jsonl, curve.png, probes.png, heatmap-*.png")


if __name__ == "__main__":
    main()
