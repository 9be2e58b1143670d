"""Classifiers with KAN heads in ExecuTorch's own runtime: same answers, heads stored as compressed."""

from pathlib import Path

import pytest
import torch
from kan_examples import tiny_kan
from torch import Tensor

from klas_hf import compress_kan, head_bytes
from klas_hf.kan.export import export_kan

pytest.importorskip("executorch.exir", reason="the optional executorch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the stitching layer is random"),
]


def run(program: Path, inputs: Tensor) -> Tensor:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(program).load_method("forward").execute([inputs])[0]


@pytest.mark.parametrize(
    ("codebook", "bits", "bias"),
    [(None, 8, "output"), (256, 8, "output"), (4, 8, "edge"), (37, 32, "edge"), (300, 8, "output")],
)
@torch.no_grad()
def test_a_head_alone_answers_the_same(codebook: int | None, bits: int, bias: str, tmp_path: Path) -> None:
    """Indices of 2, 6, 8 and 9 bits; fewer shapes than outputs, and more."""
    model = tiny_kan(base="silu", hidden_widths=[24])
    model = model if codebook is None else compress_kan(model, codebook, bits=bits, bias=bias)
    features = 3 * torch.randn(2, 16)
    program = export_kan(model, tmp_path / "head.pte", features, head_only=True)
    torch.testing.assert_close(run(program, features), model.run_head(model.head, features), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lowered", [False, True], ids=["portable kernels", "XNNPACK"])
@torch.no_grad()
def test_a_whole_stitched_model_answers_the_same(lowered: bool, tmp_path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    model = compress_kan(tiny_kan(stitched=True), 64)
    pixels = torch.randn(1, 3, 32, 32)
    parts = [XnnpackPartitioner()] if lowered else None
    program = export_kan(model, tmp_path / "model.pte", pixels, partitioners=parts)
    assert (b"XnnpackBackend" in program.read_bytes()) == lowered
    torch.testing.assert_close(run(program, pixels), model(pixels).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_program_grows_by_the_bytes_of_the_compressed_head(tmp_path: Path) -> None:
    """Nothing is unpacked into the file: a larger head adds what its tensors take."""
    grown = []
    for width in (64, 512):
        model = compress_kan(tiny_kan(hidden_widths=[width]), 256)
        program = export_kan(model, tmp_path / "head.pte", torch.randn(1, 16), head_only=True)
        grown.append((program.stat().st_size, head_bytes(model)))
    (small, small_bytes), (large, large_bytes) = grown
    assert large - small == pytest.approx(large_bytes - small_bytes, rel=0.1)
