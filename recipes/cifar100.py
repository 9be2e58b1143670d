"""KLAS against SN-Net and the other rules on CIFAR-100, or any images with classes of their own (KLAS Fig. 7).

    accelerate launch recipes/cifar100.py --config recipes/cifar100_swin.yaml

Anchors that know other classes (ImageNet's, say) get a new head and are fine-tuned on the training split first, once,
and kept in the cache folder. The rest is as in recipes/imagenet.py.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.image_comparison import ComparisonSettings, ImageComparison, ImageTask
from experiments.image_report import report
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from klas_hf import TrainingConfig, train_stitches
from klas_hf.data.image_data import ImageDataArguments, load_task
from klas_hf.files import write_folder_atomically
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state


@dataclass
class CifarArguments:
    output_dir: str = field(default="outputs/cifar100", metadata={"help": "where rows, scores and pictures go"})
    cache_dir: str = field(default="outputs/cifar100_anchors", metadata={"help": "where fine-tuned anchors are kept"})
    anchor_epochs: float = field(default=10.0, metadata={"help": "epochs of an anchor that gets a new head"})
    anchor_learning_rate: float = field(default=1e-4, metadata={"help": "its peak learning rate"})
    smoke: bool = field(default=False, metadata={"help": "a few images and steps, one seed: no result"})


def main() -> None:
    data, args, settings, training = parse_options(
        ImageDataArguments, CifarArguments, ComparisonSettings, TrainingConfig,
        description=__doc__.split("\n")[0],
    )  # fmt: skip
    if args.smoke:
        data = replace(data, train_images=80, test_images=40)
        settings = replace(settings, seeds=settings.seeds[:1], probe_epochs=2, rules=["klas", "random"], buckets=2)
        training, args.anchor_epochs = replace(training, max_steps=2, per_device_batch_size=8), 0.1
    state = process_state()
    state.print(f"{state.num_processes} process(es) on {state.device}")
    with input_read(data):
        task = load_task(data, own_labels=True)
    state.print(
        f"{len(task.train)} images to train on, {len(task.validation)} to score on, {len(task.test)} to measure on; "
        f"{task.train.skipped + task.test.skipped} corrupt ones left out"
    )
    anchors = [fine_tuned(anchor, task, args, training) for anchor in data.anchors]
    names = [Path(anchor).name for anchor in data.anchors]
    about = {"data": data.data, "data_seed": data.data_seed}
    comparison = ImageComparison(anchors, names, task, settings, training, args.output_dir, about)
    comparison.run()
    state.print(report(comparison))
    state.print(f"\nMade: {args.output_dir}/report.md, stitches.md, rows.jsonl, curve.png, probes.png, heatmap-*.png")


def fine_tuned(anchor: str, task: ImageTask, args: CifarArguments, training: TrainingConfig) -> PreTrainedModel | str:
    """The anchor itself where it knows the data's classes, else with a new head, trained on them."""
    names = dict(enumerate(task.train.names))
    if list(AutoConfig.from_pretrained(anchor).id2label.values()) == list(names.values()):
        return anchor
    folder = Path(args.cache_dir) / Path(anchor).name
    if not folder.exists():
        model = AutoModelForImageClassification.from_pretrained(
            anchor, num_labels=len(names), id2label=names, label2id={name: n for n, name in names.items()},
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        config = replace(
            training, trainable="full", epochs=args.anchor_epochs, max_steps=None, distillation_weight=0.0,
            drop_path=None, learning_rate=args.anchor_learning_rate, stitch_learning_rate=None, low_rank_stitches=0,
            sampling="uniform", mean=list(task.mean), std=list(task.std),
        )  # fmt: skip
        result = train_stitches(model, task.train, config, output_dir=Path(args.cache_dir) / f"{folder.name}-run")
        process_state().print(f"{folder.name}: a new head, {result}")
        if process_state().is_main_process:
            write_folder_atomically(folder, model.save_pretrained)
        process_state().wait_for_everyone()
    return AutoModelForImageClassification.from_pretrained(folder)


if __name__ == "__main__":
    main()
