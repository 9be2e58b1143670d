"""Result files: resumed, never mixed, never lost."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from klas_hf.paths import Stitch
from klas_hf.rows import ResultRow, RowFile, format_table, library_versions

RUN = {"source": "small", "target": "large", "seed": 3, "taus": (0.05, 0.1)}


def row(seed: int = 0, stitch: tuple[int, int] | None = (2, 3), rule: str = "klas") -> ResultRow:
    details = {"losses": [1.0, 0.5], "text": "Γ\u2028"}
    return ResultRow(rule, stitch, seed, 10 + seed, 20, {"rouge1": 0.25 + seed}, details)


def written(path: Path, count: int = 3) -> RowFile:
    file = RowFile(path, RUN)
    for seed in range(count):
        file.append(row(seed))
    return file


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.jsonl"
    written(path).append(row(stitch=None, rule="source"))
    again = RowFile(path, RUN)
    assert list(again) == [row(0), row(1), row(2), row(stitch=None, rule="source")]
    assert len(again) == 4


def test_a_resumed_run_appends_after_the_rows_it_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written(path)
    RowFile(path, RUN).append(row(7))
    assert [r.seed for r in RowFile(path, RUN)] == [0, 1, 2, 7]
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert ["run" in line for line in lines] == [True] + [False] * 4


def test_rows_are_found_by_rule_stitch_and_seed(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl")
    file.append(row(stitch=None, rule="target"))
    for found in (file, RowFile(file.path, RUN)):
        assert found.find("klas", Stitch(2, 3), 1) == row(1)
        assert found.find("target", None, 0) == row(stitch=None, rule="target")
        pair = Stitch(2, 3)
        for absent in (("klas", pair, 3), ("klas", Stitch(3, 2), 1), ("klas", None, 1), ("esta", pair, 1)):
            assert found.find(*absent) is None


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
    assert file.find("klas", Stitch(2, 3), 1) == row(1) and not file.path.exists()


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
    file = RowFile(path, RUN)
    assert list(file) == [row(0), row(1)]
    file.append(row(9))
    assert [r.seed for r in RowFile(path, RUN)] == [0, 1, 9]


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
    assert cells[0] == ["rule", "stitch", "M parameters", "M MACs", "of target", "rouge1"]
    assert set("".join(cells[1])) == {"-"}
    assert cells[2] == ["klas", "(2, 3)", "2.50", "1.0", "25%", "0.2500 ± 0.1500"]  # error: 0.2121 / √2
    assert cells[3] == ["target", "–", "8.00", "4.0", "100%", "0.5000"]
    assert len({len(line) for line in table}) == 1
    assert "of target" not in format_table(rows, ["rouge1"])


def test_rows_of_several_anchors_are_kept_apart(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", RUN)
    pairs = [dataclasses.replace(row(stitch=(2, 3)), macs=pair[1], anchors=pair) for pair in ((0, 1), (1, 2), (0, 2))]
    alone = [dataclasses.replace(row(stitch=None, rule="anchor"), anchors=(k, k)) for k in range(3)]
    for one in pairs + alone:
        file.append(one)
    for found in (file, RowFile(file.path, RUN)):
        assert list(found) == pairs + alone and len({one.key for one in found}) == 6
        assert found.find("klas", Stitch(2, 3), 0) == pairs[0]
        assert found.find("klas", Stitch(2, 3, 1, 2), 0) == pairs[1]
        assert found.find("klas", Stitch(2, 3, 2, 3), 0) is None
        assert found.find("anchor", None, 0, anchors=(2, 2)) == alone[2]
        assert found.find("anchor", None, 0) is None
    assert pairs[1].is_of(Stitch(2, 3, 1, 2))
    assert not any(pairs[1].is_of(other) for other in (Stitch(2, 3), Stitch(2, 3, 1, 3), Stitch(3, 2, 1, 2)))
    assert not alone[0].is_of(Stitch(2, 3))


def test_a_stitch_names_its_own_anchors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got anchors=\(0, 2\) and the stitch 1→2 \(2, 3\)"):
        RowFile(tmp_path / "rows.jsonl", RUN).find("klas", Stitch(2, 3, 1, 2), 0, anchors=(0, 2))


def test_files_written_before_there_were_several_anchors_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", 2).path
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for line in lines[1:]:
        assert line.pop("anchors") == [0, 1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(RowFile(path, RUN)) == [row(0), row(1)]


def test_the_table_shows_anchors_where_there_are_more_than_two() -> None:
    measured = ResultRow("klas", (2, 3), 0, 1_000_000, 2_500_000, {"rouge1": 0.1})
    other = dataclasses.replace(measured, anchors=(1, 2))
    alone = ResultRow("anchor", None, 0, 5_000_000, 2_500_000, {"rouge1": 0.3}, anchors=(2, 2))
    table = format_table([measured, other, alone], ["rouge1"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["rule", "anchors", "stitch", "M parameters", "M MACs", "rouge1"]
    assert [line[:3] for line in cells[2:]] == [
        ["klas", "0→1", "(2, 3)"],
        ["klas", "1→2", "(2, 3)"],
        ["anchor", "2", "–"],
    ]
    assert "anchors" not in format_table([measured], ["rouge1"])


def test_an_unknown_metric_is_named_beside_the_known() -> None:
    row = ResultRow("klas", (1, 1), 0, 1, 1, {"loss": 1.0, "accuracy": 0.5})
    assert row.value("loss") == 1.0
    for call in (lambda: row.value("bleu"), lambda: format_table([row], ["bleu"])):
        with pytest.raises(ValueError, match=r"without 'bleu'; it has \['accuracy', 'loss'\]"):
            call()
