"""Bytes by arithmetic, beside those that the SHARe-KAN paper states (arXiv 2512.15742, abstract)."""

import pytest

from klas_hf.kan.sizes import CHIPS, HeadSize, cache_level
from klas_hf.models.kan_compressed import Compression

PAPER = Compression(65536, bits=8, bias="edge")
DENSE, SMALL = 58.67e6, 6.32e6  # bytes of one head


def test_an_edge_of_the_paper_s_takes_four_bytes_for_fourteen_floats() -> None:
    """2²⁰ edges, 14 coefficients: dense within .1 %; 50 heads to the printed digits: 2.9 GB, 211 MB, 13.9×."""
    dense, small = HeadSize((2048, 512), 14), HeadSize((2048, 512), 14, PAPER)
    assert dense.edges == 2**20 and dense.total() == pytest.approx(DENSE, rel=1e-3)
    assert (small.head - 2 * 4 * 512) / small.edges == 4  # but for two scales per output
    assert f"{dense.total(50) / 1e9:.1f}" == "2.9" and f"{small.total(50) / 1e6:.0f}" == "211"
    assert f"{dense.total(50) / small.total(50):.1f}" == "13.9"


def test_the_paper_s_two_totals_are_those_of_four_bytes_an_edge_and_one_table() -> None:
    """The abstract gives no shape: edges from its dense total at 14 floats, the table from what else one head has."""
    edges = DENSE / (4 * 14)
    per_edge = (HeadSize((2048, 512), 14, PAPER).head - 2 * 4 * 512) // 2**20
    table = SMALL - per_edge * edges
    assert edges == pytest.approx(2**20, rel=1e-3)
    fifty = 50 * per_edge * edges + table
    assert f"{DENSE / (per_edge * edges + table):.1f}" == "9.3"
    assert int(fifty / 1e6) == 211 and f"{50 * DENSE / fifty:.1f}" == "13.9"
    assert table / 65536 == pytest.approx(32.5, abs=0.1)  # bytes per shape: between 14 in fp16 (28) and in fp32 (56)


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        (Compression(256), 1024 * 2 + 32 * 8 + 256 * 8 + 4),
        (Compression(256, bias="edge"), 1024 * 3 + 32 * 8 + 256 * 8 + 4),
        (Compression(256, bits=32), 1024 * 5 + 32 * 4 + 256 * 8 * 4),
        (Compression(64), 1024 * 6 // 8 + 1024 + 32 * 8 + 64 * 8 + 4),
    ],
)
def test_sizes_counted_by_hand(compression: Compression, expected: int) -> None:
    assert HeadSize((32, 32), 8, compression).total() == expected


def test_a_cache_holds_what_fills_at_most_half_of_it() -> None:
    chip = CHIPS[0]
    assert [cache_level(size, chip) for size in (chip.l1 // 2, chip.l1 // 2 + 1, chip.l2 // 2, chip.l2)] == [
        "L1", "L2", "L2", "memory",
    ]  # fmt: skip
