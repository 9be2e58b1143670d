"""The score study of one small pair: every stitch at two lengths, scores after a few steps, stitches alone."""

from pathlib import Path

import pytest
import torch
from experiments.image_comparison import ComparisonSettings, ImageTask
from experiments.score_study import ImageScoreStudy, StudySettings
from test_image_report import images, vit

from klas_hf import Stitch, StitchedModel, TrainingConfig, score_stitches
from klas_hf.data.images import image_batches
from klas_hf.evaluation import evaluate_divergence
from klas_hf.scores.functional_settings import FunctionalScoring


def study(folder: Path) -> ImageScoreStudy:
    task = ImageTask(images(24, 1), images(24, 2), images(24, 3), (0.5,), (0.3,))
    return ImageScoreStudy(
        "vit", [vit(2, 8), vit(3, 16)], ["small", "large"], task,
        ComparisonSettings(batch_size=16, calibration_images=20, probe_epochs=2),
        TrainingConfig(trainable="full", gradient_accumulation_steps=1, per_device_batch_size=8, learning_rate=1e-2),
        StudySettings(lengths=(0, 2), adapted_steps=(1,), alone=2), folder,
    )  # fmt: skip


@pytest.mark.slow
def test_every_stitch_is_measured_at_every_length_and_alone_and_not_twice(tmp_path: Path) -> None:
    one = study(tmp_path)
    every = set(one.scores.stitches)
    for length in (0, 2):
        found = one.stitches(length)
        assert {entry.stitch for entry in found} == every
        assert {"klas", "functional", "cost", "functional, 1 steps"} <= found[0].values.keys()
    alone = one.alone_rows(2)
    assert len({row.stitch for row in alone}) == 2 and all(row.rule == "alone" for row in alone)
    written = (tmp_path / "2-steps" / "rows.jsonl").read_text()
    again = study(tmp_path)
    assert again.alone_rows(2) == alone
    assert again.rows(2) == one.rows(2)
    assert (tmp_path / "2-steps" / "rows.jsonl").read_text() == written


@pytest.mark.filterwarnings("ignore:.*do not determine")
def test_divergence_of_outputs_is_functional_kl_and_torchs() -> None:
    source, target = vit(2, 8), vit(3, 16)
    batches = list(image_batches(images(24, 1), 8, (0.5,), (0.3,)))
    stitched = StitchedModel.from_anchors(source, target, (1, 1), calibration=batches, ridge=1e-6)
    found = evaluate_divergence(stitched, target, batches)
    with torch.no_grad():
        p, q = (
            torch.distributions.Categorical(logits=torch.cat([model(b["pixel_values"]).logits for b in batches]))
            for model in (target, stitched)
        )
    assert found == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-4)
    scores = score_stitches(
        source, target, batches, score="functional", functional=FunctionalScoring(batches, [Stitch(1, 1)], 1.0)
    )
    assert scores.value_of(Stitch(1, 1)) == pytest.approx(found, rel=1e-4)
    with pytest.raises(ValueError, match="nothing to compare outputs on"):
        evaluate_divergence(stitched, target, [])


def test_missing_probes_are_found_before_any_work() -> None:
    def unread():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(ValueError, match="no probes"):
        score_stitches(vit(2, 8), vit(3, 16), unread(), score="klas", functional=FunctionalScoring())
