"""Image probes: each is what a loop over its block alone gives, and as good as a converged classifier."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_images import Batch, joined, labelled, pooled, split
from sklearn.linear_model import LogisticRegression
from tiny_models import tiny_model
from tiny_vision import CLASSES, as_rows, embedding, images, outputs, tiny_classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from klas_hf import ImageProbeConfig, ImageProbeNet, ProbeConfig, TrainingDiverged, train_probes
from klas_hf.anchors.images import ImageBatch
from klas_hf.anchors.vision import VisionAnchor
from klas_hf.probes.image_training import train_image_probes
from klas_hf.probes.images import pooled_features

KINDS = ["vit", "deit_teacher", "swin", "levit", "resnet"]


class Alone:
    """One block's probe by itself: standardised features, AdamW from zero, stopped when it no longer gets better."""

    def __init__(self, train: list[tuple[Tensor, Tensor]], held: list[tuple[Tensor, Tensor]], config: ImageProbeConfig):
        every = torch.cat([x for x, _ in train]).double()
        mean, spread = every.mean(0), every.std(0, correction=0)
        self.mean, self.spread = mean.float(), torch.where(spread > 1e-12, spread, torch.inf).float()
        layer = nn.Linear(every.shape[1], CLASSES)
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.losses: list[float] = []
        x, y = (torch.cat(part) for part in zip(*held, strict=True))
        for epoch in range(1, config.epochs + 1):
            for features, labels in train:
                optimizer.zero_grad()
                F.cross_entropy(layer(self._standardised(features)), labels).backward()
                optimizer.step()
            with torch.no_grad():
                logits = layer(self._standardised(x))
            self.losses.append(F.cross_entropy(logits, y).item())
            if self.losses[-1] == min(self.losses):
                self.epoch, self.loss, self.layer = epoch, self.losses[-1], copy.deepcopy(layer)
                self.accuracy = (logits.argmax(-1) == y).float().mean().item()
            elif epoch - self.epoch >= config.patience:
                break

    def log_probs(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.layer(self._standardised(x)).log_softmax(-1)

    def _standardised(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.spread


def features(model: PreTrainedModel, batches: list[Batch]) -> list[tuple[list[Tensor], Tensor]]:
    return [([x.float() for x in pooled(model, batch["pixel_values"])], batch["labels"]) for batch in batches]


def of_block(found: list[tuple[list[Tensor], Tensor]], block: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[block], labels) for x, labels in found]


def log_probs(probes: ImageProbeNet, model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    with torch.no_grad():
        return probes.log_probs(pooled_features(VisionAnchor(model), ImageBatch(joined(batches)[0])))


def forwards(model: PreTrainedModel) -> list[int]:
    """A list that grows by the number of images with each forward from now on."""
    seen: list[int] = []
    embedding(model).register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def assert_same(probes: ImageProbeNet, other: ImageProbeNet) -> None:
    there = other.state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in probes.state_dict().items())
    for name in ("accuracy", "validation_loss", "best_epoch"):
        assert getattr(probes.config, name) == getattr(other.config, name)


@pytest.mark.parametrize("kind", KINDS)
def test_in_one_pass_every_block_learns_what_it_would_alone(kind: str) -> None:
    model, train, held, fresh = tiny_classifier(kind), labelled(kind, 6), labelled(kind, 3, seed=1), labelled(kind, 1)
    config = ImageProbeConfig(epochs=8, patience=1, learning_rate=0.15, weight_decay=0.1)
    probes = train_probes(model, train, config, validation=held)
    found, validation = features(model, train), features(model, held)
    got, (inputs, _) = log_probs(probes, model, fresh), features(model, fresh)[0]
    for block, x in enumerate(inputs):
        alone = Alone(of_block(found, block), of_block(validation, block), config)
        assert probes.config.best_epoch[block] == alone.epoch
        assert probes.config.accuracy[block] == pytest.approx(alone.accuracy)
        assert probes.config.validation_loss[block] == pytest.approx(alone.loss, rel=1e-3)
        torch.testing.assert_close(got[block], alone.log_probs(x), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("rate", "seed"), [(0.1, 0), (0.15, 3), (0.3, 3)])
def test_a_probe_that_is_done_takes_nothing_from_the_epochs_that_others_need(rate: float, seed: int) -> None:
    # Tiny batches at a high rate: losses go up and down, and blocks stop at different epochs.
    model, train, held = tiny_classifier("levit"), labelled("levit", 8, 4, seed=seed), labelled("levit", 2, seed=9)
    config, tireless = (ImageProbeConfig(epochs=12, patience=patience, learning_rate=rate) for patience in (1, 12))
    found, validation = features(model, train), features(model, held)
    alone, longer = (
        [Alone(of_block(found, block), of_block(validation, block), one) for block in range(4)]
        for one in (config, tireless)
    )
    last = max(one.epoch for one in alone) + 1
    assert any(min(more.losses[:last]) < one.loss for one, more in zip(alone, longer, strict=True))
    probes = train_probes(model, train, config, validation=held)
    assert probes.config.best_epoch == [one.epoch for one in alone]


def test_a_patient_probe_outlasts_a_worse_epoch() -> None:
    model, train, held = tiny_classifier("levit"), labelled("levit", 8, 4), labelled("levit", 2, seed=9)
    for patience in (1, 2, 4):
        config = ImageProbeConfig(epochs=12, patience=patience, learning_rate=0.3)
        probes = train_probes(model, train, config, validation=held)
        found, validation = features(model, train), features(model, held)
        alone = [Alone(of_block(found, block), of_block(validation, block), config) for block in range(4)]
        assert probes.config.best_epoch == [one.epoch for one in alone]


@pytest.mark.parametrize(("kind", "noise"), [("vit", 1.5), ("resnet", 0.5)])
def test_a_separable_problem_is_learnt_as_well_as_by_a_converged_classifier(kind: str, noise: float) -> None:
    model = tiny_classifier(kind)
    train, held, test = (labelled(kind, count, seed=seed, noise=noise) for seed, count in enumerate((16, 4, 8)))
    probes = train_probes(model, train, validation=held)
    labels = joined(test)[1]
    accuracy = (log_probs(probes, model, test).argmax(-1) == labels).float().mean(1)
    (pixels, truth), (fresh, _) = joined(train), joined(test)
    for block, (x, y) in enumerate(zip(pooled(model, pixels), pooled(model, fresh), strict=True)):
        mean, spread = x.mean(0), x.std(0)
        reference = LogisticRegression().fit((x - mean) / spread, truth)
        expected = reference.score((y - mean) / spread, labels)
        assert expected > 0.6  # chance is 0.2
        assert accuracy[block] > expected - 0.08


@pytest.mark.parametrize("kind", ["deit", "swin", "resnet"])
def test_what_is_reported_is_what_the_best_weights_give_on_the_anchors_own_features(kind: str) -> None:
    model, train, held = tiny_classifier(kind), labelled(kind, 8), labelled(kind, 3, seed=1)
    probes = train_probes(model, train, ImageProbeConfig(epochs=4, learning_rate=0.1), validation=held)
    pixels, labels = joined(held)
    for block, x in enumerate(pooled(model, pixels)):
        layer = probes.probes[block].double()
        with torch.no_grad():
            logits = layer(x)
        assert F.cross_entropy(logits, labels).item() == pytest.approx(probes.config.validation_loss[block], rel=1e-3)
        assert (logits.argmax(-1) == labels).double().mean().item() == pytest.approx(probes.config.accuracy[block])
        assert 1 <= probes.config.best_epoch[block] <= 4


def test_without_validation_data_every_fifth_batch_is_held_out() -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 11)
    train, held = [batch for n, batch in enumerate(data) if n not in (4, 9)], [data[4], data[9]]
    assert_same(train_probes(model, data), train_probes(model, train, validation=held))


def test_training_needs_no_seed() -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 5)
    torch.manual_seed(1)
    one = train_probes(model, data)
    torch.manual_seed(2)
    assert_same(train_probes(model, data), one)


def test_features_are_extracted_once_where_they_fit() -> None:
    model, data = tiny_classifier("swin"), labelled("swin", 10)
    seen = forwards(model)
    config = ImageProbeConfig(epochs=3, patience=3)
    probes = train_image_probes(model, data, config)
    assert seen == [16] * 10
    per_batch = 4 * 16 * sum(probes.config.widths)
    for allowed in (0, 3 * per_batch):
        seen.clear()
        assert_same(train_image_probes(model, data, config, feature_bytes=allowed), probes)
        assert len(seen) == 8 * (1 + 3) + 2 * (1 + (0 if allowed else 3))
    seen.clear()
    train_image_probes(model, data, config, feature_bytes=8 * per_batch)
    assert len(seen) == 10
    seen.clear()
    train_image_probes(model, data, config, feature_bytes=8 * per_batch - 1)
    assert len(seen) > 10


def test_training_ends_when_the_last_probe_is_done() -> None:
    train, held = labelled("levit", 8, 4, seed=2), labelled("levit", 2, seed=9)
    for patience in (1, 3):
        model = tiny_classifier("levit")
        seen, config = forwards(model), ImageProbeConfig(patience=patience, learning_rate=0.3)
        probes = train_image_probes(model, train, config, validation=held, feature_bytes=0)
        epochs = max(probes.config.best_epoch) + patience
        assert epochs < config.epochs and len(seen) == (len(train) + len(held)) * (1 + epochs)


def test_any_iterable_that_can_be_read_again_will_do() -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 6)
    pixels, labels = joined(data)
    loader = DataLoader(list(zip(pixels, labels, strict=True)), batch_size=16)

    class Pairs:
        def __iter__(self) -> Iterator[Batch]:
            return ({"pixel_values": x, "labels": y} for x, y in loader)

    assert_same(train_image_probes(model, Pairs(), feature_bytes=0), train_probes(model, data))
    train, held = data[:4], data[4:]
    assert_same(train_probes(model, iter(train), validation=iter(held)), train_probes(model, train, validation=held))


def test_iterators_are_refused_where_they_would_be_used_up() -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 6)
    with pytest.raises(ValueError, match="got an iterator and no validation data"):
        train_probes(model, iter(data))
    for train, held in ((iter(data), data), (data, iter(data))):
        with pytest.raises(ValueError, match="got 0 batches of images when they were read again and 6 before"):
            train_image_probes(model, train, validation=held, feature_bytes=0)


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_data_that_grow_are_refused(is_shuffled: bool) -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 6)

    class Growing:
        length = 2

        def __iter__(self) -> Iterator[Batch]:
            self.length += 1
            return iter(data[: self.length])

    with pytest.raises(ValueError, match="got 4 batches of images when they were read again and 3 before"):
        config = ImageProbeConfig(shuffled_labels=is_shuffled)
        train_image_probes(model, Growing(), config, validation=data, feature_bytes=0)


def test_a_large_mean_hides_no_feature() -> None:
    """Some channels of trained transformers have means far above their spread."""
    plain, train, held = tiny_classifier("vit"), labelled("vit", 12), labelled("vit", 4, seed=1)
    shifted = copy.deepcopy(plain)
    with torch.no_grad():
        shifted.vit.layers[-1].mlp.fc2.bias += 10_000
    before, after = (train_probes(model, train, validation=held) for model in (plain, shifted))
    assert before.config.accuracy[-1] > 0.8
    assert after.config.validation_loss[-1] == pytest.approx(before.config.validation_loss[-1], rel=0.05)
    pixels, labels = joined(held)
    logits = log_probs(after, shifted, held)[-1]
    assert F.nll_loss(logits, labels).item() == pytest.approx(after.config.validation_loss[-1], rel=0.05)


@pytest.mark.parametrize("bias", [-1e6, 1e8])  # the ReLU behind it lets nothing through; float32 hides what varies
def test_a_feature_that_never_varies_gets_no_weight(bias: float) -> None:
    model = tiny_classifier("resnet")
    last = model.resnet.encoder.stages[-1].layers[-1].layer[-1].normalization
    with torch.no_grad():
        last.bias[3] = bias
    probes = train_probes(model, labelled("resnet", 6))
    weight = probes.probes[-1].weight
    assert not weight[:, 3].any()
    assert weight[:, [0, 1, 2, *range(4, weight.shape[1])]].any(0).all()
    assert log_probs(probes, model, labelled("resnet", 1)).isfinite().all()


def test_shuffled_labels_teach_nothing_of_the_true_ones() -> None:
    # Shuffled within these small batches, every second label would stay where it is.
    model, train, test = tiny_classifier("vit"), labelled("vit", 150, 2), labelled("vit", 12, seed=1)
    labels = joined(test)[1]
    accuracy = {}
    for is_shuffled in (False, True):
        probes = train_probes(model, train, ImageProbeConfig(shuffled_labels=is_shuffled))
        assert probes.config.shuffled_labels is is_shuffled
        accuracy[is_shuffled] = (log_probs(probes, model, test).argmax(-1) == labels).float().mean(1)
    assert accuracy[False].min() > 0.8
    assert accuracy[True].max() < 0.4


def test_shuffled_labels_are_the_same_in_every_epoch() -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 10)
    config = ImageProbeConfig(shuffled_labels=True, epochs=3, patience=3)
    kept = train_image_probes(model, data, config)
    assert_same(train_image_probes(model, data, config, feature_bytes=0), kept)  # shuffled once, and in every epoch
    other = train_probes(model, data, ImageProbeConfig(shuffled_labels=True, epochs=3, patience=3, seed=1))
    assert not torch.equal(other.probes[0].weight, kept.probes[0].weight)


def test_shuffled_labels_can_be_learnt_by_heart() -> None:
    # As many features as images: any labels can be told apart, if they stay what they are.
    model, data = tiny_classifier("vit"), labelled("vit", 1, 12)
    config = ImageProbeConfig(shuffled_labels=True, epochs=200, patience=200, learning_rate=0.05)
    probes = train_probes(model, data, config, validation=data)
    assert probes.config.accuracy[-1] == 1.0
    predicted = log_probs(probes, model, data)[-1].argmax(-1)
    labels = data[0]["labels"]
    assert sorted(predicted.tolist()) == sorted(labels.tolist()) and predicted.tolist() != labels.tolist()


@pytest.mark.parametrize("kind", [*KINDS, "dinov2", "swinv2", "convnext", "mobilenet_v1"])
def test_pooling_is_the_mean_over_the_grid_without_class_tokens(kind: str) -> None:
    model, pixels = tiny_classifier(kind), images(kind, 3)
    got, expected = pooled_features(VisionAnchor(model), ImageBatch(pixels)), outputs(model, pixels)[0][1:]
    for x, hidden in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, as_rows(model, hidden, bare=True).mean(1).float())


def test_on_maps_a_probe_is_a_convolution_and_then_the_mean() -> None:
    model, data = tiny_classifier("resnet"), labelled("resnet", 5)
    probes, pixels = train_probes(model, data), images("resnet", 3)
    with torch.no_grad():
        got = probes.log_probs(pooled_features(VisionAnchor(model), ImageBatch(pixels)))
    for block, hidden in enumerate(outputs(model, pixels)[0][1:]):
        layer = probes.probes[block]
        maps = F.conv2d(hidden, layer.weight.double()[:, :, None, None], layer.bias.double())
        expected = maps.mean((-2, -1)).log_softmax(-1).float()
        torch.testing.assert_close(got[block], expected, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_log_probs_are_those_of_a_linear_layer_each(seed: int, blocks: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 9, (blocks,), generator=generator).tolist()
    probes = ImageProbeNet(ImageProbeConfig(widths=widths, num_labels=3))
    inputs = [torch.randn(count, width, generator=generator, dtype=torch.float64) for width in widths]
    expected = []
    for probe, x in zip(probes.probes, inputs, strict=True):
        weight, bias = torch.randn(3, len(x[0]), generator=generator), torch.randn(3, generator=generator)
        probe.load_state_dict({"weight": weight, "bias": bias})
        logits = x.numpy() @ weight.double().numpy().T + bias.double().numpy()
        expected.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    with torch.no_grad():
        got = probes.log_probs(inputs)
    assert got.shape == (blocks, count, 3) and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), np.stack(expected), atol=1e-4)


def test_saved_probes_come_back_as_they_were(tmp_path: Path) -> None:
    model, data = tiny_classifier("swin"), labelled("swin", 5)
    probes = train_probes(model, data, ImageProbeConfig(epochs=2, learning_rate=0.02, seed=3))
    probes.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = ImageProbeNet.from_pretrained(tmp_path)
    assert_same(again, probes)
    again.check(VisionAnchor(model))
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("epochs", "learning_rate", "seed", "widths", "anchor_name", "anchor_fingerprint", "num_labels"):
        assert getattr(again.config, name) == getattr(probes.config, name)
    assert (saved["epochs"], saved["learning_rate"], saved["seed"]) == (2, 0.02, 3)
    assert again.config.widths == [8, 16, 16] and again.config.num_labels == CLASSES
    assert torch.equal(log_probs(again, model, data), log_probs(probes, model, data))


def test_probes_of_other_weights_are_refused() -> None:
    model = tiny_classifier("vit")
    probes = train_probes(model, labelled("vit", 5), ImageProbeConfig(epochs=1))
    probes.check(VisionAnchor(model))
    probes.check(VisionAnchor(copy.deepcopy(model)))
    with torch.no_grad():
        model.classifier.weight[2, 3] += 0.5
    for other in (model, tiny_classifier("vit", seed=1), tiny_classifier("swin")):
        with pytest.raises(ValueError, match="other weights; expected the model they were trained on"):
            probes.check(VisionAnchor(other))


def test_what_was_given_is_left_as_it_was() -> None:
    model, asked = tiny_classifier("resnet"), ImageProbeConfig(epochs=2)
    model.train()
    model.resnet.encoder.stages[0].eval()
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    probes = train_probes(model, labelled("resnet", 5), asked)
    assert asked.anchor_fingerprint is None and asked.accuracy is None and asked.widths is None
    assert probes.config.epochs == 2 and not probes.training
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert_same(train_probes(model.eval(), labelled("resnet", 5), asked), probes)  # BatchNorm used running statistics


def test_batches_of_any_size_count_by_their_images() -> None:
    model, held = tiny_classifier("vit"), labelled("vit", 4, seed=1)
    train, config = labelled("vit", 5), ImageProbeConfig(epochs=2)
    whole = train_probes(model, train, config, validation=held)
    uneven = train_probes(model, train, config, validation=split(held, 9))
    np.testing.assert_allclose(uneven.config.validation_loss, whole.config.validation_loss, rtol=1e-4)
    assert uneven.config.accuracy == whole.config.accuracy


def relabelled(batches: list[Batch], label: int, where: int) -> list[Batch]:
    batches = copy.deepcopy(batches)
    batches[where]["labels"][2] = label
    return batches


@pytest.mark.parametrize("label", [CLASSES, 17, -1, -100])
@pytest.mark.parametrize("where", [0, 4])  # in training, and in what is held out
def test_labels_out_of_range_are_refused(label: int, where: int) -> None:
    with pytest.raises(ValueError, match=f"got label {label} for ViT.* 5 classes; expected labels from 0 to 4"):
        train_probes(tiny_classifier("vit"), relabelled(labelled("vit", 5), label, where))


def test_data_that_will_not_do_are_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 6)

    def trains(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(torch.optim.AdamW, "step", trains)
    bare = [batch["pixel_values"] for batch in data]
    for batches in (bare, [{"pixel_values": pixels} for pixels in bare]):
        with pytest.raises(ValueError, match="got a batch of images without 'labels'"):
            train_probes(model, batches)
        with pytest.raises(ValueError, match="got a batch of images without 'labels'"):
            train_probes(model, data, validation=batches)
    for few in ([], data[:4]):
        with pytest.raises(ValueError, match="got no images to validate probes on; expected at least five batches"):
            train_probes(model, few)
    with pytest.raises(ValueError, match="got no images to validate probes on"):
        train_probes(model, data, validation=[])
    with pytest.raises(ValueError, match="got no labelled images to train probes on"):
        train_probes(model, [], validation=data)
    with pytest.raises(ValueError, match=r"got images of \(64, 64\) pixels"):
        train_probes(model, labelled("levit", 5))


def test_activations_that_are_not_finite_are_refused() -> None:
    model, data = tiny_classifier("vit"), labelled("vit", 5)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.vit.layers[1].mlp.fc2.weight[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"got a loss of nan for the probes of .* Check the anchor's weights"):
        train_probes(broken, data)
    held = labelled("vit", 1, seed=1)
    held[0]["pixel_values"][0] = torch.inf
    with pytest.raises(TrainingDiverged, match=r"got validation losses of .*nan.* Check the validation images"):
        train_probes(model, data, validation=held)


@pytest.mark.parametrize("option", ["epochs", "patience"])
def test_settings_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"got {option}=0; expected at least 1"):
        ImageProbeConfig(**{option: 0})


def test_settings_and_data_of_the_other_kind_of_model_are_refused() -> None:
    with pytest.raises(TypeError, match="got ProbeConfig for this anchor; expected ImageProbeConfig"):
        train_probes(tiny_classifier("vit"), labelled("vit", 5), ProbeConfig())
    with pytest.raises(TypeError, match="got ImageProbeConfig for this anchor; expected ProbeConfig"):
        train_probes(tiny_model(), [], ImageProbeConfig())
    with pytest.raises(ValueError, match="got validation data for a language model"):
        train_probes(tiny_model(), [], validation=[])
