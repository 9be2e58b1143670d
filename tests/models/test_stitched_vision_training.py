"""Training stitched classifiers: stochastic depth and activation checkpointing."""

import pytest
import torch
from tiny_vision import (
    apply_block,
    blocks,
    images,
    logits,
    middle,
    tiny_pair,
    tiny_stitched,
)
from torch import Tensor, nn

BATCH_NORMED = ("levit", "levit_teacher", "resnet", "bottleneck", "mobilenet_v1")


@pytest.mark.parametrize("kind", ["vit", "deit_teacher", "dinov2", "swin", "swinv2", "convnext"])
def test_training_mode_without_dropout_is_evaluation(kind: str) -> None:
    """Also where the anchors' own stochastic depth was on: the stitched model's takes its place."""
    rate = {} if kind in ("vit", "deit_teacher") else {"drop_path_rate": 0.9}
    model = tiny_stitched(*tiny_pair(kind, **rate), (1, 1))
    expected = logits(model, images(kind))
    model.train()
    assert torch.equal(logits(model, images(kind)), expected)


@pytest.mark.parametrize("kind", BATCH_NORMED)
def test_training_mode_of_batch_normed_kinds_differs_by_batch_statistics_alone(kind: str) -> None:
    # LeViT takes whole numbers for a rate: 1 would drop every block.
    model = tiny_stitched(*tiny_pair(kind, **({"drop_path_rate": 1} if "levit" in kind else {})), (1, 1))
    expected = logits(model, images(kind))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(logits(model, images(kind)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext", "levit", "resnet"])
@pytest.mark.parametrize("by_argument", [True, False])
def test_stochastic_depth_drops_whole_blocks_at_linearly_growing_rates(kind: str, by_argument: bool) -> None:
    """What every block would give is found by running it alone on what came before it."""
    source, target = tiny_pair(kind)
    stop, start = {"vit": (2, 1), "swin": (1, 1), "convnext": (1, 1), "levit": (1, 1), "resnet": (2, 1)}[kind]
    model = tiny_stitched(source, target, (stop, start)).train()
    for anchor in (source, target, model):
        for module in anchor.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
    rate, samples = 0.6, 400
    model.config.drop_path_rate = 0.1 if by_argument else rate
    pixels = images(kind, samples)
    options = {"drop_path": rate} if by_argument else {}
    with torch.no_grad():
        states = list(model(pixels, output_hidden_states=True, **options).hidden_states)
    before, after = [*states[:stop], *states[stop + 1 : -1]], [*states[1 : stop + 1], *states[stop + 2 :]]
    path = [(source, block) for block in blocks(source)[:stop]] + [(target, block) for block in blocks(target)[start:]]
    compared = 0
    for step, ((anchor, block), old, new) in enumerate(zip(path, before, after, strict=True)):
        with torch.no_grad():
            plain = apply_block(anchor, block, old)
        if plain.shape != old.shape:
            torch.testing.assert_close(new, plain, rtol=1e-9, atol=1e-9)  # such a block always runs
            continue
        share = rate * step / (len(path) - 1)
        kept = ((new - old) * (plain - old)).flatten(1).sum(1) / (plain - old).square().flatten(1).sum(1)
        factors = sorted({round(float(factor), 6) for factor in kept})
        assert factors == ([round(1 / (1 - share), 6)] if step == 0 else [0.0, round(1 / (1 - share), 6)])
        dropped = float((kept.abs() < 1e-6).double().mean())
        assert dropped == pytest.approx(share, abs=4 * (0.25 / samples) ** 0.5)
        compared += 1
    assert compared >= 2


def test_blocks_without_a_residual_connection_cannot_be_dropped() -> None:
    source, target = tiny_pair("mobilenet_v1")
    model = tiny_stitched(source, target, (3, 3))
    expected = logits(model, images("mobilenet_v1"))
    with torch.no_grad():
        assert torch.equal(model(images("mobilenet_v1"), drop_path=0.1).logits, expected)  # evaluation drops nothing
    model.train()
    assert model(images("mobilenet_v1")).logits.isfinite().all()
    with pytest.raises(
        ValueError, match="stochastic depth of 0.1 for mobilenet_v1.*no residual connection; expected 0"
    ):
        model(images("mobilenet_v1"), drop_path=0.1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "swin"])
def test_gradients_with_checkpointing_are_those_without(kind: str) -> None:
    found: list[dict[str, Tensor]] = []
    runs: list[int] = []
    for checkpointing in (False, True):
        model = tiny_stitched(*middle(kind)).train()
        assert model.supports_gradient_checkpointing
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        count: list[int] = []
        inner = next(module for module in blocks(model.slices[0])[0][0].modules() if isinstance(module, nn.LayerNorm))
        inner.register_forward_hook(lambda *_, count=count: count.append(1))
        model(images(kind), labels=torch.tensor([0, 3])).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        runs.append(len(count))
    assert runs == [1, 2]  # the block ran again in the backward
    for name, gradient in found[0].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)
    assert sum(gradient is not None for gradient in found[0].values()) > 10


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("swinv2", "swinv2"),
        ("levit", "levit"),
        ("resnet", "resnet"),
        ("convnext", "convnext"),
        ("resnet", "swin"),
        ("swin", "resnet"),
    ],
)
def test_kinds_that_cannot_checkpoint_say_so(source: str, target: str) -> None:
    """Swin V2's stages can as a whole, but its blocks cannot, which are what runs here."""
    model = tiny_stitched(*tiny_pair(source, target), (1, 1))
    assert not model.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="does not support"):
        model.gradient_checkpointing_enable()


def test_blocks_are_not_split_between_devices() -> None:
    model = tiny_stitched(*tiny_pair("vit"), (1, 1))
    assert set(model._no_split_modules) == {"ViTLayer"}
    model = tiny_stitched(*tiny_pair("resnet", "swin"), (1, 1))
    assert set(model._no_split_modules) == {"ResNetBasicLayer", "SwinLayer", "SwinPatchMerging"}
