"""Muon for hidden matrices, AdamW for the rest: torch's own steps, whole checkpoints, what learns by which."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_examples import ToyImages, interrupted_after, tiny_resnet, tiny_vit, toy_supernet
from tiny_dense import tiny_dense
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.optim import AdamW, Muon
from training_examples import QUICK, anchors, counting

from klas_hf import StitchedModel, train_stitches
from klas_hf.training.muon import hidden_matrices
from klas_hf.training.trainables import made_trainable, optimizer_of

CONFIG = replace(QUICK, optimizer="muon", weight_decay=0.1, learning_rate=3e-3)
TRAIN = counting(48, 1)


def stitched() -> StitchedModel:
    return StitchedModel.from_anchors(*anchors(), (2, 2), calibration=[token_ids(48, 12)])


def names_of_hidden(model: nn.Module) -> set[str]:
    hidden = hidden_matrices(model)
    return {name for name, parameter in model.named_parameters() if parameter in hidden}


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_language_model_all_matrices_but_embeddings_and_head(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    found = names_of_hidden(model)
    assert found == {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_of_an_image_model_neither_patches_nor_classes() -> None:
    found = names_of_hidden(tiny_vit())
    assert found and all("attention" in name or "dense" in name or "mlp" in name for name in found)
    assert not any("embeddings" in name or "classifier" in name for name in found)
    assert not names_of_hidden(tiny_resnet())


def test_of_a_dense_model_no_head() -> None:
    found = names_of_hidden(tiny_dense("mask2former", "swin"))
    assert any("encoder.swin" in name for name in found) and any("decoder" in name for name in found)
    assert not any("class_predictor" in name or name.endswith("bias_table") for name in found)


def test_of_a_stitched_model_its_stitch_too() -> None:
    assert any("joints.0" in name for name in names_of_hidden(stitched()))


def test_of_lora_its_factors() -> None:
    with made_trainable(stitched(), replace(CONFIG, trainable="lora")) as trainable:
        learning = {name for name, parameter in trainable.named_parameters() if parameter.requires_grad}
        factors = {name for name in learning if ".lora_" in name}
        assert factors and factors <= names_of_hidden(trainable)


def test_steps_are_those_of_torchs_two_optimisers() -> None:
    model = tiny_model()
    expected = copy.deepcopy(model)
    hidden = [p for p in hidden_matrices(expected)]
    others = [p for p in expected.parameters() if all(p is not one for one in hidden)]
    decayed, plain = ([p for p in others if (p.ndim > 1) == matrix] for matrix in (True, False))
    theirs = [
        Muon(hidden, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=3e-3),
    ]
    ours = optimizer_of(model, CONFIG)
    for seed in range(3):
        ids = token_ids(4, 12, seed=seed)
        for net, optimizers in ((model, [ours]), (expected, theirs)):
            net(input_ids=ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_a_hidden_matrix_is_moved_by_the_rate_in_all_directions_alike() -> None:
    model = tiny_model(hidden_size=32)
    before = copy.deepcopy(model)
    ids = token_ids(8, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer_of(model, replace(CONFIG, weight_decay=0.0)).step()
    name = "model.layers.0.mlp.up_proj.weight"
    moved = model.get_parameter(name) - before.get_parameter(name)
    singular = torch.linalg.svdvals(moved.detach()) / (3e-3 * 0.2 * max(moved.shape) ** 0.5)
    assert ((singular > 0.5) & (singular < 1.3)).all(), singular  # five steps of Newton and Schulz come that near 1
    adam = copy.deepcopy(before)
    adam(input_ids=ids, labels=ids).loss.backward()
    optimizer_of(adam, replace(CONFIG, weight_decay=0.0, optimizer="adamw")).step()
    theirs = torch.linalg.svdvals((adam.get_parameter(name) - before.get_parameter(name)).detach())
    assert theirs[-1] / theirs[0] < 0.2 < singular[-1] / singular[0]


@pytest.mark.parametrize("trainable", ["stitch", "lora", "full"])
def test_a_resumed_run_equals_an_uninterrupted_one(trainable: str, tmp_path: Path) -> None:
    config = replace(CONFIG, trainable=trainable, save_steps=4)
    whole, broken, resumed = stitched(), stitched(), stitched()
    expected = train_stitches(whole, TRAIN, config)
    with interrupted_after(9):
        train_stitches(broken, TRAIN, config, output_dir=tmp_path)
    assert train_stitches(resumed, TRAIN, config, output_dir=tmp_path).losses == expected.losses
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_a_supernet_resumes_whose_paths_were_not_all_drawn(tmp_path: Path) -> None:
    config = replace(CONFIG, max_steps=None, epochs=2, save_steps=1)
    whole, broken, resumed = (toy_supernet(dropout=0.3) for _ in range(3))
    expected = train_stitches(whole, ToyImages(), config)
    with interrupted_after(2):
        train_stitches(broken, ToyImages(), config, output_dir=tmp_path)
    assert train_stitches(resumed, ToyImages(), config, output_dir=tmp_path).losses == expected.losses


@pytest.mark.parametrize(("make", "data"), [(stitched, TRAIN), (tiny_vit, ToyImages())])
def test_it_learns(make: Any, data: Any) -> None:
    model = make()
    result = train_stitches(model, data, replace(CONFIG, max_steps=60, learning_rate=1e-2, trainable="full"))
    assert sum(result.losses[-5:]) < 0.4 * sum(result.losses[:5])
    assert model.config.training["settings"]["optimizer"] == "muon"
