"""Runs that meet what they should not: numbers that are none, folders that nobody may write to, tokens to be kept."""

import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids
from tiny_vision import tiny_pair
from torch import Tensor

from klas_hf import (
    FunctionalScoring,
    ImageProbeConfig,
    ResultRow,
    RowFile,
    SearchConfig,
    StitchedModel,
    StitchedSupernet,
    TrainingConfig,
    TrainingDiverged,
    evaluate,
    save_delta,
    score_stitches,
    search_paths,
    train_probes,
    train_stitches,
)
from klas_hf.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
BAD = [float("nan"), float("inf"), float("-inf")]


# ---- batches that hold no numbers


def images(bad: float | None, batches: int = 6) -> list[dict[str, Tensor]]:
    """Batches of four; in one of them a pixel is bad."""
    made = [{"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)} for _ in range(batches)]
    if bad is not None:
        made[batches // 2 + 1]["pixel_values"][1, 0, 5, 7] = bad
    return made


@pytest.fixture(scope="module")
def pair() -> list[Any]:
    return list(tiny_pair("vit"))


def scored(pair: list[Any], data: list[dict[str, Tensor]]) -> Any:
    return score_stitches(*pair, data)


def searched(pair: list[Any], data: list[dict[str, Tensor]]) -> Any:
    return search_paths(pair, data, SearchConfig(joints=1, buckets=3, scoring=FunctionalScoring(temperature=1.0)))


def probed(pair: list[Any], data: list[dict[str, Tensor]]) -> Any:
    return train_probes(pair[0], data, ImageProbeConfig(epochs=1))


def stitched(pair: list[Any], data: list[dict[str, Tensor]]) -> Any:
    return StitchedModel.from_anchors(*pair, (1, 2), calibration=data)


def supernet(pair: list[Any], data: list[dict[str, Tensor]]) -> Any:
    return StitchedSupernet.from_anchors(pair, [(1, 1), (1, 2)], calibration=data)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("run", [scored, searched, probed, stitched, supernet])
def test_a_bad_batch_of_images_is_refused(run: Callable, bad: float, pair: list[Any]) -> None:
    with pytest.raises((ValueError, TrainingDiverged), match="got .*(NaN|infinite|nan|inf)"):
        run(pair, images(bad))


def test_good_batches_of_images_pass(pair: list[Any]) -> None:
    for run in (scored, searched, probed, stitched, supernet):
        run(pair, images(None))


class Pictures:
    """Images of four classes, one of them bad; counted from the end of the first epoch."""

    def __init__(self, bad: float | None):
        self.pixels, self.labels = torch.randn(16, 3, 32, 32), [number % 4 for number in range(16)]
        if bad is not None:
            self.pixels[9, 0, 5, 7] = bad

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        return self.pixels[index], self.labels[index]


@pytest.mark.parametrize("bad", BAD)
def test_training_on_a_bad_image_stops_and_keeps_the_last_checkpoint(
    bad: float, pair: list[Any], tmp_path: File
) -> None:
    model = StitchedModel.from_anchors(*pair, (1, 2))
    config = TrainingConfig(
        trainable="full", epochs=3, per_device_batch_size=4, gradient_accumulation_steps=1, save_steps=1
    )
    with pytest.raises(TrainingDiverged, match="nan|inf"):
        train_stitches(model, Pictures(bad), config, output_dir=tmp_path)
    kept = list(tmp_path.glob("checkpoint-*"))
    assert len(kept) <= 1  # none where the very first batch was bad


@pytest.mark.parametrize("where", ["embedding", "block", "head"])
def test_language_models_that_give_no_numbers_are_refused(where: str) -> None:
    small, large = tiny_model(seed=1), tiny_model(large=True, seed=2)
    place = {
        "embedding": "model.embed_tokens.weight",
        "block": "model.layers.1.mlp.up_proj.weight",
        "head": "model.norm.weight",
    }
    with torch.no_grad():
        large.get_parameter(place[where])[3:5] = float("nan")
    data = [{"input_ids": token_ids(4, 16, seed=seed)} for seed in range(4)]
    scoring = FunctionalScoring(calibration=data[:2], temperature=1.0)
    for run in (
        lambda: score_stitches(small, large, data),
        lambda: search_paths([small, large], data, SearchConfig(joints=1, buckets=3, scoring=scoring), tokens=16),
    ):
        with pytest.raises(ValueError, match="got NaN or infinite .*expected finite"):
            run()


# ---- folders that nobody may write to


def as_nobody(run: Callable[[], Any]) -> str:
    """What a call says that fails without the rights of the superuser, whom modes of folders do not bind."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            run()
            said = "nothing"
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode()[-4000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


WRITES: dict[str, Callable[[Any, File], Any]] = {
    "rows": lambda made, place: RowFile(place / "rows.jsonl", {}).append(
        ResultRow("klas", (1, 2), 0, 10, 20, {"loss": 1.0})
    ),
    "model": lambda made, place: made["model"].save_pretrained(place / "model"),
    "model in place": lambda made, place: made["model"].save_pretrained(place),
    "delta": lambda made, place: save_delta(made["delta"], place / "delta"),
    "scores": lambda made, place: made["scores"].save(place / "scores.safetensors"),
    "probes": lambda made, place: made["probes"].save_pretrained(place / "probes"),
    "training": lambda made, place: train_stitches(
        tiny_model(), [{"input_ids": one, "labels": one} for one in token_ids(4, 8).tolist()],
        TrainingConfig(trainable="full", max_steps=1, per_device_batch_size=4, gradient_accumulation_steps=1),
        output_dir=place / "run",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("anchors")
    small, large = tiny_model(seed=1), tiny_model(large=True, seed=2)
    small.save_pretrained(folder / "small")
    large.save_pretrained(folder / "large")
    data = [{"input_ids": token_ids(4, 16, seed=seed)} for seed in range(4)]
    model = StitchedModel.from_anchors(small, large, (2, 3))
    delta = StitchedModel.from_anchors(folder / "small", folder / "large", (2, 3))
    for place in (folder, *folder.parents):
        if place.owner() and place != File("/"):
            place.chmod(place.stat().st_mode | 0o055)
    return {
        "model": model, "delta": delta, "scores": score_stitches(small, large, data, tokens=16),
        "probes": train_probes(small, data),
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("what", WRITES)
def test_a_read_only_folder_is_said_and_stays_as_it_is(what: str, made: dict[str, Any], tmp_path: File) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "README.md").write_text("mine")
    place.chmod(0o555)
    try:
        said = as_nobody(lambda: WRITES[what](made, place))
    finally:
        place.chmod(0o755)
    assert said.startswith(("PermissionError", "OSError")) and str(place) in said, said
    assert [file.name for file in place.rglob("*")] == ["README.md"]


# ---- tokens

SECRET = "hf_thisIsNobodysTokenButNobodyMaySeeIt"


def test_a_token_is_in_no_file_log_row_or_message(
    tmp_path: File, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    places = [tmp_path / "small", tmp_path / "large"]
    tiny_model(seed=1).save_pretrained(places[0])
    tiny_model(large=True, seed=2).save_pretrained(places[1])
    data = [{"input_ids": token_ids(4, 16, seed=seed)} for seed in range(4)]
    scores = score_stitches(*places, data, tokens=16, token=SECRET)
    scores.save(tmp_path / "scores.safetensors")
    scoring = FunctionalScoring(calibration=data[:2], temperature=1.0)
    search = SearchConfig(joints=1, buckets=3, kinds=("pruned",), scoring=scoring)
    search_paths(places, data, search, tokens=16, output=tmp_path / "search.jsonl", token=SECRET)
    model = StitchedModel.from_anchors(*places, (2, 3), calibration=data, token=SECRET)
    model.save_pretrained(tmp_path / "model")
    save_delta(model, tmp_path / "delta")
    StitchedModel.from_pretrained(tmp_path / "delta", token=SECRET).save_pretrained(tmp_path / "again")
    StitchedSupernet.from_anchors(places, [(2, 3)], token=SECRET).save_pretrained(tmp_path / "supernet")
    train_probes(places[0], data, token=SECRET).save_pretrained(tmp_path / "probes")
    rows = RowFile(tmp_path / "rows.jsonl", {})
    found = evaluate(model, [one | {"labels": one["input_ids"]} for one in data])
    rows.append(ResultRow("klas", (2, 3), 0, 10, 10, dict(found.metrics)))
    assert main(["card", str(tmp_path / "model"), "me/model"]) == 0
    for wrong in ("no/such-model", str(tmp_path / "nowhere")):
        with pytest.raises((OSError, ValueError)) as raised:
            StitchedModel.from_anchors(wrong, places[1], (2, 3), token=SECRET)
        assert SECRET not in "".join(traceback.format_exception_only(raised.value))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 15
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    seen = capfd.readouterr()
    assert SECRET not in caplog.text + seen.out + seen.err
