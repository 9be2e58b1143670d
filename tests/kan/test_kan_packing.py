"""Indices in the least bits, as numpy packs them; matrices in int8."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klas_hf.models.kan_packing import Rows, index_bits, pack_rows, unpack_rows


@settings(max_examples=60)
@given(bits=st.integers(1, 16), rows=st.integers(1, 4), count=st.integers(1, 11), seed=st.integers(0, 99))
def test_rows_of_indices_are_packed_as_numpy_packs_bits(bits: int, rows: int, count: int, seed: int) -> None:
    indices = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (rows, count)))
    packed = pack_rows(indices, bits)
    ones = (indices.numpy()[..., None] >> np.arange(bits)) & 1
    expected = np.packbits(ones.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(packed.numpy(), expected)
    assert torch.equal(unpack_rows(packed, bits, count), indices.int())
    with patch("torch.compiler.is_exporting", return_value=True):  # in ExecuTorch's operations
        assert torch.equal(unpack_rows(packed, bits, count), indices.int())


@pytest.mark.parametrize(
    ("entries", "bits"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8), (257, 9), (65536, 16)]
)
def test_an_index_takes_the_least_bits(entries: int, bits: int) -> None:
    assert index_bits(entries) == bits


@pytest.mark.parametrize("scales", [5, 1])
def test_int8_is_off_by_at_most_half_a_step_of_its_row(scales: int) -> None:
    matrix = torch.randn(5, 40) * torch.tensor([1e-6, 0.1, 1.0, 30.0, 0.0])[:, None]
    rows = Rows(5, 40, 8, scales)
    rows.store(matrix)
    peaks = matrix.abs().amax(1, keepdim=True) if scales == 5 else matrix.abs().max()
    assert rows.values.dtype == torch.int8 and (rows.read() - matrix).abs().le(peaks / 127 * 0.5001).all()


def test_float32_is_kept_as_it_is() -> None:
    rows, matrix = Rows(3, 4, 32, 3), torch.randn(3, 4)
    rows.store(matrix)
    assert torch.equal(rows.read(), matrix) and set(rows.state_dict()) == {"values"}
