"""Data of a command: text files for language models, an image folder for classifiers; both as batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from klas_hf.stitching import StitchedSupernetForCausalLM

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".xlsx")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of every command that reads data; those for images have the names that they have in the recipes."""

    data: str = field(
        metadata={"help": "text file or folder of .txt files; for images <split>/<class>/<image>, parquet, Hub id"}
    )
    length: int = field(default=128, metadata={"metavar": "N", "help": "tokens of a sequence"})
    batch_size: int = field(default=16, metadata={"metavar": "N", "help": "sequences or images at once"})
    samples: int | None = field(default=None, metadata={"metavar": "N", "help": "use at most so many of them"})
    labels: str | None = field(
        default=None, metadata={"metavar": "YAML", "help": "class of the images: the models' label"}
    )
    image_size: int | None = field(
        default=None, metadata={"metavar": "N", "help": "pixels of a side, if not the models' own"}
    )
    image_column: str = field(default="image", metadata={"metavar": "NAME", "help": "in a table of images"})
    label_column: str = field(default="label", metadata={"metavar": "NAME", "help": "in a table of images"})

    def __post_init__(self) -> None:
        for name, least in (("length", 3), ("batch_size", 1), ("samples", 1), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"got {name}={value}; expected at least {least}")


@dataclass(frozen=True)
class Material:
    """Data as the models take them.

    Attributes:
        batches: for calibration, scoring and evaluation; can be read several times.
        examples: for `train_stitches`.
        processor: the tokenizer or image processor that made them.
        image_moments: mean and deviation of the normalisation of images; None for text.
    """

    batches: Iterable[Any]
    examples: Any
    processor: Any
    image_moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def load_material(options: DataOptions, models: Sequence[str], split: str) -> Material:
    """Read text or images, as the models (Hub ids or folders) ask for; the last one's tokenizer or processor counts.

    Args:
        split: of images, which are put in a random order, always the same; text has none.

    Raises:
        OSError: data, tokenizer or image processor are not to be had.
        ValueError: no data, or data that do not fit the models.
    """
    import klas_hf.models  # noqa: F401 - registers stitched models with the Auto classes
    from klas_hf.anchors.vision import is_vision

    if is_vision(models[-1]):
        return _images(options, models, split)
    return _text(options, models[-1])


def _text(options: DataOptions, model: str) -> Material:
    from klas_hf.anchors.language import anchor_config
    from klas_hf.data.text import TextBatches, check_vocabulary, text_sequences

    texts = read_texts(options.data)
    tokenizer = tokenizer_of(model)
    sequences = text_sequences(texts, tokenizer, options.length)
    if not sequences:
        raise ValueError(f"got {options.data} with no text of two tokens or more; expected text")
    check_vocabulary(sequences, anchor_config(model).get_text_config().vocab_size)
    batches = TextBatches(sequences, options.batch_size, count=options.samples)
    return Material(batches, batches.examples, tokenizer)


def _images(options: DataOptions, models: Sequence[str], split: str) -> Material:
    from klas_hf.anchors.language import anchor_config
    from klas_hf.data.image_data import class_labels
    from klas_hf.data.images import common_processing, image_batches, load_images, map_labels, subset

    processing = common_processing(models, options.image_size)
    images = load_images(
        options.data, split, processing, image_column=options.image_column, label_column=options.label_column
    )
    images = map_labels(images, class_labels(images.names, anchor_config(models[-1]).id2label, options.labels))
    if options.samples is not None and options.samples < len(images):
        images = subset(images, count=options.samples)
    moments = processing.mean, processing.std
    # In the order of a folder, the first half of the batches would hold the first half of the classes.
    batches = image_batches(images, options.batch_size, *moments, seed=0)
    return Material(batches, images, processing.processor, moments)


def read_texts(data: str) -> list[str]:
    """One text per file: of a file, or of all .txt files below a folder.

    Raises:
        FileNotFoundError: neither file nor folder, or a folder without .txt files.
        ValueError: a table such as CSV, or a file that is not UTF-8.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() in _TABLES:
        raise ValueError(
            f"got {data}, a table; expected plain text, a text per .txt file. Write the column with the texts into such"
        )
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"got {data}; expected a text file, or a folder with .txt files in it")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"got {file}, which is not UTF-8 text ({error}); convert it first") from error
    return texts


def tokenizer_of(model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer that lies with a model.

    Raises:
        OSError: there is none.
    """
    from transformers import AutoTokenizer

    from klas_hf.anchors.vocabularies import tokenizer_vocabulary

    if tokenizer_vocabulary(model) is None:
        raise OSError(
            f"got {model} without a tokenizer; expected tokenizer.json beside its config.json. Save the tokenizer "
            "into the folder with tokenizer.save_pretrained"
        )
    return AutoTokenizer.from_pretrained(model)


def load_model(model: str, dtype: str = "auto") -> Any:
    """A language model or an image classifier, stitched or not, in eval mode on this process's device.

    Raises:
        OSError: not to be had, or without safetensors weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    import klas_hf.models  # noqa: F401 - registers stitched models with the Auto classes
    from klas_hf.anchors.language import explained_access
    from klas_hf.anchors.vision import is_vision
    from klas_hf.processes import others_bars, process_state

    auto_class = AutoModelForImageClassification if is_vision(model) else AutoModelForCausalLM
    with explained_access(model), others_bars():
        loaded = auto_class.from_pretrained(model, dtype=dtype, use_safetensors=True)
    return loaded.eval().to(process_state().device)


def load_supernet(name: str, **loading: Any) -> "tuple[StitchedSupernetForCausalLM, PreTrainedTokenizerBase]":
    """A saved supernet of language models on this process's device, and its tokenizer.

    Raises:
        OSError: not to be had, or without a tokenizer.
        ValueError: another kind of model.
    """
    from klas_hf.anchors.language import explained_access, on_accelerator
    from klas_hf.processes import others_bars
    from klas_hf.stitching import StitchedSupernet, StitchedSupernetForCausalLM

    with explained_access(name), others_bars():
        supernet = StitchedSupernet.from_pretrained(name, device_map=on_accelerator(), **loading)
    if not isinstance(supernet, StitchedSupernetForCausalLM):
        raise ValueError(f"got {name}, a supernet of image classifiers; expected one of language models")
    return supernet, tokenizer_of(name)


def place(name: str | None) -> str:
    """A folder by its whole path, a Hub id as it is."""
    return str(Path(name).resolve()) if name and Path(name).exists() else str(name)
