"""Files of every kind that are damaged or hostile: whatever stands in them, what a reader raises is for the user."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any

import pytest
from failing_disk import full_disk
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_model, token_ids

from klas_hf import (
    FunctionalScoring,
    Path,
    ProbeNet,
    ResultRow,
    RowFile,
    SearchConfig,
    StitchedModel,
    StitchedSupernet,
    StitchScores,
    TrainingConfig,
    format_table,
    save_delta,
    score_stitches,
    search_paths,
    train_probes,
    train_stitches,
)
from klas_hf.anchors.language import load_anchor
from klas_hf.cli import main
from klas_hf.data.image_data import class_labels
from klas_hf.data.truthfulqa import load_truthfulqa
from klas_hf.options import read_settings
from klas_hf.rows import read_rows
from klas_hf.scores.path_scores import PathScores

pytestmark = pytest.mark.filterwarnings("ignore")
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    3.5,
    math.inf,
    math.nan,
    "",
    "x",
    "../../x",
    [],
    {},
    [1],
    {"a": 1},
    10**30,
    [[0, 0, 1]],
]
SHARED = dict(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)


DATA = [{"input_ids": token_ids(4, 16, seed=seed)} for seed in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> File:
    """One good file or folder of each kind."""
    root = tmp_path_factory.mktemp("good")
    small, large = tiny_model(seed=1), tiny_model(large=True, seed=2)
    small.save_pretrained(root / "small")
    large.save_pretrained(root / "large")
    model = StitchedModel.from_anchors(root / "small", root / "large", (2, 3))
    model.save_pretrained(root / "whole")
    save_delta(model, root / "delta")
    StitchedSupernet.from_anchors([small, large], [(1, 1), (2, 3)]).save_pretrained(root / "supernet")
    data = DATA
    train_probes(small, data).save_pretrained(root / "probes")
    score_stitches(small, large, data, tokens=16).save(root / "scores.safetensors")
    scoring = FunctionalScoring(calibration=data[:2], temperature=1.0)
    config = SearchConfig(joints=1, buckets=3, kinds=("pruned",), scoring=scoring)
    search_paths([small, large], data, config, tokens=16).save(root / "paths.safetensors")
    rows = RowFile(root / "rows.jsonl", {"data": "x"})
    for seed in range(3):
        rows.append(ResultRow("klas", (1, 2), seed, 10, 20, {"loss": 1.0 + seed}))
    (root / "settings.yaml").write_text(
        "trainable: full\nmax_steps: 3\nlearning_rate: 1e-3\naugmentation: {mixup: 0.8}\n"
    )
    (root / "labels.yaml").write_text("cat: 1\ndog: bee\n")
    (root / "questions.csv").write_text(
        'Question,Best Answer,Correct Answers,Incorrect Answers,Category\nWhat?,A,"A; B","C; D",x\nWho?,E,E,G,y\n'
    )
    return root


def for_the_user(read: Callable[[], Any], *named: str) -> None:
    """It works, or raises what a user understands; of files, it names one of these."""
    try:
        read()
    except (ValueError, OSError) as error:
        bare = type(error) in (json.JSONDecodeError, UnicodeDecodeError)
        assert not bare and len(str(error)) > 20 and (not named or any(name in str(error) for name in named)), error


@contextmanager
def in_place(file: File, content: bytes) -> Iterator[None]:
    kept = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(kept)


# ---- bytes

FILES: dict[str, Callable[[File], Any]] = {
    "scores.safetensors": StitchScores.load,
    "paths.safetensors": PathScores.load,
    "rows.jsonl": lambda file: format_table(read_rows(file), ["loss"]),
    "labels.yaml": lambda file: class_labels(("cat", "dog"), {0: "ant", 1: "bee"}, file),
    "settings.yaml": lambda file: _settings(file),
    "questions.csv": load_truthfulqa,
    "whole/model.safetensors": lambda file: StitchedModel.from_pretrained(file.parent),
    "whole/config.json": lambda file: StitchedModel.from_pretrained(file.parent),
    "delta/delta.safetensors": lambda file: StitchedModel.from_pretrained(file.parent),
    "supernet/model.safetensors": lambda file: StitchedSupernet.from_pretrained(file.parent),
    "probes/model.safetensors": lambda file: ProbeNet.from_pretrained(file.parent),
    "large/model.safetensors": lambda file: StitchedModel.from_anchors(tiny_model(), file.parent, (2, 3)),
}


def _settings(file: File) -> Any:
    import argparse

    try:
        return read_settings(file, [TrainingConfig])
    except argparse.ArgumentError as error:  # what a command line says with usage
        raise ValueError(f"{file}: {error}") from error


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=12, **SHARED)
@given(data=st.data())
def test_damaged_bytes(name: str, folder: File, data: st.DataObject) -> None:
    """Cut short, or with some bytes of the first kilobyte, where headers are, changed."""
    file = folder / name
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, min(len(content), 1000) - 1))] = data.draw(st.integers(0, 255))
    with in_place(file, bytes(content)):
        for_the_user(lambda: FILES[name](file), str(file), file.name, str(file.parent))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".safetensors")])
@pytest.mark.parametrize("claimed", [2**63, 2**40, 10**9])
def test_oversized_headers_are_refused_before_they_are_read(name: str, claimed: int, folder: File) -> None:
    file = folder / name
    huge = struct.pack("<Q", claimed) + file.read_bytes()[8:]
    with in_place(file, huge), pytest.raises((ValueError, OSError), match="damaged") as raised:
        FILES[name](file)
    assert file.name in str(raised.value)


# ---- values


@st.composite
def other_values(draw: st.DrawFn, value: Any) -> Any:
    """The same JSON with one value removed, or changed for something else."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        for key, inner in one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ():
            places.append((one, key))
            walk(inner)

    walk(value)
    holder, key = places[draw(st.integers(0, len(places) - 1))]
    if draw(st.integers(0, 3)):
        holder[key] = draw(st.sampled_from(JUNK))
    else:
        del holder[key]
    return value


LOADERS: dict[str, Callable[[File], Any]] = {
    "whole": StitchedModel.from_pretrained,
    "delta": StitchedModel.from_pretrained,
    "supernet": StitchedSupernet.from_pretrained,
    "probes": ProbeNet.from_pretrained,
    "large": lambda place: StitchedModel.from_anchors(tiny_model(), place, (2, 3)),
}


def _configuration(kind: str, folder: File, data: st.DataObject) -> None:
    file = folder / kind / "config.json"
    changed = data.draw(other_values(json.loads(file.read_text())))
    with in_place(file, json.dumps(changed).encode()):
        for_the_user(lambda: LOADERS[kind](file.parent))


@settings(max_examples=15, **SHARED)
@given(data=st.data())
def test_other_configurations(folder: File, data: st.DataObject) -> None:
    _configuration("whole", folder, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
@settings(max_examples=80, **SHARED)
@given(data=st.data())
def test_other_configurations_of_every_kind(kind: str, folder: File, data: st.DataObject) -> None:
    _configuration(kind, folder, data)


@pytest.mark.parametrize(("name", "key"), [("scores", "klas_hf"), ("paths", "klas_hf_paths")])
@settings(max_examples=40, **SHARED)
@given(data=st.data())
def test_other_values_in_score_files(name: str, key: str, folder: File, data: st.DataObject) -> None:
    file, other = folder / f"{name}.safetensors", folder / "other.safetensors"
    with safe_open(file, "np") as opened:
        plain = json.loads(opened.metadata()[key])
    arrays = load_file(file)
    if data.draw(st.booleans()):
        del arrays[data.draw(st.sampled_from(sorted(arrays)))]
    save_file(arrays, other, {key: json.dumps(data.draw(other_values(plain)))})
    for_the_user(lambda: FILES[f"{name}.safetensors"](other), str(other))


@settings(max_examples=60, **SHARED)
@given(data=st.data())
def test_other_values_in_rows(folder: File, data: st.DataObject) -> None:
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in data.draw(other_values(lines))))
    for_the_user(lambda: FILES["rows.jsonl"](other), str(other), "metric", "a row without")


@given(text=st.text(alphabet="0123[]: \n-9x٣²", max_size=20))
@example("1[:" + "9" * 5000 + "] 1[2:]")
def test_any_text_is_a_path_or_refused(text: str) -> None:
    try:
        path = Path.parse(text)
    except ValueError as error:
        assert "expected" in str(error) or "limit" in str(error)
    else:
        assert Path.parse(str(path)) == path


# ---- anchors


def test_shards_that_changed_places_are_named(tmp_path: File) -> None:
    tiny_model(large=True).save_pretrained(tmp_path, max_shard_size="10KB")
    whole = StitchedModel.from_anchors(tiny_model(), tmp_path, (2, 3)).state_dict()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    one = tmp_path / index["model.layers.4.mlp.down_proj.weight"]
    other = next(file for file in sorted(tmp_path.glob("*.safetensors")) if file != one)
    one.rename(tmp_path / "kept"), other.rename(one), (tmp_path / "kept").rename(other)
    with pytest.raises(OSError, match=rf"{one.name} without model\.layers\.4.*which model.safetensors.index.json says"):
        StitchedModel.from_anchors(tiny_model(), tmp_path, (2, 3))
    again = load_anchor(tmp_path).model.state_dict()  # transformers reads all files, whatever the index says
    assert all(
        (again[name.replace("slices.1.layers.1", "layers.4")] == tensor).all()
        for name, tensor in whole.items()
        if "slices.1.layers.1" in name
    )


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_tensors_of_an_anchor_are_not_made_up(damage: str, tmp_path: File) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tiny_model(large=True).save_pretrained(tmp_path)
    name = "model.layers.4.mlp.down_proj.weight"
    tensors = load_torch(tmp_path / "model.safetensors")
    tensors[name] = tensors[name][:, :-2].contiguous()
    if damage == "missing":
        del tensors[name]
    save_torch(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    problem = "are missing from it" if damage == "missing" else "have other shapes than config.json says"
    with pytest.raises(OSError, match=f"1 tensors {problem} .*layers.4.mlp.down_proj.weight"):
        load_anchor(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit.*layers\.1\.mlp\.down_proj\.weight"):
        StitchedModel.from_anchors(tiny_model(), tmp_path, (2, 3))


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors"])
def test_names_outside_the_folder_are_refused(outside: str, tmp_path: File) -> None:
    good = tmp_path / "model"
    for kind in ("anchor", "stitched"):
        model = (
            tiny_model(large=True)
            if kind == "anchor"
            else StitchedModel.from_anchors(tiny_model(), tiny_model(large=True), (2, 3))
        )
        model.save_pretrained(good / kind, max_shard_size="10KB")
        index = good / kind / "model.safetensors.index.json"
        written = json.loads(index.read_text())
        written["weight_map"] = dict.fromkeys(written["weight_map"], outside)
        index.write_text(json.dumps(written))
    refused = rf"got the checkpoint .*which names the file '{outside}'; expected names of files inside"
    with pytest.raises(OSError, match=refused):
        StitchedModel.from_anchors(tiny_model(), good / "anchor", (2, 3))
    with pytest.raises(OSError, match=refused):
        StitchedModel.from_pretrained(good / "stitched")


# ---- the command line


@pytest.mark.parametrize(
    ("words", "damaged"),
    [
        (["select", "scores.safetensors"], "scores.safetensors"),
        (["plot", "rows.jsonl", "--output", "curve"], "rows.jsonl"),
        (["evaluate", "whole", "--data", "text.txt", "--rows", "out"], "whole/model.safetensors"),
        (
            ["stitch", "small", "large", "--stitch", "2", "3", "--data", "text.txt", "--output", "out"],
            "large/config.json",
        ),
        (["card", "whole", "me/model"], "whole/config.json"),
    ],
)
def test_a_command_says_it_in_one_message(
    words: list[str], damaged: str, folder: File, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text("a cat sat. " * 50)
    with in_place(
        folder / damaged, b'{"model_type": "stitched", "slices": 7}' if "config" in damaged else b"\0\xff junk"
    ):
        assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("klas-hf: error:") == 1 and "Traceback" not in error
    assert not (folder / "out").exists()


# ---- what is written


def test_rows_survive_a_full_disk(tmp_path: File) -> None:
    file = RowFile(tmp_path / "rows.jsonl", {})
    written = []
    with full_disk(2000), pytest.raises(OSError, match="(?i)too large"):
        for seed in range(100):
            row = ResultRow("klas", (1, 2), seed, 10, 20, {"loss": 1.0})
            file.append(row)
            written.append(row)
    assert 3 < len(written) < 20
    again = RowFile(tmp_path / "rows.jsonl", {})
    assert again.rows == written
    again.append(ResultRow("klas", (1, 2), 100, 10, 20, {"loss": 1.0}))
    assert len(read_rows(tmp_path / "rows.jsonl")) == len(written) + 1


@pytest.mark.parametrize("kind", ["scores", "paths", "probes"])
def test_what_was_measured_survives_a_full_disk_when_it_is_saved_again(kind: str, folder: File, tmp_path: File) -> None:
    """Of another size, as of other anchors: nothing of it may stay."""
    files = {"scores": "scores.safetensors", "paths": "paths.safetensors"}
    place = tmp_path / files.get(kind, "probes")
    if kind == "probes":
        ProbeNet.from_pretrained(folder / "probes").save_pretrained(place)
        limit, save = 6_000, train_probes(tiny_model(large=True, seed=5), DATA).save_pretrained
        kept = {file.name: file.read_bytes() for file in place.iterdir()}
    else:
        place.write_bytes((folder / files[kind]).read_bytes())
        loaded = (StitchScores if kind == "scores" else PathScores).load(place)
        limit, save, kept = place.stat().st_size // 2, loaded.save, {place.name: place.read_bytes()}
    with full_disk(limit), pytest.raises(Exception, match="(?i)too large|os error 27"):
        save(place)
    assert {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == kept


def training(**changes: Any) -> TrainingConfig:
    told: dict[str, Any] = {"trainable": "full", "max_steps": 4, "per_device_batch_size": 4, "save_steps": 1}
    return TrainingConfig(**told | {"gradient_accumulation_steps": 1, "learning_rate": 1e-2} | changes)


def test_training_goes_on_after_a_full_disk_and_refuses_a_damaged_checkpoint(tmp_path: File) -> None:
    examples = [{"input_ids": one, "labels": one} for one in token_ids(16, 10).tolist()]
    whole, model = tiny_model(), tiny_model()
    train_stitches(whole, examples, training())
    with full_disk(20_000), pytest.raises(Exception, match="(?i)too large|os error 27"):
        train_stitches(model, examples, training(), output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    train_stitches(model := tiny_model(), examples, training(), output_dir=tmp_path / "out")
    assert all((one == other).all() for one, other in zip(whole.parameters(), model.parameters(), strict=True))
    (newest,) = (tmp_path / "out").glob("checkpoint-*")
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        cut, said = (newest / name).read_bytes()[:-40], "damaged or something else.*remove its folder to begin anew"
        with in_place(newest / name, cut), pytest.raises(ValueError, match=f"checkpoint-.*{said}"):
            train_stitches(tiny_model(), examples, training(), output_dir=tmp_path / "out")
