"""Class names of a data set, such as folder names, as labels of the anchors."""

import re
from collections.abc import Mapping, Sequence


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
        for key in (str, _wordnet_id, _first_synonym):
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
