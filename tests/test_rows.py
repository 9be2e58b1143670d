"""Result files: resumed, never mixed, never lost."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import klas_hf.rows
from klas_hf.paths import Path as ModelPath
from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow, RowFile, by_model, library_versions, read_rows, untuned_beside_tuned
from klas_hf.tables import format_mean, format_table, mean_and_error

RUN = {"source": "small", "target": "large", "seed": 3, "taus": (0.05, 0.1)}


def row(seed: int = 0, path: tuple[int, int] | str | None = (2, 3), rule: str = "klas") -> ResultRow:
    details = {"losses": [1.0, 0.5], "text": "Γ\u2028"}
    training = {"max_steps": 3, "betas": (0.9, 0.95)} if seed else None
    return ResultRow(
        rule, path, seed, 10, 20, {"rouge1": 0.25 + seed}, details, training, ["small@1", "large@2"], {"tokens": 8}
    )


def written(path: Path, count: int = 3) -> RowFile:
    file = RowFile(path, RUN)
    for seed in range(count):
        file.append(row(seed))
    return file


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.jsonl"
    written(path).append(row(path=None, rule="source"))
    again = RowFile(path, RUN)
    assert list(again) == [row(0), row(1), row(2), row(path=None, rule="source")]
    assert len(again) == 4


def test_a_resumed_run_appends_after_the_rows_it_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written(path)
    RowFile(path, RUN).append(row(7))
    assert [r.seed for r in RowFile(path, RUN)] == [0, 1, 2, 7]
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert ["run" in line for line in lines] == [True] + [False] * 4


def test_rows_are_found_by_all_that_they_depend_on(tmp_path: Path) -> None:
    """Another rule makes the same measurement; another path, seed, training, weights or setting does not."""
    file = written(tmp_path / "rows.jsonl")
    file.append(row(path=None, rule="target"))
    like = dataclasses.replace(row(1), macs=0, parameters=0, metrics={}, details={})
    for found in (file, RowFile(file.path, RUN)):
        assert found.find(like) == row(1)
        assert found.find(row(path=None, rule="target")) == row(path=None, rule="target")
        other_rule = dataclasses.replace(like, rule="esta")
        assert found.find(other_rule) is None and found.find(other_rule, any_rule=True) == row(1)
        for name, value in {
            "path": (3, 2), "seed": 3, "training": {"max_steps": 4}, "made_from": ["small@1", "large@3"],
            "setting": {"tokens": 9},
        }.items():  # fmt: skip
            assert found.find(dataclasses.replace(like, **{name: value}), any_rule=True) is None
    again = dataclasses.replace(row(1), rule="esta")
    file.append(again)
    assert file.find(again, any_rule=True) == again


def test_a_row_names_any_path() -> None:
    for given, text in (
        (Stitch(2, 3), "0[:2] 1[3:]"),
        ((2, 3), "0[:2] 1[3:]"),
        (Stitch(2, 3, 1, 2), "1[:2] 2[3:]"),
        (ModelPath.parse("1[:5] 1[7:9] 0[2:]"), "1[:5] 1[7:9] 0[2:]"),
        ("1[:]", "1[:]"),
        (None, None),
    ):
        assert dataclasses.replace(row(), path=given).path == text
    assert row().stitch == Stitch(2, 3) and row().joints == 1 and row().is_of((2, 3))
    three, anchor, unnamed = (row(path=path) for path in ("0[:1] 1[1:2] 0[2:]", "1[:]", None))
    assert (three.stitch, three.joints) == (None, 2) and three.is_of("0[:1] 1[1:2] 0[2:]")
    assert (anchor.stitch, anchor.joints, unnamed.stitch, unnamed.joints) == (None, 0, None, 0)
    with pytest.raises(ValueError, match="expected slices of anchors"):
        row(path="2 to 3")


def test_nothing_is_written_before_the_first_row(tmp_path: Path) -> None:
    assert len(RowFile(tmp_path / "folder" / "rows.jsonl", RUN)) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", RUN)
    for count in range(1, 4):
        file.append(row(count))
        assert len(RowFile(file.path, RUN)) == count == len(file)


def test_another_process_writes_what_this_one_only_keeps(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", RUN)
    file.append(row(1), to_disk=False)
    assert file.find(row(1)) == row(1) and not file.path.exists()


def test_the_first_line_says_with_what_it_was_made(tmp_path: Path) -> None:
    header = json.loads(written(tmp_path / "rows.jsonl").path.read_text().split("\n")[0])
    assert header["run"] == {**RUN, "taus": [0.05, 0.1]}
    assert header["versions"] == library_versions()
    assert library_versions()["torch"] == version("torch")


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({**RUN, "seed": 4}, "seed"),
        ({**RUN, "seed": 4, "source": "tiny"}, "seed, source"),
        ({**RUN, "extra": None}, ""),
        ({key: value for key, value in RUN.items() if key != "target"}, "target"),
    ],
)
def test_another_runs_rows_are_refused_and_left_alone(tmp_path: Path, now: dict, named: str) -> None:
    path = written(tmp_path / "rows.jsonl").path
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"rows of another run, which differs in {named}.*Name another output folder"):
        RowFile(path, now)
    assert path.read_bytes() == before


def test_the_error_shows_both_values(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl").path
    with pytest.raises(ValueError, match=r"there: \{'seed': 3\}; now: \{'seed': 4\}"):
        RowFile(path, {**RUN, "seed": 4})


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_last_line_cut_short_is_dropped_and_the_file_usable(tmp_path: Path, kept: float) -> None:
    path = written(tmp_path / "rows.jsonl").path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: max(1, int(kept * len(lines[-1])))])
    before = path.read_bytes()
    file = RowFile(path, RUN)
    assert list(file) == [row(0), row(1)] == read_rows(path)
    assert path.read_bytes() == before  # reading changes nothing
    file.append(row(9))
    file.append(row(8))
    assert [r.seed for r in RowFile(path, RUN)] == [0, 1, 9, 8]


def test_only_the_process_that_writes_cuts_a_line_and_never_a_whole_one(tmp_path: Path) -> None:
    """Two processes open a file whose last line was cut short; one writes rows, before and after the other opens it."""
    path = written(tmp_path / "rows.jsonl").path
    path.write_bytes(path.read_bytes()[:-5])
    writing, early = RowFile(path, RUN), RowFile(path, RUN)
    writing.append(row(5))
    for other in (early, RowFile(path, RUN)):
        other.append(row(6), to_disk=False)
    writing.append(row(6))
    assert [r.seed for r in read_rows(path)] == [0, 1, 5, 6]
    early.append(row(7))  # whatever was written since it was opened stays
    assert [r.seed for r in read_rows(path)] == [0, 1, 5, 6, 7]


def test_any_runs_rows_can_be_read_from_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl").path
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert read_rows(str(path)) == [row(0), row(1), row(2)]
    finally:
        tmp_path.chmod(0o755)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "nothing.jsonl")
    RowFile(tmp_path / "new.jsonl", RUN)
    (tmp_path / "empty.jsonl").write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="without a row; expected at least one"):
        read_rows(tmp_path / "empty.jsonl")


def test_rows_of_other_library_versions_are_not_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "rows.jsonl").path
    now = library_versions() | {"torch": "0.1"}
    monkeypatch.setattr(klas_hf.rows, "library_versions", lambda: now)
    with pytest.raises(ValueError, match=r"differs in torch .*now: \{'torch': '0.1'\}"):
        RowFile(path, RUN)
    assert len(read_rows(path)) == 3


def test_a_header_without_rows_is_resumed(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", 1).path
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + b'{"rule": "kl')
    RowFile(path, RUN).append(row(5))
    assert [r.seed for r in RowFile(path, RUN)] == [5]


def test_an_empty_file_is_started(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    RowFile(path, RUN).append(row(1))
    assert list(RowFile(path, RUN)) == [row(1)]


@pytest.mark.parametrize(
    "content",
    [
        b"someone's notes, without a line's end",
        b"notes\nof two lines\n",
        b'{"question": "no header"}\n{"question": "at all"}\n',
        b"[1, 2]\n",
        b'{"run": 3}\n',
        b"\x80\x02binary\xff\n",
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows.jsonl, wh(ose first line has no run settings|ich is not JSONL).*Name"):
        RowFile(path, RUN)
    assert path.read_bytes() == content


def test_a_row_that_is_no_json_harms_nothing(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", RUN)
    with pytest.raises(TypeError):
        file.append(ResultRow("klas", (1, 2), 0, 1, 1, {"rouge1": 1j}))  # type: ignore[dict-item]
    file.append(row(1))
    assert list(file) == list(RowFile(file.path, RUN)) == [row(1)]


def test_rows_are_shown_as_a_table_cheapest_first_with_seeds_together() -> None:
    rows = [
        ResultRow("target", None, 0, 4_000_000, 8_000_000, {"rouge1": 0.5, "hidden": 1.0}),
        ResultRow("klas", (2, 3), 0, 1_000_000, 2_500_000, {"rouge1": 0.1, "hidden": 1.0}),
        ResultRow("klas", (2, 3), 1, 1_000_000, 2_500_000, {"rouge1": 0.4, "hidden": 1.0}),
    ]
    table = format_table(rows, ["rouge1"], total_macs=4_000_000).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["rule", "path", "M parameters", "M MACs", "of target", "rouge1"]
    assert set("".join(cells[1])) == {"-"}
    assert cells[2] == ["klas", "0[:2] 1[3:]", "2.50", "1.0", "25%", "0.2500 ± 0.1500"]  # error: 0.2121 / √2
    assert cells[3] == ["target", "–", "8.00", "4.0", "100%", "0.5000"]
    assert len({len(line) for line in table}) == 1
    assert "of target" not in format_table(rows, ["rouge1"])


def test_rows_of_several_anchors_are_kept_apart(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", RUN)
    stitches = [dataclasses.replace(row(), path=Stitch(2, 3, *pair)) for pair in ((0, 1), (1, 2), (0, 2))]
    alone = [row(path=f"{k}[:]", rule="anchor") for k in range(3)]
    for one in stitches + alone:
        file.append(one)
    for found in (file, RowFile(file.path, RUN)):
        assert list(found) == stitches + alone and [found.find(one) for one in found] == list(found)
        assert found.find(dataclasses.replace(row(), path=Stitch(2, 3, 2, 3))) is None
    assert stitches[1].is_of(Stitch(2, 3, 1, 2))
    assert not any(stitches[1].is_of(other) for other in (Stitch(2, 3), Stitch(2, 3, 1, 3), Stitch(3, 2, 1, 2)))


def test_files_of_other_lines_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl").path
    path.write_text(path.read_text().replace('"path"', '"stitch"'))
    with pytest.raises(ValueError, match="with a line that is no row: .*Measure again into another file"):
        RowFile(path, RUN)


def test_untuned_anchors_beside_tuned_models_are_marked() -> None:
    ends = [ResultRow(f"anchor {k}", f"{k}[:]", 0, 1 + 8 * k, 1, {"loss": 1.0}) for k in (0, 1)]
    start = ResultRow("start", (2, 3), 0, 5, 1, {"loss": 2.0})
    tuned = dataclasses.replace(start, rule="klas", training={"max_steps": 10})
    assert untuned_beside_tuned([*ends, start]) == [] == untuned_beside_tuned([tuned])
    assert untuned_beside_tuned([*ends, start, tuned]) == ends
    first_cells = [line.split("|")[1].strip() for line in format_table([*ends, start, tuned], ["loss"]).splitlines()]
    assert first_cells[2:] == [
        "anchor 0 (not tuned)", "klas", "start (not tuned)", "anchor 1 (not tuned)"
    ]  # fmt: skip
    alike = [dataclasses.replace(one, training={"max_steps": 10}) for one in ends]
    assert "not tuned" not in format_table([*alike, tuned], ["loss"]) + format_table([*ends, start], ["loss"])


def test_rows_of_one_model_are_those_of_its_seeds() -> None:
    seeds = [ResultRow("klas", (2, 3), seed, 5, 1, {"q": seed}, training={"steps": 4, "seed": seed}) for seed in (0, 1)]
    shared = dataclasses.replace(seeds[0], rule="esta")
    longer = dataclasses.replace(seeds[0], training={"steps": 8, "seed": 0})
    other = dataclasses.replace(seeds[0], path="1[:1] 1[2:]")
    assert by_model([seeds[0], other, shared, longer, seeds[1]]) == [[shared, seeds[1]], [other], [longer]]
    again = [dataclasses.replace(one, made_from=["another"]) for one in seeds]  # the same of other weights
    assert by_model([*seeds, *again]) == [seeds, again]
    assert format_table([*seeds, *again], ["q"]).count("0.5000 ± 0.5000") == 2


def test_means_have_the_standard_error_of_scipy() -> None:
    values = [0.5, 0.25, 1.5, 0.125]
    assert mean_and_error(values) == pytest.approx((np.mean(values), stats.sem(values)))
    assert format_mean(values[:2]) == "0.3750 ± 0.1250"
    assert format_mean([0.5]) == "0.5000" and np.isnan(mean_and_error([0.5])[1])


def test_an_unknown_metric_is_named_beside_the_known() -> None:
    row = ResultRow("klas", (1, 1), 0, 1, 1, {"loss": 1.0, "accuracy": 0.5})
    assert row.value("loss") == 1.0
    for call in (lambda: row.value("bleu"), lambda: format_table([row], ["bleu"])):
        with pytest.raises(ValueError, match=r"without 'bleu'; it has \['accuracy', 'loss'\]"):
            call()
