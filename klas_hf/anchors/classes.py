"""The classes of labelled images and those of a model: whether they are the same, and which is which."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

_REMEDY = (
    "Say which of the model's labels each class has: images = map_labels(images, model.config) finds them by name, "
    "map_labels(images, {class: label, …}) takes yours (klas_hf.data.images; `--labels FILE.yaml` of the commands)"
)


@dataclass(frozen=True)
class ImageClasses:
    """The classes of labelled images.

    Attributes:
        names: such as folder names.
        ids: the label of each.
        mapped: whether somebody said which label each has; else they are counted from 0.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    mapped: bool

    def check(self, config: PreTrainedConfig) -> None:
        """Raise ValueError unless the labels are a model's: mapped to some of them, or of the same classes in order.

        Names are compared as by `label_ids`, and where both are words: LABEL_0 is what transformers calls a class
        without a name, 0 what a column of numbers does, n01440764 what ImageNet's folders do.
        """
        known = {int(number): label for number, label in config.id2label.items()}
        if self.mapped:
            if unknown := sorted(set(self.ids) - set(known)):
                raise ValueError(
                    f"got images mapped to the labels {unknown[:5]} for a model of {len(known)} classes; expected 0 to "
                    f"{len(known) - 1}. {_REMEDY}"
                )
            return
        if len(self.names) != len(known):
            raise ValueError(
                f"got images of {len(self.names)} classes for a model of {len(known)}; expected the same classes. "
                f"{_REMEDY}"
            )
        differing = [n for n, name in zip(self.ids, self.names, strict=True) if not _is_same(name, known[n], n)]
        if differing:
            n = differing[0]
            raise ValueError(
                f"got images whose classes have other names than the model's in {len(differing)} of {len(known)} "
                f"places, class {n} {self.names[n]!r} and {known[n]!r}; expected the same classes in the same order. "
                f"{_REMEDY}"
            )


class WithClasses(ABC):
    """Images, or batches of images, that know their classes."""

    @property
    @abstractmethod
    def classes(self) -> ImageClasses:
        """Their classes."""


def check_classes(data: Any, config: PreTrainedConfig) -> None:
    """Raise ValueError where images that know their classes have others than a model (see `ImageClasses.check`)."""
    if isinstance(data, WithClasses):
        data.classes.check(config)


def mapped_classes(data: Any, known: int) -> tuple[int, ...] | None:
    """The labels, of so many that are known, that images are mapped to, ascending; None: all, or they do not say."""
    mapped = isinstance(data, WithClasses) and data.classes.mapped and len(data.classes.ids) < known
    return tuple(sorted(data.classes.ids)) if mapped else None


def label_ids(names: Sequence[str], id2label: Mapping[int, str] | Mapping[str, str]) -> dict[str, int]:
    """Find the anchors' label of each class name.

    A name is compared with the labels first as it is, then by WordNet id (`n01440764`) where both begin with one,
    then by the first of the synonyms that commas separate, in any case.

    Args:
        names: of the classes, such as folder names.
        id2label: of the anchors' config.

    Raises:
        ValueError: names that fit no label, or several; all of them are listed.
    """
    found, wrong = {}, {}
    for name in names:
        matches: list[int] = []
        for key in _KEYS:
            if not matches and key(name):
                matches = [int(number) for number, label in id2label.items() if key(label) == key(name)]
        if len(matches) == 1:
            found[name] = matches[0]
        else:
            wrong[name] = matches
    if wrong:
        listed = ", ".join(f"{name!r} ({f'labels {fits}' if fits else 'none'})" for name, fits in wrong.items())
        raise ValueError(
            f"got class names that fit none or several of the {len(id2label)} labels: {listed}; give each its label "
            "by a mapping from name to label (`--labels`, a YAML file)"
        )
    return found


def _wordnet_id(text: str) -> str | None:
    match = re.match(r"n\d{8}(?!\d)", text)
    return match.group() if match else None


def _first_synonym(text: str) -> str:
    return text.split(",")[0].strip().casefold()


_KEYS = (str, _wordnet_id, _first_synonym)


def _is_same(name: str, label: str, number: int) -> bool:
    if label == f"LABEL_{number}" or name in (str(number), f"LABEL_{number}"):
        return True
    if name == _wordnet_id(name) and _wordnet_id(label) is None:
        return True
    return any(key(name) and key(name) == key(label) for key in _KEYS)
