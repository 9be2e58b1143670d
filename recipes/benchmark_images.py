"""Classifiers on image sets as the field reports them: top-1, top-5, calibration error; stitched models and anchors.

    python recipes/benchmark_images.py --models SMALL LARGE BETWEEN \\
        --sets imagenet=/data/imagenet/val v2=/data/imagenetv2-matched-frequency blur-3=/data/imagenet-c/defocus_blur/3

A set is a folder of class folders, a parquet file, or PLACE:SPLIT of a folder of splits or of parquet files or of a
Hub id. ImageNet's own classes come in the models' order;
fewer take `--labels`. `--preprocessing config.json` takes timm's published resizing and crop in place of the models'
image processors. Rows are written set by set; the same command goes on where it was interrupted.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from experiments.field import joined
from transformers import AutoModelForImageClassification, PreTrainedModel

from klas_hf import ResultRow, RowFile, measure_costs
from klas_hf.anchors.weights import fingerprint
from klas_hf.data.image_data import class_labels
from klas_hf.data.images import (
    CroppedProcessing,
    ImageSet,
    Processing,
    common_processing,
    image_batches,
    load_images,
    map_labels,
    subset,
    timm_processing,
)
from klas_hf.evaluation import classification_metrics, predict_probabilities
from klas_hf.files import write_atomically
from klas_hf.maths.mcnemar import mcnemar
from klas_hf.options import input_read, parse_options
from klas_hf.processes import process_state
from klas_hf.tables import markdown_table


@dataclass
class BenchmarkImagesArguments:
    models: list[str] = field(
        metadata={"help": "classifiers, stitched or not: folders or Hub ids; others are compared with the first"}
    )
    sets: list[str] = field(metadata={"help": "NAME=FOLDER of class folders, NAME=FILE.parquet or NAME=PLACE:SPLIT"})
    labels: str | None = field(default=None, metadata={"help": "YAML file, class name → models' label"})
    preprocessing: str | None = field(default=None, metadata={"help": "config.json of a timm model; None: the models'"})
    image_size: int | None = field(default=None, metadata={"help": "pixels of a side; None: the models' own"})
    image_column: str = field(default="image", metadata={"help": "of parquet files and Hub datasets"})
    label_column: str = field(default="label", metadata={"help": "of parquet files and Hub datasets"})
    limit: int | None = field(default=None, metadata={"help": "so many images of each set, at random: no result"})
    batch_size: int = field(default=64, metadata={"help": "images at once"})
    output_dir: str = field(default="outputs/benchmark_images", metadata={"help": "where rows and report go"})

    def __post_init__(self) -> None:
        if bad := [one for one in self.sets if not all(one.partition("="))]:
            raise ValueError(f"got sets={bad}; expected NAME=PLACE, as v2=/data/imagenetv2-matched-frequency")


def main() -> None:
    (args,) = parse_options(BenchmarkImagesArguments, description=__doc__.split("\n")[0])
    output = Path(args.output_dir)
    with input_read(args):
        processing = timm_processing(args.preprocessing) if args.preprocessing else None
        shared = processing or common_processing(args.models, args.image_size)
        named = dict(one.split("=", 1) for one in args.sets)
        sets = {name: image_set(args, place, shared) for name, place in named.items()}
        rows = RowFile(output / "rows.jsonl", {"recipe": "benchmark_images", "processing": described(shared)})
    for place in args.models:
        model = AutoModelForImageClassification.from_pretrained(place).eval().to(process_state().device)
        for name, images in sets.items():
            with input_read(args):
                row = measured(args, place, model, name, images, shared, rows)
            process_state().print(f"  {place} on {name}: {row.metrics}", flush=True)
    if process_state().is_main_process:
        text = report(rows.rows, list(sets), args)
        write_atomically(output / "report.md", lambda part: part.write_text(text, encoding="utf-8"))
        print(f"\n{text}\nMade: {output}/report.md, rows.jsonl")


def image_set(args: BenchmarkImagesArguments, place: str, processing: Processing | CroppedProcessing) -> ImageSet:
    """One set: PLACE or PLACE:SPLIT. Of a folder of class folders without a split its own name is the split."""
    given, colon, split = place.rpartition(":")
    data, split = (given, split) if colon and "/" not in split else (place, "")
    path = Path(data).expanduser()
    if not split and path.is_dir() and not any(path.rglob("*.parquet")):
        data, split = str(path.parent), path.name
    split = split or ("train" if path.is_file() else "validation")  # datasets calls a single file "train"
    images = load_images(data, split, processing, image_column=args.image_column, label_column=args.label_column)
    return images if args.limit is None or args.limit >= len(images) else subset(images, count=args.limit)


def described(processing: Processing | CroppedProcessing) -> dict[str, object]:
    """How images are prepared, as rows say it."""
    own = {"size": list(processing.size), "mean": list(processing.mean), "std": list(processing.std)}
    if isinstance(processing, Processing):
        return own | {"resize": dict(processing.resize), "resample": int(processing.processor.to_dict()["resample"])}
    return own | {"crop_pct": processing.crop_pct, "interpolation": processing.interpolation}


def measured(
    args: BenchmarkImagesArguments, place: str, model: PreTrainedModel, name: str, images: ImageSet,
    processing: Processing | CroppedProcessing, rows: RowFile,
) -> ResultRow:  # fmt: skip
    """The row of a model on a set, measured now or before."""
    labels = class_labels(images.names, model.config.id2label, args.labels)
    mapped = map_labels(images, labels)
    few = None if len(labels) == len(model.config.id2label) else tuple(sorted(labels.values()))
    cost = measure_costs(model, image_size=processing.size)
    setting = {"task": name, "images": len(images), "classes": len(labels)}
    row = ResultRow(
        Path(place).name, getattr(model.config, "path", None), 0, cost.macs, cost.parameters, {},
        training=model.config.to_dict().get("training"), made_from=[fingerprint(model)], setting=setting,
    )  # fmt: skip
    known = rows.find(row)
    if known is not None:
        return known
    batches = image_batches(mapped, args.batch_size, processing.mean, processing.std)
    probabilities, truth = predict_probabilities(model, batches, classes=few)
    right = (probabilities.argmax(1) == truth).astype(int)
    row = ResultRow(
        row.rule, row.path, 0, row.macs, row.parameters, classification_metrics(probabilities, truth),
        {"right": right.tolist(), "skipped": images.skipped, "higher_is_better": {"top1": True, "top5": True}},
        training=row.training, made_from=row.made_from, setting=setting,
    )  # fmt: skip
    rows.append(row, to_disk=process_state().is_main_process)
    return row


def report(rows: list[ResultRow], sets: list[str], args: BenchmarkImagesArguments) -> str:
    """A line per model, and on each set how the others differ from the first model, with McNemar's exact p."""
    models = joined(rows)
    names = list(dict.fromkeys(name for row in models for name in row.metrics))
    lines = [["model", "path", "M parameters", "G MACs", *names]]
    for row in sorted(models, key=lambda one: one.macs):
        cells = [row.rule, str(row.path or "–"), f"{row.parameters / 1e6:.2f}", f"{row.macs / 1e9:.3f}"]
        lines.append(cells + [f"{row.metrics[name]:.4f}" if name in row.metrics else "–" for name in names])
    pairs = [["set", "model", "less the first one", "only it", "only the first", "p"]]
    first = Path(args.models[0]).name
    for name in sets:
        right = {row.rule: np.array(row.details["right"]) for row in rows if row.setting["task"] == name}
        for model, answers in right.items():
            if model != first:
                found = mcnemar(answers, right[first])
                difference = f"{answers.mean() - right[first].mean():+.4f}"
                pairs.append([name, model, difference, str(found.only_a), str(found.only_b), f"{found.p_value:.4f}"])
    few = f"\n\n**Only {args.limit} images of each set: to try things out, not a result.**" if args.limit else ""
    head = "# Classifiers on image sets\n\ntop-1 and top-5 as shares; calibration error over 15 bins"
    return f"{head}.{few}\n\n{markdown_table(lines)}\n\n## Against {first}, image by image\n\n{markdown_table(pairs)}\n"


if __name__ == "__main__":
    main()
