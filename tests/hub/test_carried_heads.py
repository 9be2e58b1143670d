"""Checkpoints of KAN heads and of dense models carry their code: they load where klas_hf is not installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uninstalled
from kan_examples import tiny_kan
from PIL import Image
from tiny_dense import SIZE, outputs, tiny_dense_pair
from tiny_vision import tiny_classifier, tiny_pair
from transformers import (
    AutoModelForImageClassification,
    AutoModelForUniversalSegmentation,
    DetrForObjectDetection,
    Mask2FormerImageProcessorPil,
    PreTrainedModel,
    RTDetrForObjectDetection,
)
from transformers.dynamic_module_utils import get_imports

from klas_hf import KANForImageClassification, KANForManyTasks, StitchedModel, compress_kan
from klas_hf.models.configuration_stitched_dense import DetrConfig, RTDetrConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the stitching layer is random")]
PIXELS = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))
AUTO = {
    "kan": "AutoModelForImageClassification",
    "compressed": "AutoModelForImageClassification",
    "compressed, ResNet": "AutoModelForImageClassification",
    "tasks": "AutoModel",
    "mask2former": "AutoModelForUniversalSegmentation",
    "upernet": "AutoModelForSemanticSegmentation",
    "detr": "AutoModelForObjectDetection",
    "rt_detr": "AutoModelForObjectDetection",
}
SCRIPT = """
import json
from pathlib import Path
import torch, transformers
from PIL import Image

torch.set_num_threads(1)
root, found = Path(sys.argv[1]), {}
for name, auto in json.loads(sys.argv[2]).items():
    auto = getattr(transformers, auto)
    try:
        auto.from_pretrained(root / name)
        refused = ""
    except ValueError as error:
        refused = str(error)
    model = auto.from_pretrained(root / name, trust_remote_code=True)
    pixels, options, expected = torch.load(root / f"{name}.pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, **options)
    same = [torch.equal(output[key], value) for key, value in expected.items()]
    model.save_pretrained(root / "again" / name)
    config = type(model.config).__module__.split(".")[0]
    found[name] = {"same": same, "class": type(model).__name__, "config": config, "refused": refused}
segment = transformers.pipeline("image-segmentation", str(root / "mask2former"), subtask="semantic",
    trust_remote_code=True, device="cpu")
found["segments"] = {one["label"]: sum(one["mask"].get_flattened_data()) // 255
    for one in segment(Image.open(root / "image.png"))}
assert not [name for name in sys.modules if name.partition(".")[0] == "klas_hf"]
print()
print(json.dumps(found))
"""


def models() -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """Each with what its call takes beside pixels."""
    kan, plain = tiny_kan(stitched=True), tiny_kan(base="silu")
    other = KANForImageClassification.from_backbone(kan.backbone, hidden_widths=[12], num_labels=3)
    detr = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5}  # fmt: skip
    backbone = StitchedModel.from_anchors(*(one.float() for one in tiny_pair("resnet")), stitch=(1, 2)).config
    return {
        "kan": (kan, {}),
        "compressed": (compress_kan(kan, 16), {}),
        "compressed, ResNet": (compress_kan(plain, 100, bits=32), {}),
        "tasks": (KANForManyTasks.from_models({"one": kan, "two": other}, 16), {"task": "two"}),
        "mask2former": (StitchedModel.from_anchors(*tiny_dense_pair("mask2former"), (2, 3), image_size=SIZE), {}),
        "upernet": (StitchedModel.from_anchors(*tiny_dense_pair("upernet"), (2, 3), image_size=SIZE), {}),
        "detr": (DetrForObjectDetection(DetrConfig(backbone_config=backbone, **detr)).eval(), {}),
        "rt_detr": (tiny_rt_detr(), {}),
    }


def tiny_rt_detr() -> RTDetrForObjectDetection:
    """On a stitched ResNet of four stages, three of whose maps it takes."""
    small, large = (
        tiny_classifier("resnet", hidden_sizes=widths, depths=depths).float()
        for widths, depths in (([8, 12, 16, 20], [1, 2, 1, 1]), ([12, 16, 24, 28], [2, 2, 2, 1]))
    )
    backbone = StitchedModel.from_anchors(small, large, stitch=(2, 3), image_size=SIZE).config
    backbone.out_features = ["stage2", "stage3", "stage4"]
    sizes = {"encoder_in_channels": [16, 24, 28], "decoder_in_channels": [16] * 3, "d_model": 16}
    sizes |= {"encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5, "num_denoising": 0}
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **sizes, **heads)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in folders, and what their models answer."""
    root = tmp_path_factory.mktemp("saved")
    for name, (model, options) in models().items():
        model.save_pretrained(root / name)
        pixels = PIXELS if name in ("mask2former", "upernet", "rt_detr") else PIXELS[..., :32, :32]
        with torch.no_grad():
            output = model(pixel_values=pixels, **options)
        keys = [
            key for key in ("logits", "masks_queries_logits", "class_queries_logits", "pred_boxes") if key in output
        ]
        torch.save((pixels, options, {key: output[key] for key in keys}), root / f"{name}.pt")
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(root / "mask2former")
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "image.png")
    return root


@pytest.fixture(scope="module")
def found(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return uninstalled.run(SCRIPT, str(saved), json.dumps(AUTO), cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", AUTO)
def test_answers_are_the_same_without_klas_hf(name: str, saved: Path, found: dict[str, Any]) -> None:
    here = found[name]
    assert here["same"] and all(here["same"])
    assert here["class"] == json.loads((saved / name / "config.json").read_text())["architectures"][0]
    assert here["config"] == "transformers_modules"
    assert "trust_remote_code=True" in here["refused"]


def test_a_pipeline_segments_without_klas_hf(saved: Path, found: dict[str, Any]) -> None:
    processor = Mask2FormerImageProcessorPil(size={"height": 64, "width": 64})
    model = AutoModelForUniversalSegmentation.from_pretrained(saved / "mask2former")
    with torch.no_grad():
        output = model(**processor(Image.open(saved / "image.png"), return_tensors="pt"))
    (classes,) = processor.post_process_semantic_segmentation(output, target_sizes=[SIZE])
    names = model.config.id2label
    assert found["segments"] == {names[int(one)]: int((classes == one).sum()) for one in classes.unique()}


@pytest.mark.parametrize("name", ["compressed", "mask2former"])
def test_what_was_saved_without_klas_hf_loads_with_it(name: str, saved: Path, found: dict[str, Any]) -> None:
    auto = AutoModelForImageClassification if name == "compressed" else AutoModelForUniversalSegmentation
    again = auto.from_pretrained(saved / "again" / name)
    assert type(again.config).__module__.startswith("klas_hf.models.")
    pixels, _, expected = torch.load(saved / f"{name}.pt")
    with torch.no_grad():
        output = again(pixel_values=pixels)
    assert all(torch.equal(output[key], value) for key, value in expected.items())


def test_carried_code_needs_what_transformers_needs(saved: Path) -> None:
    known = {"torch", "transformers", "safetensors", "huggingface_hub"}
    for name in AUTO:
        code = list((saved / name).glob("*.py"))
        assert len(code) >= 10
        for file in code:
            roots = {line.split(".")[0] for line in get_imports(file)}
            assert not roots & {"klas_hf", "sklearn", "scipy", "numpy"} and roots & known or not roots, file


@pytest.mark.parametrize("trusted", [None, True])
def test_carried_code_never_runs_where_klas_hf_is_installed(trusted: bool | None, saved: Path, tmp_path: Path) -> None:
    options = {} if trusted is None else {"trust_remote_code": trusted}
    for name in ("compressed", "mask2former"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (saved / name).iterdir():
            trap = f"open({str(tmp_path / 'run')!r}, 'w')\n"
            (folder / file.name).write_bytes(trap.encode() if file.suffix == ".py" else file.read_bytes())
        auto = AutoModelForImageClassification if name == "compressed" else AutoModelForUniversalSegmentation
        model = auto.from_pretrained(folder, **options)
        assert type(model.config).__module__.startswith("klas_hf.models.")
    assert not (tmp_path / "run").exists()
    assert all(one.isfinite().all() for one in outputs(model, PIXELS))
