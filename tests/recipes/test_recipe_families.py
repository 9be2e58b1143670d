"""The families of the recipes: what is trained on, chosen by and measured on, and what cannot be compared."""

from pathlib import Path as Folder

import every_size as recipe
import pytest
import torch
from families import FamilyArguments, family_of
from tiny_models import save_with_tokenizer, tiny_model, token_ids

from klas_hf.data.text import TextBatches


def test_stories_are_parted_between_healing_choosing_and_measuring(tmp_path: Folder) -> None:
    model = save_with_tokenizer(tiny_model(large=True), tmp_path / "llama")
    for name, count in (("train.txt", 40), ("test.txt", 20)):
        ids = token_ids(count, 200, seed=count).tolist()
        (tmp_path / name).write_text("\n".join(" ".join(f"word{one}" for one in story) for story in ids))
    data = [str(tmp_path / "train.txt"), str(tmp_path / "test.txt")]
    found = family_of(
        FamilyArguments(
            family="stories", anchors=[str(model)], data=data, cache_dir=str(tmp_path / "cache"), anchor_steps=1
        )
    )
    assert [one.config.hidden_size for one in found.anchors] == [48, tiny_model(large=True).config.hidden_size]
    assert found.tokens == 128 and found.metric == "loss"

    def parted(batches: TextBatches) -> set[tuple[int, ...]]:
        return {
            tuple(row[mask.bool()].tolist())
            for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }

    train = {tuple(one["input_ids"]) for one in found.train}
    held = {tuple(one["input_ids"]) for one in found.validation}
    assert parted(found.fitting) <= train and held <= parted(found.scored) and parted(found.test)
    assert not train & parted(found.scored) and not (train | parted(found.scored)) & parted(found.test)


def test_mirrored_digits_are_the_same_ones_turned_round_for_the_same_anchors(tmp_path: Folder) -> None:
    own, new = (
        family_of(FamilyArguments(family="vit", cache_dir=str(tmp_path), anchor_steps=1, mirrored=mirrored))
        for mirrored in (False, True)
    )
    assert (own.name, new.name) == ("vit", "vit-new")
    for one, other in zip(own.anchors, new.anchors, strict=True):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    for part in ("train", "validation"):
        for place in (0, 5):
            (plain, label), (turned, same) = getattr(own, part)[place], getattr(new, part)[place]
            assert label == same and torch.equal(plain, turned.flip(-1)) and not torch.equal(plain, turned)
    for plain, turned in zip(own.test, new.test, strict=True):
        assert torch.equal(plain["pixel_values"], turned["pixel_values"].flip(-1))
        assert torch.equal(plain["labels"], turned["labels"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "bert"}, "family='bert'"),
        ({"family": "stories", "data": ["a", "b"]}, "anchors=None for the family stories; expected 1"),
        ({"data": ["a", "b", "c"]}, "for the family quickstart; expected 0 or 2"),
        ({"family": "images", "anchors": ["a"], "data": ["b"]}, "expected 2"),
        ({"mirrored": True}, "mirrored for the family quickstart"),
        ({"rivals": ["klass"]}, "klass"),
        ({"seeds": [0, 0]}, "each once"),
        ({"buckets": 0}, "at least 1 bucket"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: dict, message: str) -> None:
    arguments = recipe.EverySizeArguments if {"rivals", "seeds", "buckets"} & set(options) else FamilyArguments
    with pytest.raises(ValueError, match=message):
        arguments(**options)
