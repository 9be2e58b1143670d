"""The benchmark of KAN heads runs, and its peer in efficient-kan's form computes what a head with a SiLU base does."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from klas_hf.models.kan_layers import KANLayer
from klas_hf.models.kan_splines import Grid

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kan.py"


@pytest.mark.slow
def test_every_form_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kan.py", "--smoke"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [cells[0].strip() for cells in table] == [
        "dense KAN", "efficient-kan's form", "look-up, 4 shapes", "look-up, 16 shapes", "MLP of these widths",
        "MLP of the last look-up's bytes",
    ]  # fmt: skip
    assert all(float(cell.replace(",", "")) > 0 for cells in table for cell in cells[1:])


@torch.no_grad()
def test_the_peer_is_the_same_function_inside_the_grid() -> None:
    spec = importlib.util.spec_from_file_location("kan_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kan_benchmark"] = module
    spec.loader.exec_module(module)
    grid = Grid(7, 3)
    peer, ours = module.EfficientKANLayer(5, 4, grid), KANLayer(5, 4, grid, "silu")
    ours.coefficients.copy_(peer.coefficients)
    ours.base.copy_(peer.base)
    inputs = torch.rand(9, 5) * 5.8 - 2.9
    torch.testing.assert_close(peer(inputs), ours(inputs), rtol=1e-4, atol=1e-5)
