"""The benchmarks run, and the peers that stand beside us do what we do."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, token_ids
from transformers import LlamaForCausalLM

from benchmarks import divergences, full_size, merging, running, scoring, training
from benchmarks.__main__ import GROUPS, main, table_of
from benchmarks.measuring import Figure, in_child, in_turns
from benchmarks.models import classifier, halves, llama_configs, saved_llamas, vit
from benchmarks.options import Options
from klas_hf import FunctionalScoring, StitchedModel, StitchedSupernet, score_stitches

ROOT = Path(__file__).parents[2]
QUICK = Options(quick=True).settled()
pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random", "ignore:.*calibration rows")


# ---- the command


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words], capture_output=True, text=True, cwd=ROOT, timeout=500
    )


@pytest.mark.slow
def test_every_group_measures(tmp_path: Path) -> None:
    for group in GROUPS:
        done = command("--quick", "--only", group, "--output", str(tmp_path))
        assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["group"] for row in rows} == set(GROUPS) and len(rows) >= 28
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in rows)
    assert all({"torch", "transformers"} <= row["versions"].keys() and row["options"]["quick"] for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("Tiny sizes, to see that all runs: no result.") and table.count("\n|") == len(rows) + 2
    peers = (
        "F.kl_div",
        "from_pretrained of that size",
        "allocated, then filled",
        "the rears' forwards alone",
        "SN-Net",
    )
    assert all(
        peer in table for peer in (*peers, "ReplaceMe", "tuned lens", "a plain module", "transformers it registers")
    )


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path: Path) -> None:
    done = command("--quick", "--growth", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "growth.jsonl").read_text().splitlines()]
    assert [(row["what"], row["x"]) for row in rows] == [
        ("tokens", 64), ("tokens", 128), ("processes", 1), ("processes", 2),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["peak"] > 0 for row in rows)
    assert (tmp_path / "growth.png").stat().st_size > 10_000 and (tmp_path / "growth.svg").exists()


@pytest.mark.slow
def test_every_step_is_measured_at_full_size() -> None:
    sizes = ["--scale", "16", "--blocks", "4", "--vocabulary", "512", "--tokens", "16", "--sequences", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.full_size", *sizes], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [line[0].strip() for line in lines] == [told for told, _ in full_size.STEPS.values()]
    seconds, peak, weights, whole = zip(*([float(x.replace(",", "")) for x in line[1:]] for line in lines), strict=True)
    assert min(seconds) > 0 and all(a > b for a, b in zip(peak, weights, strict=True)) and min(whole) > max(weights)


def test_the_weights_at_full_size_are_those_of_the_models() -> None:
    sizes = Options(scale=16, blocks=4, vocabulary=512, dtype="bfloat16")
    small, large = (LlamaForCausalLM(config) for config in llama_configs(sizes, 1))
    stitched = StitchedModel.from_anchors(small, large, halves(small.config, large.config))
    expected = [small.num_parameters() + large.num_parameters(), stitched.num_parameters()]
    assert full_size.mebibytes(sizes) == tuple(count * 2 / 2**20 for count in expected)


def test_an_unknown_group_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "assembly", "speed"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "got --only speed; expected some of divergences, assembly" in capsys.readouterr().err


def test_the_table_has_the_last_of_each_and_marks_what_misses_its_aim(tmp_path: Path) -> None:
    less, more = Figure("a", 3.0, "b", 2.0, "s", 1.1), Figure("c", 2.0, "d", 50.0, "s", 20, larger=True)
    assert (less.ratio, more.ratio) == (1.5, 25.0)
    again = Figure("a", 2.0, "b", 2.0, "s", 1.1)
    lines = [json.dumps(vars(one) | {"group": "x", "ratio": one.ratio}) for one in (less, more)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    first = table_of(tmp_path / "rows.jsonl").splitlines()
    assert first[2].split("|")[5:7] == [" **1.500** ", " ≤ 1.1 "] and first[3].split("|")[5:7] == [
        " 25        ",
        " ≥ 20  ",
    ]
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(vars(again) | {"group": "x"}) + "\n")
    second = table_of(tmp_path / "rows.jsonl").splitlines()
    assert len(second) == 4 and " 1.000 " in second[2]


def test_calls_take_turns() -> None:
    seen: list[str] = []
    times = in_turns(2, lambda: seen.append("one"), lambda: seen.append("other"))
    assert seen == ["one", "other"] * 3 and len(times) == 2 and min(times) > 0


@pytest.mark.slow
def test_a_child_measures_its_own_memory_and_says_why_it_failed(tmp_path: Path) -> None:
    tiny_model(vocab_size=100_000, hidden_size=64).save_pretrained(tmp_path / "stitched")
    found = in_child(QUICK, "assembly:whole", str(tmp_path), "text")
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) / 2**20
    assert size < found["peak"] < 3 * size + 50 and found["read"] < 1.5 * size
    with pytest.raises(RuntimeError, match="assembly:whole ended with 1: .*nowhere"):
        in_child(QUICK, "assembly:whole", str(tmp_path / "nowhere"), "text")


# ---- the peers


def test_sn_nets_loop_runs_what_a_supernet_runs() -> None:
    anchors = [classifier(vit(QUICK, width=192)), classifier(vit(QUICK))]
    stitches = [(1, 1), (2, 2)]
    supernet, plain = StitchedSupernet.from_anchors(anchors, stitches), training.Stitched(anchors, stitches)
    pixels = training.Images(3, anchors[0].config.image_size).pixels
    with torch.no_grad():
        for number, stitch in enumerate(stitches):
            joint = supernet.extract(stitch).stitching_layers()[0]
            plain.layers[number].load_state_dict(joint.state_dict())
            torch.testing.assert_close(plain(pixels, number), supernet(pixels, path=stitch).logits)


def test_replace_mes_fit_is_ours() -> None:
    large = tiny_model(large=True, initializer_range=0.1)
    data = [{"input_ids": ids} for ids in token_ids(32, 120).split(8)]
    ours = StitchedModel.from_path([large], "0[:2] 0[4:]", joint="merged", calibration=data, ridge=0.0)
    scoring._replaced(large, data, 2, 4)
    assert len(large.model.layers) == 3
    ids = token_ids(2, 12, seed=9)
    large.config.num_hidden_layers = 3
    with torch.no_grad():
        close = (ours(ids).logits - large(ids, use_cache=False).logits).abs().max() / ours(ids).logits.abs().max()
    assert close < 0.03  # the first token of each sequence counts there, and not in ours


def test_blocks_left_out_plainly_are_ours(tmp_path: Path) -> None:
    with saved_llamas(QUICK) as folder:
        written: list = []

        def keep(make) -> dict[str, float]:
            written.append(make())
            return {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merging, "_written", keep)
            merging.pruned(QUICK, str(folder))
            merging.pruned_plainly(QUICK, str(folder))
            patch.setattr(merging, "loading", lambda make, _: keep(make))
            merging.supernet(QUICK, str(folder))
            merging.supernet_plainly(QUICK, str(folder))
    ids = token_ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(*(model(ids, use_cache=False).logits for model in written[:2]))
    ours, theirs = (net.anchors.state_dict() for net in written[2:])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_anchor_without_blocks_is_its_ends() -> None:
    model = tiny_model()
    depth, ids = len(model.model.layers), token_ids(1, 5)
    with torch.no_grad():
        found = running._without_blocks(model)(ids, use_cache=False).logits
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    torch.testing.assert_close(found, expected)
    assert len(model.model.layers) == depth == model.config.num_hidden_layers


def test_the_rears_are_the_targets_own_blocks() -> None:
    model, seen = tiny_model(large=True), []
    handles = [
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
        for number, layer in enumerate(model.model.layers)
    ]
    batches = [{"input_ids": token_ids(2, 6)}]
    taken = scoring._rears(model, [(1, 2), (2, 4)], batches, QUICK)
    assert seen == [2, 3, 4, 4] and taken > 0 and len(handles) == len(model.model.layers)
    assert scoring._rears(model, [(1, 2), (2, 2), (2, 4)], 2 * batches, QUICK, lambda run: 1.5) == 3 * 2 * 1.5


def test_pairs_are_those_that_are_scored() -> None:
    small, large = tiny_model(), tiny_model(large=True)
    data = [{"input_ids": token_ids(2, 6)}]
    scores = score_stitches(small, large, data, functional=FunctionalScoring(calibration=data))
    expected = [(stitch.source_stop, stitch.target_start) for stitch in scores.stitches]
    assert scoring._in_range(scores.costs) == expected


def test_operations_are_those_of_products_and_factorisations() -> None:
    x, y = torch.randn(7, 4), torch.randn(4, 5)
    assert scoring._gflop(lambda: x @ y) * 1e9 == pytest.approx(2 * 7 * 4 * 5)
    gram = x.T @ x
    solved = scoring._gflop(lambda: torch.cholesky_solve(y, torch.linalg.cholesky_ex(gram)[0])) * 1e9
    assert solved == pytest.approx(4**3 // 3 + 2 * 4 * 4 * 5)


@pytest.mark.parametrize("tokens", [5, 8])
def test_batches_hold_as_many_counted_tokens_as_asked_for(tokens: int) -> None:
    sizes = divergences.Sizes((1, 1), (8, 8), 50, tokens)
    batch = divergences.batch(sizes, divergences.thin_anchors(QUICK, sizes, (8, 8))[0])
    assert int(batch.counted.sum()) == tokens


def test_pairs_equal_the_loop_they_are_timed_against() -> None:
    ours, theirs = divergences.pairs(divergences.TINY, 1)  # it raises where they differ
    assert ours > 0 and theirs > 0
