"""A folder in the form of VOC's development kit: patches of three colours, any of which an image may have."""

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["blue", "green", "red"]
SIDE = 32
Labels = dict[str, list[str]]


def write_voc(folder: Path, counts: dict[str, int], seed: int = 0) -> dict[str, Labels]:
    """Write images of every split, and say which classes each has; the first of a split has none."""
    generator = np.random.default_rng(seed)
    found: dict[str, Labels] = {}
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, count in counts.items():
        present = generator.random((count, 3)) < 0.5
        present[0] = False
        for number, row in enumerate(present):
            name, pixels = f"{split}{number:03}", np.full((SIDE, SIDE, 3), 60, dtype=np.uint8)
            for place, has in enumerate(row):
                if has:
                    pixels[:, 11 * place : 11 * place + 10, 2 - place] = 250
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            found.setdefault(split, {})[name] = [NAMES[place] for place in np.flatnonzero(row)]
        for place, name in enumerate(NAMES):
            lines = [f"{split}{number:03} {' 1' if row[place] else '-1'}" for number, row in enumerate(present)]
            (folder / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("\n".join(lines) + "\n")
    return found
