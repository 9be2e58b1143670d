"""The stock pipelines take stitched models from their folders, for text and for images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from saved_models import SavedModel, save_stitched
from tiny_vision import CLASSES, LABELS, logits, middle
from transformers import Pipeline, ViTImageProcessorPil, pipeline

from klas_hf import StitchedModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

TOKENS = 10
GREEDY: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
PROMPTS = ["the quick brown fox", "a cat", "one big bird sang and the lazy dog"]
CHATS = [
    [{"role": "user", "content": "the lazy dog"}],
    [
        {"role": "system", "content": "a big cat"},
        {"role": "user", "content": "one bird"},
        {"role": "assistant", "content": "sang"},
        {"role": "user", "content": "and the fox?"},
    ],
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    return save_stitched(tmp_path_factory.mktemp("saved"), "mistral", "llama")


@pytest.fixture(scope="module")
def generate(saved: SavedModel) -> Pipeline:
    return pipeline("text-generation", str(saved.folder), device="cpu")


def test_a_prompt(saved: SavedModel, generate: Pipeline) -> None:
    continuations = [saved.continuation(saved.encode(prompt), TOKENS) for prompt in PROMPTS]
    assert len(set(continuations)) == len(PROMPTS)
    for prompt, expected in zip(PROMPTS, continuations, strict=True):
        assert generate(prompt, **GREEDY) == [{"generated_text": prompt + expected}]
        assert generate(prompt, **GREEDY, return_full_text=False) == [{"generated_text": expected}]


def test_prompts_of_unequal_lengths_in_one_batch(saved: SavedModel, generate: Pipeline) -> None:
    rows = []
    handle = generate.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    together = generate(PROMPTS, batch_size=len(PROMPTS), **GREEDY)
    handle.remove()
    assert set(rows) == {len(PROMPTS)}
    assert together == [generate(prompt, **GREEDY) for prompt in PROMPTS]


def test_a_chat(saved: SavedModel, generate: Pipeline) -> None:
    for messages in CHATS:
        answer = {"role": "assistant", "content": saved.continuation(saved.encode_chat(messages), TOKENS)}
        assert generate(messages, **GREEDY) == [{"generated_text": [*messages, answer]}]
    together = generate(CHATS, batch_size=2, **GREEDY)
    assert together == [generate(messages, **GREEDY) for messages in CHATS]


def test_several_samples_from_a_model_in_memory(saved: SavedModel) -> None:
    sample = pipeline("text-generation", saved.model, tokenizer=saved.tokenizer, device="cpu")
    torch.manual_seed(0)
    texts = [row["generated_text"] for row in sample("the", do_sample=True, num_return_sequences=3, max_new_tokens=6)]
    assert len(set(texts)) == 3
    assert all(text.startswith("the") for text in texts)


def test_the_source_anchor_drafts_in_the_pipeline(saved: SavedModel) -> None:
    assisted = pipeline("text-generation", str(saved.folder), assistant_model=str(saved.source_folder), device="cpu")
    drafts: list[int] = []
    assert assisted.assistant_model is not None
    assisted.assistant_model.register_forward_hook(lambda *args: drafts.append(1))
    expected = PROMPTS[0] + saved.continuation(saved.encode(PROMPTS[0]), TOKENS)
    assert assisted(PROMPTS[0], **GREEDY) == [{"generated_text": expected}]
    assert drafts


def test_features_are_the_last_hidden_states(saved: SavedModel) -> None:
    extract = pipeline("feature-extraction", str(saved.folder), device="cpu")
    with torch.no_grad():
        expected = saved.model.model(saved.encode("a cat")).last_hidden_state
    torch.testing.assert_close(extract("a cat", return_tensors=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["swin", "levit"])
def test_images_of_any_size_and_mode_one_by_one_and_batched(kind: str, tmp_path: Path) -> None:
    source, target, stitch = middle(kind)
    model = StitchedModel.from_anchors(source, target, stitch)
    model.save_pretrained(tmp_path / "model")
    side = source.config.image_size
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    processor.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 50, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(array[: 40 + 2 * place]) for place, array in enumerate(pixels)]
    images[1] = images[1].convert("L").convert("RGBA")
    images[2].save(tmp_path / "image.png")
    classify = pipeline("image-classification", str(tmp_path / "model"), device="cpu")
    answers = classify([*images[:2], str(tmp_path / "image.png"), images[3]], top_k=CLASSES, batch_size=4)
    rgb = [image.convert("RGB") for image in images]
    shares = logits(model, processor(rgb, return_tensors="pt")["pixel_values"].double()).softmax(-1)
    for row, expected in zip(answers, shares, strict=True):
        assert {answer["label"]: answer["score"] for answer in row} == {
            LABELS[number]: pytest.approx(float(share), abs=1e-5) for number, share in enumerate(expected)
        }
        assert row == sorted(row, key=lambda answer: -answer["score"])
    assert [classify(image, top_k=CLASSES)[0]["label"] for image in images] == [row[0]["label"] for row in answers]
