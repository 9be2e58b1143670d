"""Every test and every example runs offline, on one thread, from the same seed; what the examples use is made here."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported; set it to 0 to run the hub tests
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from importlib.util import find_spec
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

collect_ignore = [] if find_spec("fastapi") else ["klas_hf/serving/app.py"]  # the extra `serve`
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """What an example may use beside the public names, made anew for each."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import klas_hf

    doctest_namespace.update({name: getattr(klas_hf, name) for name in klas_hf.__all__})
    doctest_namespace.update(_models() | _data() | {"folder": request.getfixturevalue("tmp_path")})
    doctest_namespace.update({"np": np, "torch": torch})
    doctest_namespace.update(_results(doctest_namespace["source"], doctest_namespace["target"]))
    torch.manual_seed(2)


def _models() -> dict[str, Any]:
    """Random Llamas (vocabulary 64) and ViTs (16×16 pixels, 3 classes) of 3 and 4 blocks, 16 and 24 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "intermediate_size": 32}
    words = {**sizes, "vocab_size": 64, "num_key_value_heads": 1, "eos_token_id": None}
    pixels = {**sizes, "image_size": 16, "patch_size": 8, "num_labels": 3}
    return {
        "source": LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=3, **words)).eval(),
        "target": LlamaForCausalLM(LlamaConfig(hidden_size=24, num_hidden_layers=4, **words)).eval(),
        "small": ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=3, **pixels)).eval(),
        "large": ViTForImageClassification(ViTConfig(hidden_size=24, num_hidden_layers=4, **pixels)).eval(),
    }


class _Pictures:
    """Random images with labels, as `train_stitches` wants them."""

    def __init__(self, images: list[dict[str, torch.Tensor]]):
        self.pixels = torch.cat([batch["pixel_values"] for batch in images])
        self.labels = torch.cat([batch["labels"] for batch in images]).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.pixels[index], self.labels[index]


def _data() -> dict[str, Any]:
    """Four batches of token ids `(4, 16)`, five of images `(4, 3, 16, 16)`; of each the first eight to train on."""
    torch.manual_seed(1)
    batches = []
    for _ in range(4):
        ids = torch.randint(3, 64, (4, 16))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    images = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 3, (4,))} for _ in range(5)]
    lines = [line for batch in batches[:2] for line in batch["input_ids"].tolist()]
    examples = [{"input_ids": line, "labels": line} for line in lines]
    return {"batches": batches, "examples": examples, "images": images, "pictures": _Pictures(images[:2])}


def _results(source: Any, target: Any) -> dict[str, Any]:
    """Scores, costs and rows of made-up figures: Θ grows with the distance in depth, the loss falls with cost."""
    from klas_hf import ResultRow, StitchScores, measure_stitch_costs

    costs = measure_stitch_costs(source, target)
    m, n = costs.macs.shape
    cross = 0.1 + np.abs(np.arange(1, m + 1)[:, None] / m - np.arange(1, n + 1) / n)
    capacity = np.linspace(0.2, 0.4, n - 1)
    errors = cross / 10, capacity / 10, cross[:, :-1] / capacity / 10
    scores = StitchScores("klas", cross, capacity, *errors, sequences=16, tokens=256, costs=costs)
    measured = [ResultRow("source", None, 0, costs.source_total, 4000, {"loss": 4.0})]
    for stitch in scores.stitches:
        macs, size = costs.of(stitch)
        if costs.source_total <= macs <= costs.target_total:
            loss = 4.0 - macs / costs.target_total + scores.value_of(stitch) / 10
            measured.append(ResultRow("all", (stitch.source_stop, stitch.target_start), 0, macs, size, {"loss": loss}))
    measured.append(ResultRow("target", None, 0, costs.target_total, 9000, {"loss": 3.0}))
    return {"scores": scores, "costs": costs, "rows": sorted(measured, key=lambda row: row.macs)}
