"""Two CPU processes that draw paths of their own equal one that averages the gradients of both paths by hand."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from image_examples import ToyImages, changed, tiny_resnet, toy_supernet
from safetensors.torch import load_file
from supernet_run import CONFIG, IMAGES
from torch import Tensor

HERE = Path(__file__).parent


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What supernet_run.py leaves under torchrun, as `accelerate launch` starts it on two CPU processes."""
    folder = tmp_path_factory.mktemp("processes")
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = ["torch.distributed.run", "--nproc_per_node", "2", *rendezvous, str(HERE / "supernet_run.py")]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-m", *command, str(folder)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def labels_of(pixels: Tensor) -> list[int]:
    """The label of each image, found by its pixels; a blank filler has none."""
    data = ToyImages(IMAGES)
    distances = (pixels[:, None] - data.normalised()).abs().amax((2, 3, 4))
    return [data.labels[int(row.argmin())] for row in distances if row.min() < 1e-5]


def test_gradients_of_two_paths_are_averaged(folder: Path) -> None:
    found = [load_file(folder / f"supernet-{process}.safetensors") for process in range(2)]
    model = toy_supernet()
    stitching = [p for name, p in model.named_parameters() if name.startswith("joints")]
    anchors = [p for name, p in model.named_parameters() if name.startswith("anchors")]
    rates = {CONFIG.stitch_learning_rate: stitching, CONFIG.learning_rate: anchors}
    groups = [
        {"params": [p for p in group if (p.ndim > 1) == is_matrix], "lr": rate, "weight_decay": 0.1 * is_matrix}
        for rate, group in rates.items()
        for is_matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in optimizer.param_groups]
    sizes = []
    for step in range(6):
        total, count = torch.zeros(()), 0
        for process in range(2):
            for forward in (2 * step, 2 * step + 1):
                pixels, path = found[process][f"pixels.{forward}"], model.paths[found[process][f"path.{forward}"]]
                labels = labels_of(pixels)
                if labels:
                    total = total + F.cross_entropy(
                        model(pixels, path=path).logits, torch.tensor(labels), reduction="sum"
                    )
                count += len(labels)
        sizes.append(count)
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / 6))
        optimizer.step()
        assert float(found[0]["losses"][step]) == pytest.approx(loss.item(), rel=1e-5)
    assert sizes == [8, 5] * 3
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[0][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_processes_draw_different_paths_and_end_alike(folder: Path) -> None:
    one, other = (load_file(folder / f"supernet-{process}.safetensors") for process in range(2))
    assert any(int(one[f"path.{n}"]) != int(other[f"path.{n}"]) for n in range(12))
    for name in toy_supernet().state_dict():
        assert torch.equal(one[name], other[name]), name


def test_statistics_end_alike(folder: Path) -> None:
    one, other = (load_file(folder / f"resnet-{process}.safetensors") for process in range(2))
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name
    trained = tiny_resnet()
    trained.load_state_dict(one)
    assert "resnet.embedder.embedder.normalization.running_mean" in changed(trained, tiny_resnet())
