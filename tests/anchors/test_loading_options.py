"""Anchors named by folder or id: loaded onto accelerate's device, in their checkpoints' dtype, with all options."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids
from tiny_vision import images, tiny_pair
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from klas_hf import (
    StitchedModel,
    StitchedSupernet,
    score_stitches,
    search_paths,
    select_anchors,
    shortgpt_paths,
    train_probes,
)
from klas_hf.anchors import language
from klas_hf.anchors.loading import load_anchors
from klas_hf.maths.least_squares import LeastSquares, summing_device

IDS = [token_ids(4, 12, seed=seed) for seed in range(8)]
GIVEN = {"dtype": torch.bfloat16, "attn_implementation": "eager", "token": "hf_xyz"}


class Loaded(Exception):
    """Stops a call where it loads its first anchor."""


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for name, model in (("small", tiny_model(seed=1)), ("large", tiny_model(large=True, seed=2))):
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    return [str(tmp_path / "small"), str(tmp_path / "large")]


@pytest.fixture
def classifiers(tmp_path: Path) -> list[str]:
    for name, model in zip(("few", "many"), tiny_pair("vit"), strict=True):
        model.save_pretrained(tmp_path / name)
    return [str(tmp_path / "few"), str(tmp_path / "many")]


CALLS: dict[str, Callable[..., Any]] = {
    "score_stitches": lambda two, _, **options: score_stitches(*two, IDS, revisions=["a", "b"], **options),
    "search_paths": lambda two, _, **options: search_paths(two, IDS, revisions=["a", "b"], **options),
    "train_probes": lambda two, _, **options: train_probes(two[0], IDS, revision="a", **options),
    "of images": lambda _, two, **options: train_probes(two[0], [images("vit")], revision="a", **options),
    "select_anchors": lambda _, two, **options: select_anchors(two, [images("vit")], revisions=["a", "b"], **options),
    "from_anchors": lambda two, _, **options: StitchedSupernet.from_anchors(
        two, ["0[:1] 1[2:]"], revisions=["a", "b"], **options
    ),
    "budget": lambda two, _, **options: StitchedModel.from_anchors(
        *two, budget="80%", calibration=IDS, source_revision="a", target_revision="b", **options
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_options_reach_the_loading(
    call: str, folders: list[str], classifiers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def stopped(name: str, **options: Any) -> None:
        seen.append(options)
        raise Loaded

    for auto in (AutoModelForCausalLM, AutoModelForImageClassification):
        monkeypatch.setattr(auto, "from_pretrained", stopped)
    with pytest.raises(Loaded):
        CALLS[call](folders, classifiers, **GIVEN)
    (options,) = seen
    assert {name: options[name] for name in GIVEN} == GIVEN and options["revision"] == "a"


def test_anchors_lie_on_the_accelerator_in_their_own_dtype_and_models_stay_where_they_are(
    folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "process_state", lambda: SimpleNamespace(device=torch.device("meta")))
    held = tiny_model(seed=3)
    named, given, chosen = (load_anchors([one], **options)[0] for one, options in (
        (folders[0], {}), (held, {}), (folders[1], {"device_map": {"": "cpu"}, "dtype": torch.float32})
    ))  # fmt: skip
    assert (named.device.type, named.model.dtype) == ("meta", torch.bfloat16)
    assert given.model is held and given.device.type == "cpu"
    assert (chosen.device.type, chosen.model.dtype) == ("cpu", torch.float32)
    model = StitchedModel.from_path(folders, "1[:]")
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


def test_pruning_rules_take_an_anchor_by_name(folders: list[str]) -> None:
    assert shortgpt_paths(folders[1], IDS).paths == shortgpt_paths(load_anchors(folders)[1], IDS).paths


@pytest.mark.parametrize(("device", "home"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("xpu", "xpu"), ("mps", "cpu")])
def test_sums_in_float64_live_where_there_is_float64(device: str, home: str) -> None:
    assert summing_device(device) == torch.device(home)
    if home == "cpu":
        sums = LeastSquares(2, 2, device)
        x = torch.randn(20, 2)
        sums.update(x, 3 * x)
        torch.testing.assert_close(sums.solve(0.0).weight, 3 * torch.eye(2, dtype=torch.float64))
