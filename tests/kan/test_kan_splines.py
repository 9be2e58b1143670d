"""Splines and layers against scipy's, one edge at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kan_examples import BASES, naive_head, naive_layer, splines

from klas_hf.models.kan_layers import KANHead, KANLayer
from klas_hf.models.kan_splines import Grid

GRIDS = st.integers(0, 5).flatmap(
    lambda order: st.builds(
        Grid, st.integers(max(1, order), 12), st.just(order), st.floats(-4, -0.5), st.floats(0.5, 4)
    )
)


@settings(max_examples=25)
@given(grid=GRIDS, seed=st.integers(0, 999))
def test_splines_are_scipy_s_inside_the_grid_and_constant_outside(grid: Grid, seed: int) -> None:
    generator = np.random.default_rng(seed)
    inputs = np.concatenate([generator.uniform(-6, 6, 40), [grid.low, grid.high, -100, 100]])
    if grid.order == 0:  # which jump at the knots
        inputs = inputs[:40]
    coefficients = generator.normal(size=(grid.coefficients, 3))
    ours = grid.basis(torch.from_numpy(inputs)).numpy() @ coefficients
    np.testing.assert_allclose(ours, splines(inputs, coefficients, grid), atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_float32_is_exact_to_a_millionth(order: int) -> None:
    grid = Grid(5, order)
    inputs, coefficients = torch.linspace(-4, 4, 2001), torch.randn(grid.coefficients)
    expected = splines(inputs.numpy(), coefficients.numpy(), grid)
    np.testing.assert_allclose((grid.basis(inputs) @ coefficients).numpy(), expected, atol=1e-6)


@settings(max_examples=15)
@given(grid=GRIDS)
def test_order_plus_one_functions_count_and_add_up_to_one(grid: Grid) -> None:
    inputs = torch.linspace(grid.low - 1, grid.high + 1, 97, dtype=torch.float64)
    cell, values = grid.local_basis(inputs)
    assert values.shape == (97, grid.order + 1) and int(cell.min()) == 0 and int(cell.max()) == grid.intervals - 1
    torch.testing.assert_close(values.sum(-1), torch.ones_like(inputs))
    assert float(values.min()) > -1e-12


@pytest.mark.parametrize("base", BASES)
def test_layers_and_heads_equal_a_loop_over_edges(base: str) -> None:
    grid = Grid(4, 2, -1.5, 1.0)
    layer, inputs = KANLayer(3, 4, grid, base), 2 * torch.randn(6, 3)
    weights = [None if one is None else one.detach().numpy() for one in (layer.coefficients, layer.base)]
    np.testing.assert_allclose(layer(inputs).detach().numpy(), naive_layer(inputs.numpy(), *weights, grid), atol=1e-5)
    head = KANHead([3, 7, 4], grid, base).double()
    layers = [
        (one.coefficients.detach().numpy(), None if one.base is None else one.base.detach().numpy())
        for one in head.layers
    ]
    np.testing.assert_allclose(
        head(inputs.double()).detach().numpy(), naive_head(inputs.double().numpy(), layers, grid), atol=1e-9
    )


def test_gradients_are_those_of_finite_differences() -> None:
    layer = KANLayer(2, 3, Grid(4, 3), "silu").double()
    inputs = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: torch.func.functional_call(layer, {"coefficients": c}, x), (
        inputs, layer.coefficients,
    ))  # fmt: skip
    outside = torch.tensor([[9.0, -9.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(KANLayer(2, 1, Grid(4, 3)).double()(outside).sum(), outside)
    assert gradient.tolist() == [[0, 0]]


def test_a_new_head_varies_as_much_as_its_inputs() -> None:
    torch.manual_seed(1)
    head = KANHead([256, 128, 100], Grid(5, 3))
    assert 0.4 < float(head(torch.randn(64, 256)).detach().std()) < 1.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"intervals": 2, "order": 3},
            "got a grid of 2 intervals for splines of order 3; .* at least as many intervals",
        ),
        ({"intervals": 0, "order": 0}, "got a grid of 0 intervals"),
        ({"order": -1}, "order -1; expected an order of 0 or more"),
        ({"low": 1.0, "high": 1.0}, "from 1.0 to 1.0; expected low < high"),
    ],
)
def test_grids_that_are_none_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**fields)


def test_heads_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got widths=\[3\]; expected those of the features and the outputs"):
        KANHead([3], Grid())
    with pytest.raises(ValueError, match=r"got base='relu'; expected one of \('none', 'silu'\)"):
        KANHead([3, 2], Grid(), "relu")
