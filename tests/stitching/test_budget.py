"""`StitchedModel.from_anchors(budget=…)`: the path that a search finds for a budget, assembled."""

from pathlib import Path as Folder
from typing import Any

import pytest
import torch
from tiny_models import save_with_tokenizer, tiny_model, token_ids
from tiny_vision import tiny_classifier
from torch import Tensor

from klas_hf import SearchConfig, StitchedForCausalLM, StitchedModel, measure_costs, search_paths
from klas_hf.anchors import loading
from klas_hf.budgets import Budget
from klas_hf.costs import Cost
from klas_hf.selection.plan import search_within

QUICK = SearchConfig(buckets=4, beam=1, joints=1)


def anchors() -> list[Any]:
    return [tiny_model(seed=0), tiny_model(large=True, seed=1)]


def batches(count: int = 6) -> list[Tensor]:
    return [token_ids(8, 12, seed=seed) for seed in range(count)]


def same(one: Any, other: Any) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("budget", [0.6, "60%"])
def test_a_share_gives_the_best_path_that_a_search_finds_within_it(budget: float | str) -> None:
    small, large = anchors()
    model = StitchedModel.from_anchors(small, large, budget=budget, calibration=batches(), search=QUICK)
    found = search_paths([small, large], batches(), QUICK, tokens=12)
    path = found.best(0.6)
    assert model.config.path == str(path) and path.joints == 1
    joint = found.joint(path)
    assert same(model, StitchedModel.from_path([small, large], path, calibration=batches(), joint=joint))
    assert measure_costs(model, tokens=12).macs <= 0.6 * measure_costs(large, tokens=12).macs
    place = found.place(path)
    assert model.config.search == {
        "budget": str(budget), "share": found.share(path), "divergence": found.divergence[place],
        "error": found.error[place], "paths": len(found),
    }  # fmt: skip


def test_parameters_bytes_and_costs_are_budgets_and_how_a_path_was_found_is_saved(tmp_path: Folder) -> None:
    small, large = anchors()
    whole = measure_costs(large, tokens=12)
    limit = (large.num_parameters() + small.num_parameters()) // 2
    for budget in (f"{limit / 1e3}K", f"{4 * limit / 1e3} KB", Cost(whole.macs, limit)):
        model = StitchedModel.from_anchors(small, large, budget=budget, calibration=batches(), search=QUICK)
        assert model.num_parameters() <= limit
    model.save_pretrained(tmp_path)
    assert StitchedModel.from_pretrained(tmp_path).config.search == model.config.search
    assert StitchedModel.from_anchors(small, large, (1, 2), calibration=batches()).config.search is None


def test_the_whole_budget_gives_the_dearest_anchor_itself() -> None:
    small, large = anchors()
    model = StitchedModel.from_anchors(small, large, budget="100%", calibration=batches(), search=QUICK)
    assert isinstance(model, StitchedForCausalLM) and model.config.path == "1[:]"
    ids = token_ids(2, 9)
    torch.testing.assert_close(model(ids).logits, large(ids).logits, rtol=0, atol=0)


def test_images_from_folders(tmp_path: Folder) -> None:
    for name, is_large in (("small", False), ("large", True)):
        tiny_classifier("vit", large=is_large, seed=int(is_large)).float().save_pretrained(tmp_path / name)
    names = [tmp_path / "small", tmp_path / "large"]
    images = [torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    model = StitchedModel.from_anchors(*names, budget="70%", calibration=images, search=QUICK)
    found = search_paths(names, images, QUICK)
    assert model.config.path == str(found.best("70%"))
    assert model.config.anchor_names[found.best("70%").slices[-1].anchor] == str(names[-1])


def test_a_folder_of_text_anchors_is_searched_in_the_dtype_asked_for(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (save_with_tokenizer(model, tmp_path / str(n)) for n, model in enumerate(anchors()))
    seen, load = [], loading.load_anchor

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(load(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(loading, "load_anchor", noted)
    model = StitchedModel.from_anchors(
        small, large, budget=0.6, calibration=batches(), search=QUICK, dtype=torch.bfloat16, calibration_items=24
    )
    dtypes = {anchor.model.dtype for anchor in seen if anchor.device.type != "meta"}
    assert dtypes == {torch.bfloat16} == {model.dtype} and model.config.joint_fits[0]["rows"] == 24 * 11


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, "got stitch=None and budget=None; expected exactly one"),
        ({"stitch": (1, 2), "budget": 0.5}, r"got stitch=\(1, 2\) and budget=0.5; expected exactly one"),
        ({"stitch": (1, 2), "search": QUICK}, "got search=… with a stitch"),
        ({"budget": 0.6, "calibration": None}, "no calibration; expected calibration=batches"),
        (
            {"budget": "3%"},
            "below what any path .* expected at least .*% of the dearest anchor's MACs .* at most 100.0%",
        ),
        ({"budget": "9B"}, "above the dearest anchor itself; expected at least"),
        ({"budget": "lots"}, "got budget='lots'; expected a share"),
    ],
)
def test_mistakes_are_told_before_an_anchor_is_loaded(
    words: dict[str, Any], expected: str, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [save_with_tokenizer(model, tmp_path / str(n)) for n, model in enumerate(anchors())]
    monkeypatch.setattr("klas_hf.anchors.language.pretrained", lambda *_, **__: pytest.fail("an anchor was loaded"))
    with pytest.raises(ValueError, match=expected):
        StitchedModel.from_anchors(*names, **{"calibration": batches()} | words)


def test_a_small_share_is_searched_for_below_what_a_search_looks_at_by_itself() -> None:
    small, large = tiny_model(seed=1), tiny_model(large=True, num_hidden_layers=12, seed=2)
    model = StitchedModel.from_anchors(small, large, budget=0.19, calibration=batches())
    share = measure_costs(model, tokens=12).macs / measure_costs(large, tokens=12).macs
    assert share <= 0.19 < 0.2 == SearchConfig.cheapest
    dearest = Cost(macs=10**9, parameters=3 * 10**9)
    assert search_within(Budget.of("2B"), dearest, 2) == SearchConfig(cost="parameters")
    assert search_within(Budget.of(0.6), dearest, 2) == SearchConfig(cost="macs")
    assert search_within(Budget.of(0.1), dearest, 2).cheapest == pytest.approx(0.08)
