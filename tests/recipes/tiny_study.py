"""A study of every size that takes seconds: two tiny Llamas and sequences that count upwards."""

import torch
from experiments.every_size import Family
from tiny_models import tiny_model, token_ids

from klas_hf.data.text import TextBatches, text_examples


def sequences(count: int, seed: int) -> list[list[int]]:
    """Sequences that count upwards, so that there is something to learn."""
    return [[1, *row] for row in (3 + (token_ids(count, 1, seed=seed) + torch.arange(9)) % 29).tolist()]


def family() -> Family:
    train, held, scored, test = (sequences(count, seed) for seed, count in enumerate((32, 12, 16, 16)))
    wide = {"hidden_size": 32, "intermediate_size": 64}  # what can be quantised
    anchors = tiny_model(seed=1), tiny_model(large=True, num_hidden_layers=6, seed=2, **wide)
    return Family(
        "tiny", anchors, text_examples(train), text_examples(held), TextBatches(train, 16), TextBatches(scored, 8),
        TextBatches(test, 16), tokens=10, healing={"per_device_batch_size": 8},
    )  # fmt: skip
