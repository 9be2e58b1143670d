"""Evaluation: losses and generations equal transformers' own, rows are written once and taken up again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import PAD, left_padded, tiny_model, token_ids
from transformers import PreTrainedModel

from klas_hf import (
    Measurement,
    ResultRow,
    RowFile,
    Stitch,
    StitchedModel,
    evaluate,
    evaluate_anchor,
    evaluate_stitches,
    generate_greedily,
    measure_costs,
)
from klas_hf.anchors.weights import fingerprint
from klas_hf.data.text import TextBatches


def test_loss_equals_transformers_over_any_batches() -> None:
    model = tiny_model()
    sequences = [token_ids(length, seed=length).tolist() for length in (5, 9, 3, 12, 7)]
    means = [model(torch.tensor([s]), labels=torch.tensor([s])).loss.item() for s in sequences]
    counts = np.array([len(s) - 1 for s in sequences])
    losses = np.array(means) * counts
    expected = losses.sum() / counts.sum()
    # Cochran, Sampling Techniques, Eq. 6.13: the error of a ratio of sums over clusters.
    error = np.sqrt(5 / 4 * ((losses - expected * counts) ** 2).sum()) / counts.sum()
    for batch_size in (1, 2, 5):
        measured = evaluate(model, TextBatches(sequences, batch_size))
        perplexity = np.exp(expected)
        assert measured.metrics == pytest.approx({"loss": expected, "perplexity": perplexity}, rel=1e-5)
        assert measured.details["labels"] == counts.sum()
        errors = {"loss": error, "perplexity": error * perplexity}
        assert measured.details["standard_errors"] == pytest.approx(errors, rel=1e-3)


def test_text_without_labels_or_with_others_than_the_models_is_refused() -> None:
    model, ids = tiny_model(), token_ids(1, 6)
    for bare in (ids, {"input_ids": ids}):
        with pytest.raises(ValueError, match="got a batch of text without 'labels'"):
            evaluate(model, [bare])
    vocabulary = model.config.vocab_size
    labels = torch.tensor([[1, 2, -100, 3, vocabulary, 4]])
    with pytest.raises(ValueError, match=f"got the label {vocabulary} for a model of {vocabulary} classes; expected 0"):
        evaluate(model, [{"input_ids": ids, "labels": labels}])
    with pytest.raises(TypeError, match="got labels of torch.float32; expected whole numbers"):
        evaluate(model, [{"input_ids": ids, "labels": ids.float()}])
    with pytest.raises(ValueError, match="got classes for a language model; leave them out"):
        evaluate(model, [{"input_ids": ids, "labels": ids}], classes=[1])


def test_loss_is_measured_without_dropout_and_the_mode_stays() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    batches = TextBatches([token_ids(9).tolist()])
    first, again = evaluate(model, batches), evaluate(model, batches)
    assert first == again
    assert model.training
    with pytest.raises(ValueError, match="no labels"):
        evaluate(model, [])


def test_generations_equal_those_of_single_prompts() -> None:
    model = tiny_model(seed=3)
    prompts = [token_ids(length, seed=length).tolist() for length in (2, 7, 4, 9, 3)]
    expected = [
        model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=6, pad_token_id=PAD)[0, len(p) :].tolist()
        for p in prompts
    ]
    found = generate_greedily(model, prompts, max_new_tokens=6, batch_size=2)
    assert [answer[: len(other)] for answer, other in zip(found, expected, strict=True)] == expected
    # The reference for padding itself: a hand-padded batch.
    batch = left_padded(token_ids(2, 9), [9, 4])
    whole = model.generate(**batch, do_sample=False, max_new_tokens=6, pad_token_id=PAD)[:, 9:].tolist()
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert generate_greedily(model, rows, max_new_tokens=6) == whole


def test_rows_are_measured_once_and_shared_between_rules(tmp_path: Path) -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    made: list[Stitch] = []

    def make(stitch: Stitch) -> PreTrainedModel:
        made.append(stitch)
        return StitchedModel.from_anchors(source, target, stitch, calibration=[{"input_ids": token_ids(4, 30)}])

    def measure(model: PreTrainedModel) -> Measurement:
        return Measurement({"depth": float(model.config.num_hidden_layers)}, {"note": "kept"})

    run, path = {"experiment": 1}, tmp_path / "rows.jsonl"
    given: dict = {"anchors": [fingerprint(source), fingerprint(target)], "training": None, "seed": 7}
    first = evaluate_stitches([Stitch(1, 2), (2, 2)], make, measure, rule="klas", rows=RowFile(path, run), **given)
    assert [row.metrics["depth"] for row in first] == [4.0, 5.0]
    assert first[0].details["note"] == "kept"
    assert 0 < first[0].details["joint_fits"][0]["r2"] < 1
    cost = measure_costs(make(Stitch(1, 2)))
    assert (first[0].macs, first[0].parameters) == (cost.macs, cost.parameters)
    made.clear()
    again = RowFile(path, run)
    repeated = evaluate_stitches([Stitch(1, 2)], make, measure, rule="klas", rows=again, **given)
    assert repeated[0].metrics == first[0].metrics
    other = evaluate_stitches([Stitch(2, 2), Stitch(1, 3)], make, measure, rule="esta", rows=again, **given)
    assert made == [Stitch(1, 3)]
    assert [(row.rule, row.path) for row in other] == [("esta", "0[:2] 1[2:]"), ("esta", "0[:1] 1[3:]")]
    moved = Stitch(1, 2, source=0, target=2)  # another pair of anchors
    elsewhere = evaluate_stitches([moved], lambda _: make(Stitch(1, 2)), measure, rule="klas", rows=again, **given)[0]
    assert made[-1] == Stitch(1, 2) and elsewhere.path == "0[:1] 2[2:]" and again.find(elsewhere) == elsewhere
    assert len(RowFile(path, run)) == len(again) == 5


def test_a_row_of_anything_else_is_not_taken_for_it(tmp_path: Path) -> None:
    """Other training, weights, seed, length or setting: measured anew, under whatever rule."""
    made: list[str] = []

    def make(path: str) -> PreTrainedModel:
        made.append(path)
        return tiny_model(large=True)

    def measure(model: PreTrainedModel) -> Measurement:
        return Measurement({"turn": float(len(made))})

    rows = RowFile(tmp_path / "rows.jsonl", {})
    plain: dict = {"anchors": ["a", "b"], "training": {"max_steps": 120}, "seed": 0, "tokens": 16}
    settings: list[dict] = [plain | one for one in (
        {}, {"training": {"max_steps": 1000}}, {"training": None}, {"anchors": ["a", "c"]}, {"seed": 1}, {"tokens": 32},
        {"setting": {"joint": "identity"}}, {"setting": {"joint": "cosine"}},
    )]  # fmt: skip
    for rule in ("klas", "esta"):
        for one in settings:
            evaluate_stitches(["0[:1] 1[1:2] 0[2:]"], make, measure, rule=rule, rows=rows, **one)
    assert made == ["0[:1] 1[1:2] 0[2:]"] * 8
    turns = [row.metrics["turn"] for row in RowFile(tmp_path / "rows.jsonl", {})]
    assert turns == [1, 2, 3, 4, 5, 6, 7, 8] * 2
    assert [row.training for row in rows][:3] == [{"max_steps": 120}, {"max_steps": 1000}, None]


def test_an_anchors_row_is_that_of_its_weights(tmp_path: Path) -> None:
    source, turns = tiny_model(seed=1), iter(range(9))
    rows = RowFile(tmp_path / "rows.jsonl", {})

    def measured(**options: Any) -> ResultRow:
        return evaluate_anchor(
            source, lambda _: Measurement({"turn": next(turns)}), rule="source", rows=rows, position=0, **options
        )

    first = measured()
    assert (first.path, first.training, first.parameters) == ("0[:]", None, source.num_parameters())
    assert measured() == first and measured(tokens=9).metrics["turn"] == 1
    with torch.no_grad():
        source.lm_head.weight.mul_(2)
    tuned = measured(training={"max_steps": 3})
    assert (tuned.metrics["turn"], tuned.training) == (2, {"max_steps": 3}) and tuned.made_from != first.made_from
    assert len(RowFile(rows.path, {})) == 3
