"""The card of a stitched segmentation model."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_dense import dense_images, tiny_dense, tiny_dense_pair

from klas_hf import StitchedModel, measure_costs
from klas_hf.hub import model_card


def test_the_card_of_a_dense_model(tmp_path: Path) -> None:
    model = StitchedModel.from_path(
        tiny_dense_pair("upernet"), "0[:2] 1[3:]", calibration=dense_images(1), image_size=64
    )
    card = model_card(model, "me/between", base_model=["org/small", "org/large"], licence="mit")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.pipeline_tag == "image-segmentation"
    assert data.base_model == ["org/small", "org/large"]
    assert "as the backbone of a `UperNetForSemanticSegmentation`: path `0[:2] 1[3:]`" in card.text
    assert f"{measure_costs(model).macs / 1e6:,.1f} million" in card.text
    code = card.text.split("```python")[1].split("```")[0]
    model.save_pretrained(tmp_path / "model")
    without = model_card(
        model, "me/between", base_model=["org/small", "org/large"], licence="mit", processor=False
    ).text.split("```python")[1].split("```")[0]  # fmt: skip
    exec(compile(without.replace("me/between", str(tmp_path / "model")), "card", "exec"), {})
    assert 'pipeline("image-segmentation", "me/between")' in code


def test_a_model_on_another_backbone_has_no_card_of_ours() -> None:
    with pytest.raises(TypeError, match="whose backbone is not stitched"):
        model_card(tiny_dense("upernet"), "me/whole", licence="mit")
