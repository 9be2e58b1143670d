"""Families of the studies: two anchors each, trained here or given, and the data to heal and to measure them on."""

from dataclasses import dataclass, field
from pathlib import Path

import digits
import quickstart
import small_llamas
import torch
from experiments.every_size import Family
from experiments.language_study import TextTask
from transformers import AutoModelForImageClassification, PreTrainedTokenizerBase

from klas_hf.data.digits import load_digits_split
from klas_hf.data.image_data import ImageDataArguments, load_task
from klas_hf.data.images import ImageSet, image_batches
from klas_hf.data.text import TextBatches, held_out, python_documentation, text_examples, text_sequences
from klas_hf.processes import process_state

LLAMAS = ("quickstart", *small_llamas.PAIRS)
FAMILIES = (*LLAMAS, "stories", *digits.FAMILIES, "images")
FITTED, BATCH = 256, 16  # sequences that joints are fitted to, and of a batch where nothing is trained


@dataclass
class FamilyArguments:
    """Which anchors and which data."""

    family: str = field(default="quickstart", metadata={"help": f"one of {', '.join(FAMILIES)}"})
    anchors: list[str] | None = field(
        default=None, metadata={"help": "of stories a Llama; of images two classifiers, the cheap one first"}
    )
    data: list[str] | None = field(
        default=None, metadata={"help": "of Llamas a file to heal on and one to measure on; of images folder or Hub id"}
    )
    labels: str | None = field(default=None, metadata={"help": "of images: YAML file, class name → anchors' label"})
    test_split: str = field(default="validation", metadata={"help": "of images: what is measured on"})
    image_size: int | None = field(default=None, metadata={"help": "of images, in pixels; None: the anchors' own"})
    batch_size: int = field(default=32, metadata={"help": "of images, while healing"})
    mirrored: bool = field(default=False, metadata={"help": "digits: healed and measured on mirrored ones"})
    cache_dir: str = field(default="outputs/study_anchors", metadata={"help": "where trained anchors are kept"})
    anchor_steps: int | None = field(default=None, metadata={"help": "training steps of each anchor; None: its own"})

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"got family={self.family!r}; expected one of {list(FAMILIES)}")
        anchors = {"stories": (1,), "images": (2,)}.get(self.family, (0,))
        data = {"stories": (2,), "images": (1,)}.get(self.family, (0, 2) if self.family in LLAMAS else (0,))
        for name, counts in (("anchors", anchors), ("data", data)):
            if len(getattr(self, name) or []) not in counts:
                raise ValueError(
                    f"got {name}={getattr(self, name)} for the family {self.family}; expected "
                    f"{' or '.join(map(str, counts))}: a Llama and two texts for stories, two classifiers and their "
                    "images for images, no anchors for the others, and two texts or none for Llamas"
                )
        if self.mirrored and self.family not in digits.FAMILIES:
            raise ValueError(f"got mirrored for the family {self.family}; expected one of {list(digits.FAMILIES)}")


def family_of(args: FamilyArguments, count: int | None = None) -> Family:
    """The two anchors of a family, from the cache or trained now, and all of their data or so many of each part."""
    cache = Path(args.cache_dir)
    if args.family in digits.FAMILIES:
        return digits_family(args.family, cache, args.anchor_steps, count, args.mirrored)
    if args.family == "images":
        return images_family(args, count)
    if args.family == "stories":
        models, task = small_llamas.sibling_pair(*args.anchors, *args.data, cache, args.anchor_steps)
        return text_family(args.family, models, task, count)
    if args.family == "quickstart":
        models, task, tokenizer = quickstart_pair(cache / "quickstart", args.anchor_steps)
    else:
        models, task, tokenizer = small_llamas.documentation_pair(args.family, cache, args.anchor_steps)
    if args.data is None:
        return text_family(args.family, models, task, count)
    return text_family(f"{args.family}-new", models, small_llamas.story_task(*args.data, tokenizer, task.length), count)


def text_family(name: str, models: list, task: TextTask, count: int | None) -> Family:
    """Two Llamas, and all of the text or so many sequences of each part."""
    train, validation, test = (part[:count] for part in (task.train, task.validation, task.test))
    device = process_state().device
    return Family(
        name, (models[0].to(device), models[1].to(device)), text_examples(train), text_examples(validation),
        TextBatches(train[:: max(1, len(train) // FITTED)], BATCH), TextBatches(validation, BATCH),
        TextBatches(test, 2 * BATCH), tokens=task.length,
        healing={"per_device_batch_size": 8 // process_state().num_processes or 1},
    )  # fmt: skip


def quickstart_pair(cache: Path, steps: int | None) -> tuple[list, TextTask, PreTrainedTokenizerBase]:
    """The quickstart's two Llamas, its text and its tokenizer."""
    arguments = quickstart.QuickstartArguments(cache_dir=str(cache))
    if steps is not None:
        arguments.small_steps = arguments.large_steps = steps
    train_texts, test_texts = held_out(python_documentation())
    small, large, tokenizer = quickstart.anchors(arguments, train_texts, process_state())
    parts = (train_texts, test_texts[::2], test_texts[1::2])
    train, validation, test = (text_sequences(texts, tokenizer, quickstart.LENGTH) for texts in parts)
    held = small_llamas.spread(validation, 128), small_llamas.spread(test, 256)  # of all documents, not the first few
    return [small, large], TextTask(train, *held, quickstart.LENGTH), tokenizer


def digits_family(name: str, cache: Path, steps: int | None, count: int | None, mirrored: bool) -> Family:
    """The cheapest and the dearest of a family's classifiers, and all digits or so many; their accuracy counts."""
    parts = load_digits_split(scale=digits.SCALE.get(name, 1))
    train, validation, test = (part.select(list(range(len(part)))[:count]) for part in parts)
    task = digits.ImageTask(train, validation, test, digits.MEAN, digits.STD)  # what the anchors learn
    arguments = digits.DigitsArguments() if steps is None else digits.DigitsArguments(anchor_steps=steps)
    folder = cache / f"{name}-{arguments.anchor_steps}-steps"
    configs = list(digits.FAMILIES[name].items())
    small, large = (
        digits.anchor(one, config, task, arguments, folder).to(process_state().device)
        for one, config in (configs[0], configs[-1])
    )
    if mirrored:
        train, validation, test = (mirror(part) for part in (train, validation, test))
    fitting, scored, measured = (image_batches(part, 64, digits.MEAN, digits.STD) for part in (train, validation, test))
    return Family(
        f"{name}-new" if mirrored else name, (small, large), train, validation, fitting, scored, measured,
        metric="accuracy",
        image_size=digits.SIZE * digits.SCALE.get(name, 1), probing={"validation": scored},
        healing={"per_device_batch_size": 64, "mean": list(digits.MEAN), "std": list(digits.STD), "weight_decay": 0.05},
    )  # fmt: skip


def mirror(images: ImageSet) -> ImageSet:
    """The same images with left and right exchanged."""
    turned = torch.stack([images[place][0].flip(-1) for place in range(len(images))])
    return ImageSet(turned, images.labels, images.names)


def images_family(args: FamilyArguments, count: int | None) -> Family:
    """Two classifiers of the same classes and images that these cover; accuracy among the data's classes counts."""
    source = ImageDataArguments(
        args.data[0], args.anchors, test_split=args.test_split, labels=args.labels, image_size=args.image_size,
        validation_share=0.2, train_images=count, test_images=count,
    )  # fmt: skip
    task = load_task(source)
    device = process_state().device
    small, large = (AutoModelForImageClassification.from_pretrained(one).to(device) for one in args.anchors)
    few = task.train.select(list(range(min(FITTED, len(task.train)))))
    fitting, scored, measured = (
        image_batches(part, args.batch_size, task.mean, task.std) for part in (few, task.validation, task.test)
    )
    return Family(
        "images", (small, large), task.train, task.validation, fitting, scored, measured,
        metric="accuracy" if task.classes is None else "accuracy_among",
        image_size=task.size[0], probing={"validation": scored}, classes=task.classes,
        healing={"per_device_batch_size": args.batch_size, "mean": list(task.mean), "std": list(task.std)},
    )  # fmt: skip
