"""Calibration reads as much as it needs, spread over the data; the rows of a fit tell how much that was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids
from tiny_vision import SIDE, images, tiny_pair
from torch import Tensor

from klas_hf import StitchedModel

TOKENS = 5  # of which the first does not count


class Counted(list):
    """Batches that count which of them are read."""

    def __init__(self, batches: list[Tensor]):
        super().__init__(batches)
        self.read: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(super().__iter__()):
            self.read.append(number)
            yield batch


def text(sequences: int, size: int = 16, tokens: int = TOKENS) -> Counted:
    return Counted(list(token_ids(sequences, tokens).split(size)))


def language(calibration: Any, path: str = "0[:2] 1[2:]", **options: Any) -> StitchedModel:
    return StitchedModel.from_path([tiny_model(seed=1), tiny_model(large=True, seed=2)], path, calibration=calibration,
                                   **options)  # fmt: skip


def rows(model: StitchedModel) -> list[int]:
    return [fit["rows"] for fit in model.config.joint_fits]


@pytest.mark.parametrize("path", ["0[:2] 1[2:]", "0[:1] 1[1:2] 1[4:]"])
def test_256_sequences_are_enough(path: str) -> None:
    assert set(rows(language(text(800), path))) == {256 * (TOKENS - 1)}
    assert set(rows(language(text(120), path))) == {120 * (TOKENS - 1)}
    assert set(rows(language(iter(text(800)), path))) == {256 * (TOKENS - 1)}


def test_they_are_spread_over_the_data_where_its_length_is_known() -> None:
    data = text(1600)
    chosen = [batch for number, batch in enumerate(data) if number % 100 in {n * 100 // 16 for n in range(16)}]
    fit, expected, first = (language(given).stitching_layers()[0].weight for given in (data, chosen, data[:16]))
    assert torch.equal(fit, expected) and not torch.equal(fit, first)


def test_a_corpus_that_can_be_read_once_is_not_read_on() -> None:
    data = text(800)
    language(iter(data))
    assert len(data.read) == 16


def test_short_sequences_are_read_until_a_feature_has_ten_rows() -> None:
    anchors = [tiny_model(large=True, seed=1, hidden_size=96), tiny_model(seed=2)]
    data = text(800, tokens=3)
    mask = torch.tensor([1, 1, 0]).expand(16, 3)
    padded = [{"input_ids": batch, "attention_mask": mask} for batch in data]
    for calibration, sequences, each in ((data, 320, 2), (padded, 480, 1)):  # ten tokens of each for 96 features
        model = StitchedModel.from_path(anchors, "0[:2] 1[1:]", calibration=calibration)
        assert rows(model) == [sequences * each]


def test_as_many_as_asked_for() -> None:
    data = text(800)
    assert rows(language(data, calibration_items=32)) == [32 * (TOKENS - 1)]
    assert rows(language(data, calibration_items=40)) == [48 * (TOKENS - 1)]  # whole batches
    assert rows(language(data, calibration_items=10**6)) == [800 * (TOKENS - 1)]
    with pytest.raises(ValueError, match="got calibration_items=0; expected at least 1"):
        language(data, calibration_items=0)


@pytest.mark.parametrize("path", ["0[:1] 1[1:]", "0[:1] 1[1:2] 1[3:]"])
def test_images_too(path: str) -> None:
    data = list(images("vit", 8).repeat(40, 1, 1, 1).split(8))

    def fitted(**options: Any) -> list[int]:
        return rows(
            StitchedModel.from_path(list(tiny_pair("vit")), path, calibration=data, image_size=SIDE["vit"], **options)
        )

    each = fitted(calibration_items=8)
    assert fitted() == [32 * count for count in each]
    assert fitted(calibration_items=10**6) == [40 * count for count in each]
