"""Compressed heads: what their tensors stand for, how close it is, and that they are evaluated as they are stored."""

from typing import Any

import numpy as np
import pytest
import torch
from kan_examples import BASES, naive_head, stored, stored_coefficients, tiny_kan
from sklearn.cluster import KMeans
from torch.utils._python_dispatch import TorchDispatchMode

from klas_hf import compress_kan, head_bytes
from klas_hf.kan.rivals import pruned_kan, rounded_kan
from klas_hf.kan.sizes import HeadSize
from klas_hf.models import kan_compressed as compressed
from klas_hf.models.kan_compressed import Compression
from klas_hf.models.kan_layers import KANHead
from klas_hf.models.kan_splines import Grid

# Few shapes per output, and more than 16 for the second layer, and for both; indices of whole bytes or not.
FORMS = [(4, 8, "output"), (4, 32, "edge"), (37, 8, "edge"), (37, 32, "output"), (200, 8, "output")]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("codebook", "bits", "bias"), FORMS)
@torch.no_grad()
def test_a_compressed_head_answers_as_the_splines_that_its_tensors_stand_for(
    codebook: int, bits: int, bias: str, base: str
) -> None:
    model = tiny_kan(base=base)
    small = compress_kan(model, codebook, bits=bits, bias=bias)
    features = 3 * torch.randn(7, 16) + 1
    ours = small.run_head(small.head, features)
    torch.testing.assert_close(ours, small.head.dense(small.codebook)(features), rtol=0, atol=1e-5)
    alone = torch.cat([small.run_head(small.head, row[None]) for row in features])  # by values
    torch.testing.assert_close(alone, ours, rtol=0, atol=1e-5)
    state, index_bits = small.state_dict(), max(1, int(np.ceil(np.log2(codebook))))
    layers = [
        (
            stored_coefficients(state, name, inputs, index_bits),
            stored(state, f"{name}.base") if base == "silu" else None,
        )
        for name, inputs in (("head.layers.0", 16), ("head.layers.1", 12))
    ]
    expected = naive_head(features.double().numpy(), layers, small.config.grid)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("codebook", [4, 37, 200])
@torch.no_grad()
def test_a_few_inputs_or_outputs_at_a_time_give_the_same(
    codebook: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, features = compress_kan(tiny_kan(), codebook), torch.randn(images, 16)
    whole = small.run_head(small.head, features)
    monkeypatch.setattr(compressed, "AT_ONCE", 1)
    torch.testing.assert_close(small.run_head(small.head, features), whole, rtol=0, atol=1e-6)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes meanwhile."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and not function.is_view:
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return result


@pytest.mark.parametrize("codebook", [16, 2050])
@torch.no_grad()
def test_no_grid_is_unpacked(codebook: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an evaluation makes is far smaller than the coefficients, and than their indices unpacked."""
    monkeypatch.setattr(compressed, "AT_ONCE", 2**10)
    model = tiny_kan(hidden_widths=[128], num_labels=64)
    small, features = compress_kan(model, torch.randn(codebook, 8)), torch.randn(1, 16)
    edges = 16 * 128 + 128 * 64
    with Largest() as largest:
        small.run_head(small.head, features)
    assert 0 < largest.bytes <= 128 * 8 * 4 * 8 < edges * 8 * 4 / 8  # int64 places of order + 1 numbers, eight inputs
    with Largest() as largest:  # the measure sees a grid where there is one
        small.head.dense(small.codebook)
    assert largest.bytes >= 128 * 64 * 8 * 4


def few_shapes(head: KANHead) -> None:
    """Every edge one of six shapes, times a gain of either sign, plus a bias."""
    shapes = torch.randn(6, head.layers[0].grid.coefficients)
    for layer in head.layers:
        edges = layer.coefficients.shape[:2]
        gains, biases = torch.randn(*edges, 1), torch.randn(*edges, 1)
        layer.coefficients.data = gains * shapes[torch.randint(0, 6, edges)] + biases


@pytest.mark.parametrize("bias", ["output", "edge"])
@torch.no_grad()
def test_six_shapes_of_any_gain_and_bias_need_a_codebook_of_six(bias: str) -> None:
    model, features = tiny_kan(), torch.randn(5, 16)
    few_shapes(model.head)
    small = compress_kan(model, 6, bits=32, bias=bias)
    assert small.config.compression["r2"] == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(small.run_head(small.head, features), model.head(features), rtol=1e-4, atol=1e-4)
    rounded = compress_kan(model, 6, bits=8, bias=bias)
    assert 0.999 < rounded.config.compression["r2"] < 1
    assert compress_kan(model, 2, bits=32).config.compression["r2"] < 0.9


def test_more_of_the_variance_is_kept_than_by_the_paper_s_description() -> None:
    """k-means over unit shapes, each replaced by its centre, gains as they were: by scikit-learn and numpy."""
    model = tiny_kan(hidden_widths=[40])
    edges = np.concatenate([one.coefficients.detach().numpy().reshape(-1, 8) for one in model.head.layers])
    rest = edges - edges.mean(1, keepdims=True)
    gains = np.linalg.norm(rest, axis=1, keepdims=True)
    found = []
    for codebook in (8, 32, 128):
        means = KMeans(codebook, n_init=1, random_state=0).fit(rest / gains)
        kept = 1 - ((gains * means.cluster_centers_[means.labels_] - rest) ** 2).sum() / (rest**2).sum()
        ours = compress_kan(model, codebook, bits=32).config.compression["r2"]
        assert kept < ours < 1
        found.append(ours)
    assert found == sorted(found)


def test_r2_is_the_share_of_variance_that_the_stored_tensors_keep() -> None:
    model = tiny_kan()
    small = compress_kan(model, 16)
    state = small.state_dict()
    lost = total = 0.0
    for name, inputs, layer in (("head.layers.0", 16, 0), ("head.layers.1", 12, 1)):
        whole = model.head.layers[layer].coefficients.detach().numpy()
        kept = stored_coefficients(state, name, inputs, 4)
        rest = whole - whole.mean(-1, keepdims=True)
        lost += ((kept - kept.mean(-1, keepdims=True) - rest) ** 2).sum()
        total += (rest**2).sum()
    assert small.config.compression["r2"] == pytest.approx(1 - lost / total, abs=1e-5)


@torch.no_grad()
def test_biases_per_output_are_exact() -> None:
    """A constant on every edge is one number per output: in int8 per edge it is rounded, as one float32 it is not."""
    model, features = tiny_kan(hidden_widths=[]), torch.randn(5, 16)
    (layer,) = model.head.layers
    layer.coefficients.copy_(torch.randn(5, 16, 1).expand(-1, -1, 8))
    exact, rounded = (compress_kan(model, 4, bias=bias) for bias in ("output", "edge"))
    torch.testing.assert_close(exact.run_head(exact.head, features), model.head(features), rtol=0, atol=1e-5)
    assert (rounded.run_head(rounded.head, features) - model.head(features)).abs().max() > 1e-4


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("codebook", "bits", "bias"), FORMS)
def test_bytes_are_those_of_the_arithmetic(codebook: int, bits: int, bias: str, base: str) -> None:
    model = tiny_kan(base=base)
    small = compress_kan(model, codebook, bits=bits, bias=bias)
    has_base = base == "silu"
    assert head_bytes(model) == HeadSize((16, 12, 5), 8, base=has_base).total() == 4 * (252 * (8 + has_base))
    assert head_bytes(small) == HeadSize((16, 12, 5), 8, Compression(codebook, bits, bias), has_base).total()


def test_shapes_of_another_head_are_taken_as_they_are() -> None:
    one, other = tiny_kan(0), tiny_kan(1)
    shapes = compress_kan(one, 32, bits=32).codebook.read()
    small = compress_kan(other, shapes, bits=32)
    assert torch.equal(small.codebook.read(), shapes)
    own = compress_kan(other, 32, bits=32).config.compression["r2"]
    assert 0.2 < small.config.compression["r2"] < own
    with pytest.raises(ValueError, match=r"got a codebook of shape \(32, 7\); expected \(32, 8\)"):
        compress_kan(other, shapes[:, :7])


def test_the_model_handed_over_stays_as_it_is() -> None:
    model = tiny_kan()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = compress_kan(model, 16)
    with torch.no_grad():
        for parameter in small.backbone.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.compression is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook": 253}, "got codebook=253 for 252 edges; expected at most as many shapes as edges"),
        ({"codebook": 0}, "got codebook=0; expected 1 to 65536"),
        ({"codebook": 65537}, "got codebook=65537"),
        ({"codebook": 4, "bits": 4}, r"got bits=4; expected one of \(8, 32\)"),
        ({"codebook": 4, "bias": "layer"}, r"got bias='layer'; expected one of \('output', 'edge'\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_kan(tiny_kan(), **options)


def test_what_is_no_trained_dense_head_is_refused() -> None:
    model = tiny_kan()
    with pytest.raises(ValueError, match="got a compressed model to compress; expected .* a dense head"):
        compress_kan(compress_kan(model, 4), 4)
    with pytest.raises(ValueError, match="got Linear to compress"):
        compress_kan(torch.nn.Linear(2, 2), 4)
    model.head.layers[0].coefficients.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="got coefficients that are not finite"):
        compress_kan(model, 4)
    with pytest.raises(ValueError, match="got heads on 2 grids"):
        compressed_two()


def compressed_two() -> None:
    from klas_hf.kan.compression import compress_heads

    compress_heads([KANHead([4, 3], Grid(5)), KANHead([4, 3], Grid(6))], Compression(2))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_coefficients_are_the_nearest_of_a_few_levels(bits: int) -> None:
    model = tiny_kan(base="silu")
    rival, levels, size = rounded_kan(model, bits), 2 ** (bits - 1) - 1, 0
    pairs = zip(model.head.parameters(), rival.model.head.parameters(), strict=True)
    for whole, rounded in pairs:
        for row, kept in zip(whole.detach().flatten(1).numpy(), rounded.detach().flatten(1).numpy(), strict=True):
            step = np.abs(row).max() / levels
            grid = step * np.arange(-levels, levels + 1)
            np.testing.assert_allclose(kept, grid[np.abs(row[:, None] - grid).argmin(1)], atol=1e-6)
        size += whole.numel() * bits / 8 + 4 * len(whole)
    assert rival.head_bytes == size
    with pytest.raises(ValueError, match="got bits=1; expected 2 to 8"):
        rounded_kan(model, 1)


def test_pruning_takes_out_the_edges_of_least_norm() -> None:
    model = tiny_kan()
    rival = pruned_kan(model, 0.25)
    whole, kept = (
        np.concatenate([one.coefficients.detach().numpy().reshape(-1, 8) for one in each.head.layers])
        for each in (model, rival.model)
    )
    norms = np.linalg.norm(whole, axis=1)
    order = np.argsort(norms)
    assert not kept[order[:63]].any() and np.array_equal(kept[order[63:]], whole[order[63:]])
    assert rival.head_bytes == (252 - 63) * 8 * 4 + 32
    assert pruned_kan(model, 0.0).head_bytes == head_bytes(model) + 32
    with pytest.raises(ValueError, match="got share=1.0; expected 0 to below 1"):
        pruned_kan(model, 1.0)
