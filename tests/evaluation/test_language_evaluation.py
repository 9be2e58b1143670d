"""Evaluation: losses and generations equal transformers' own, rows are written once and taken up again."""

from pathlib import Path

import pytest
import torch
from tiny_models import PAD, left_padded, tiny_model, token_ids
from transformers import PreTrainedModel

from klas_hf import (
    Measurement,
    RowFile,
    Stitch,
    StitchedModel,
    evaluate_anchor,
    evaluate_loss,
    evaluate_stitches,
    generate_greedily,
    measure_costs,
)
from klas_hf.data.text import TextBatches


def test_loss_equals_transformers_over_any_batches() -> None:
    model = tiny_model()
    sequences = [token_ids(length, seed=length).tolist() for length in (5, 9, 3, 12, 7)]
    sums = [
        (model(torch.tensor([s]), labels=torch.tensor([s])).loss.item() * (len(s) - 1), len(s) - 1) for s in sequences
    ]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    for batch_size in (1, 2, 5):
        assert evaluate_loss(model, TextBatches(sequences, batch_size)) == pytest.approx(expected, rel=1e-5)


def test_loss_is_measured_without_dropout_and_the_mode_stays() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    batches = TextBatches([token_ids(9).tolist()])
    first, again = evaluate_loss(model, batches), evaluate_loss(model, batches)
    assert first == again
    assert model.training
    with pytest.raises(ValueError, match="no labels"):
        evaluate_loss(model, [])


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
    first = evaluate_stitches([Stitch(1, 2), Stitch(2, 2)], make, measure, rule="klas", rows=RowFile(path, run), seed=7)
    assert [row.metrics["depth"] for row in first] == [4.0, 5.0]
    assert first[0].details["note"] == "kept"
    assert 0 < first[0].details["stitch_fit"]["r2"] < 1
    cost = measure_costs(make(Stitch(1, 2)))
    assert (first[0].macs, first[0].parameters) == (cost.macs, cost.parameters)
    made.clear()
    again = RowFile(path, run)
    assert (
        evaluate_stitches([Stitch(1, 2)], make, measure, rule="klas", rows=again, seed=7)[0].metrics == first[0].metrics
    )
    other = evaluate_stitches([Stitch(2, 2), Stitch(1, 3)], make, measure, rule="esta", rows=again, seed=7)
    assert made == [Stitch(1, 3)]
    assert [(row.rule, row.stitch) for row in other] == [("esta", (2, 2)), ("esta", (1, 3))]
    evaluate_stitches([Stitch(2, 2)], make, measure, rule="esta", rows=again, seed=8)
    assert made[-1] == Stitch(2, 2)  # another seed is another model
    moved = Stitch(1, 2, source=0, target=2)  # and so is another pair of anchors
    elsewhere = evaluate_stitches([moved], lambda _: make(Stitch(1, 2)), measure, rule="klas", rows=again, seed=7)[0]
    assert made[-1] == Stitch(1, 2) and (elsewhere.stitch, elsewhere.anchors) == ((1, 2), (0, 2))
    assert again.find("klas", moved, 7) == elsewhere
    anchor = evaluate_anchor(source, measure, rule="source", rows=again)
    assert (anchor.stitch, anchor.parameters) == (None, source.num_parameters())
    assert len(RowFile(path, run)) == len(again) == 7
