"""The benchmark of all-pairs scoring runs, and does the work that it times."""

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pairwise_kl.py"


def test_every_figure_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(SCRIPT))
    sizes = {"source_blocks": 2, "target_blocks": 3, "source_width": 8, "target_width": 12, "vocabulary": 50}
    script["main"](script["Options"](**sizes, tokens=5, pairwise_tokens=4, repeats=1, threads=torch.get_num_threads()))
    shown = capsys.readouterr().out
    for what in ("peak memory", "all-pairs KL", "whole pass"):
        assert what in shown
    assert "nan" not in shown


@pytest.mark.parametrize("tokens", [5, 8])
def test_batches_hold_as_many_counted_tokens_as_asked_for(tokens: int) -> None:
    script = runpy.run_path(str(SCRIPT))
    options = script["Options"](vocabulary=50, tokens=tokens, source_blocks=1)
    batch = script["batch"](options, script["thin_anchor"](options, 1, 8))
    assert int(batch.counted.sum()) == tokens
