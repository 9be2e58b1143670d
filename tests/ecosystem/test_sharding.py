"""Several processes and several places: replicas, FSDP2 and device maps give what one model in one place gives."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_run import batches, optimizer_of, rows, steps, training
from stitched_examples import KV_SHAPES, logits_of, saved, stitched_classifier, stitched_lm, tied_lm
from tiny_models import token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from klas_hf import StitchedModel, train_stitches

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
KINDS = ["equal", "unequal", "classifier"]
TIED = ["ddp tied", "fsdp2 tied"]  # transformers' own FSDP2 loses gradients of tied weights, of a plain Llama too
TRAINED = ["stitch", "lora", "full"]
WAYS = (
    [f"{way} {kind}" for way in ("ddp", "fsdp2", "native") for kind in KINDS]
    + TIED
    + [f"{way} {one}" for way in ("train", "resume") for one in TRAINED]
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes do, in one launch."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in [*KINDS, "tied"]:
        made = {"classifier": stitched_classifier, "tied": tied_lm}.get(kind, partial(stitched_lm, kind))
        saved(made(), folder / kind)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    settings = {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *sys.path]),
    }  # fmt: skip
    run = subprocess.run(
        [*launch, str(HERE / "sharded_run.py"), str(folder), ",".join(WAYS)],
        capture_output=True, text=True, timeout=240, env=os.environ | settings,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def read(folder: Path, way: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = json.loads((folder / f"{way}.json").read_text())
    assert found["processes"] == 2
    return found, load_file(folder / f"{way}.safetensors")


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def in_one_process(folder: Path, kind: str) -> tuple[PreTrainedModel, list[float]]:
    model = StitchedModel.from_pretrained(folder / kind)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = steps(model, optimizer_of(model), batches(kind))
    assert sum((tensor - start[name]).abs().max() > 1e-3 for name, tensor in model.state_dict().items()) > 5
    return model, losses


@pytest.mark.parametrize("kind", [*KINDS, "tied"])
def test_replicas_give_what_one_process_gives(kind: str, runs: Path) -> None:
    model, losses = in_one_process(runs, kind)
    found, state = read(runs, f"ddp {kind}")
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["sharded"] == 0
    assert_close(state, model.state_dict())


@pytest.mark.parametrize(
    ("way", "kind"), [(way, kind) for way in ("fsdp2", "native") for kind in KINDS] + [("fsdp2", "tied")]
)
def test_shards_give_what_one_process_gives(way: str, kind: str, runs: Path) -> None:
    """By accelerate over `_no_split_modules`, and by transformers over its own plan; each holds half of the model."""
    model, losses = in_one_process(runs, kind)
    found, state = read(runs, f"{way} {kind}")
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["sharded"] == 1
    assert found["here"] < 0.55 * sum(parameter.numel() for parameter in model.parameters())
    block = "ViTLayer" if kind == "classifier" else "LlamaDecoderLayer"
    assert {block, type(model).__name__} <= set(found["units"])
    stitch = "StitchingLayer" if kind == "classifier" else "Linear"
    assert way == "fsdp2" or stitch in found["units"]  # the model's plan names it
    assert_close(state, model.state_dict())


@pytest.mark.parametrize("way", [f"native {kind}" for kind in KINDS] + [f"train {one}" for one in TRAINED])
def test_a_sharded_model_is_saved_whole(way: str, runs: Path) -> None:
    """By itself where transformers sharded it; with its gathered tensors where `train_stitches` did."""
    loaded = StitchedModel.from_pretrained(runs / f"{way} saved")
    _, state = read(runs, way)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("trainable", TRAINED)
def test_train_stitches_takes_shards(trainable: str, runs: Path) -> None:
    """The package's own loop under FSDP2: what learns stays sharded, LoRA is merged, weights are as of one process."""
    model = StitchedModel.from_pretrained(runs / "unequal")
    losses = train_stitches(model, rows(), training(trainable, processes=1)).losses
    found, state = read(runs, f"train {trainable}")
    assert found["losses"] == pytest.approx(losses, rel=1e-4)
    assert found["sharded"] == 1
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    start = load_file(runs / "unequal" / "model.safetensors")
    for name, tensor in expected.items():
        # Adam's first steps are as long for the smallest gradient as for any, in the direction of its sign.
        assert (state[name] - tensor).abs().mean() < 0.02 * 1e-3, name
        assert ("joints" in name or trainable != "stitch") or torch.equal(tensor, start[name])


@pytest.mark.parametrize("trainable", TRAINED)
def test_train_stitches_resumes_over_shards(trainable: str, runs: Path) -> None:
    (found, state), (expected, whole) = read(runs, f"resume {trainable}"), read(runs, f"train {trainable}")
    assert found["losses"] == expected["losses"] and found["sharded"] == 1
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())


PLACES = {
    "equal": {
        "model.slices.0": "cpu",
        "model.joints": "cpu",
        "model.slices.1": "disk",
        "model.slices.2": "disk",
        "lm_head": "cpu",
    },
    "unequal": {
        "model.slices.0": "disk",
        "model.joints.0": "disk",
        "model.joints.1": "cpu",
        "model.slices.1": "cpu",
        "model.slices.2": "disk",
        "lm_head": "disk",
    },
}


@pytest.mark.parametrize("kv_shapes", KV_SHAPES)
def test_slices_may_lie_on_the_disk(kv_shapes: str, tmp_path: Path) -> None:
    """Loaded block by block in the forward pass; the others stay in memory."""
    model = stitched_lm(kv_shapes)
    folder, places = saved(model, tmp_path / "model"), PLACES[kv_shapes]
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.hf_device_map == places
    for side, place in places.items():
        devices = {parameter.device.type for parameter in loaded.get_submodule(side).parameters()}
        assert devices == {"meta" if place == "disk" else "cpu"}
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(token_ids(2, 5), **settings), model.generate(token_ids(2, 5), **settings))
    assert_close(load_file(saved(loaded, tmp_path / "again") / "model.safetensors"), model.state_dict())


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_blocks_that_do_not_fit_go_to_the_disk(kind: str, tmp_path: Path) -> None:
    """`device_map="auto"` with little memory never splits a block."""
    model = stitched_lm() if kind == "lm" else stitched_classifier()
    folder = saved(model, tmp_path / "model")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    for memory in ({"cpu": size // 2}, {"cpu": 10 * size}):
        loaded = StitchedModel.from_pretrained(
            folder, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
        )
        meta = {name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"}
        assert (0 < len(meta) < len(list(loaded.parameters()))) == (memory["cpu"] < size)
        blocks = [one for one in loaded.modules() if type(one).__name__ in ("LlamaDecoderLayer", "ViTLayer")]
        assert blocks and all(len({parameter.device for parameter in one.parameters()}) == 1 for one in blocks)
        assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.filterwarnings("ignore:the stitching layer is random")
@pytest.mark.parametrize("device_map", ["auto", "sequential", "balanced", {"": "cpu"}])
def test_every_map_of_one_device_is_the_plain_model(device_map: Any, tmp_path: Path) -> None:
    for model in (stitched_lm(), stitched_classifier()):
        loaded = StitchedModel.from_pretrained(saved(model, tmp_path / type(model).__name__), device_map=device_map)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        assert torch.equal(logits_of(loaded), logits_of(model))
    assert torch.equal(logits_of(stitched_lm(device_map=device_map)), logits_of(stitched_lm()))


def test_anchors_are_stitched_across_places(tmp_path: Path) -> None:
    """`from_anchors` with a map that leaves the target's blocks on the disk."""
    model, ways = stitched_lm(), {"device_map": PLACES["equal"], "offload_folder": tmp_path}
    offloaded = stitched_lm(**ways)
    assert {parameter.device.type for parameter in offloaded.model.slices[1].parameters()} == {"meta"}
    assert torch.equal(logits_of(offloaded), logits_of(model))
