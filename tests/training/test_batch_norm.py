"""Recalibration of BatchNorm: averages over batches, on the layers that run, and nothing else is touched."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from image_examples import ToyImages, changed, tiny_resnet, tiny_vit, toy_supernet
from torch import Tensor, nn

from klas_hf import Stitch
from klas_hf.training import recalibrate_batch_norm

FIRST = "resnet.embedder.embedder.normalization"


def batches(*sizes: int) -> list[dict[str, Tensor]]:
    pixels = ToyImages(sum(sizes)).normalised().split(list(sizes))
    return [{"pixel_values": part, "labels": torch.zeros(len(part), dtype=torch.long)} for part in pixels]


def trained_resnet() -> Any:
    """With statistics that are not those of any data, in a mixed mode."""
    model = tiny_resnet()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(0.7)
            layer.running_var.fill_(3.0)
    model.resnet.encoder.train()
    return model


def test_statistics_are_averages_over_batches() -> None:
    model = trained_resnet()
    data = batches(8, 5, 3)
    with torch.no_grad():
        maps = [model.resnet.embedder.embedder.convolution(b["pixel_values"]).numpy() for b in data]
    assert recalibrate_batch_norm(model, data) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    layer = model.get_submodule(FIRST)
    means = np.mean([m.mean((0, 2, 3)) for m in maps], axis=0)
    variances = np.mean([m.var((0, 2, 3), ddof=1) for m in maps], axis=0)
    np.testing.assert_allclose(layer.running_mean.numpy(), means, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), variances, rtol=1e-4)


def test_every_layer_sees_what_it_would_in_training() -> None:
    model, (batch,) = trained_resnet(), batches(12)
    inputs: dict[str, np.ndarray] = {}
    trained = copy.deepcopy(model).train()
    for name, layer in trained.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach().numpy()}))
    trained(pixel_values=batch["pixel_values"])
    recalibrate_batch_norm(model, [batch])
    for name, maps in inputs.items():
        layer = model.get_submodule(name)
        np.testing.assert_allclose(layer.running_mean.numpy(), maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.running_var.numpy(), maps.var((0, 2, 3), ddof=1), rtol=1e-4, atol=1e-6)
    assert len(inputs) > 3


def test_nothing_but_statistics_changes() -> None:
    model, before = trained_resnet(), trained_resnet()
    modes = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    recalibrate_batch_norm(model, batches(8, 8))
    assert all("running" in name or "tracked" in name for name in changed(model, before))
    assert [(m.training, getattr(m, "momentum", None)) for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_meanwhile() -> None:
    model, again = (toy_supernet(has_batch_norm=True, dropout=0.9).train() for _ in range(2))
    recalibrate_batch_norm(model, batches(8, 8))
    torch.manual_seed(7)
    recalibrate_batch_norm(again, batches(8, 8))
    assert not changed(again, model)


def test_only_layers_of_the_path_change() -> None:
    model = toy_supernet(has_batch_norm=True)
    for buffer in model.buffers():
        buffer.fill_(2)
    before = copy.deepcopy(model)
    assert recalibrate_batch_norm(model, batches(8, 8, 8), path=Stitch(1, 1)) == 2
    layers = {name.rsplit(".", 1)[0] for name in changed(model, before)}
    assert layers == {"anchors.0.norms.0", "anchors.1.norms.1"}


def test_a_failure_leaves_the_statistics() -> None:
    model, before = trained_resnet(), trained_resnet()
    wrong = [*batches(8), {"pixel_values": torch.zeros(2, 5, 8, 8)}]
    with pytest.raises(ValueError, match="channel"):
        recalibrate_batch_norm(model, wrong)
    with pytest.raises(ValueError, match="no batches"):
        recalibrate_batch_norm(model, [])
    assert not changed(model, before)
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_model_without_batch_norm_is_left() -> None:
    assert recalibrate_batch_norm(tiny_vit(), batches(4)) == 0
