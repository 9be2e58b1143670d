"""A path that begins and ends with one anchor that ties its head to the embedding holds this tensor once."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_cases import quick
from safetensors import safe_open
from tiny_models import randomise_joints, reference_logits, tiny_model, token_ids
from training_examples import examples
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from klas_hf import (
    StitchedForCausalLM,
    StitchedModel,
    StitchedSupernet,
    TrainingConfig,
    Usage,
    measure_costs,
    measure_path_costs,
    train_stitches,
)

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")
EMBEDDINGS = {"llama": "embed_tokens", "gemma3_text": "embed_tokens", "phi": "embed_tokens", "gpt_neox": "embed_in"}
PRUNED = "1[:1] 0[1:2] 1[3:]"


def anchors(family: str = "llama", **changes: Any) -> list[PreTrainedModel]:
    """Two anchors that both tie; their embeddings differ in width."""
    options = {"tie_word_embeddings": True} | changes
    return [tiny_model(family, large=large, seed=1 + large, **options) for large in (False, True)]


def stitched(pair: list[Any], path: str = PRUNED, **options: Any) -> StitchedForCausalLM:
    model = StitchedModel.from_path(pair, path, **options)
    randomise_joints(model)
    return model


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(token_ids(2, 9)).logits


@pytest.mark.parametrize("path", ["1[:]", "1[:2] 1[4:]", PRUNED, "1[:3] 1[5:]"])
@pytest.mark.parametrize("family", quick(EMBEDDINGS, ["llama"]))
def test_one_tensor_is_both_and_counted_once(family: str, path: str, tmp_path: Path) -> None:
    pair = anchors(family)
    pair[1].save_pretrained(tmp_path / "large")
    for large in (pair[1], tmp_path / "large"):
        model = stitched([pair[0], large], path)
        assert model.config.tie_word_embeddings and is_tied(model)
        torch.testing.assert_close(
            logits_of(model), reference_logits(pair, path, model.stitching_layers(), input_ids=token_ids(2, 9)).detach()
        )
    held = sum(tensor.numel() for tensor in {one.data_ptr(): one for one in model.state_dict().values()}.values())
    cost = measure_costs(model, tokens=9)
    assert cost.parameters == model.num_parameters() == held
    assert measure_path_costs(pair, tokens=9).of(path) == measure_costs(model.config, tokens=9) == cost
    if path == "1[:]":
        assert cost == measure_costs(pair[1], tokens=9)


def test_bytes_of_weights_in_use_are_those_in_memory() -> None:
    pair, usage = anchors(), Usage(prompt=4)
    model = stitched(pair)
    held = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert measure_path_costs(pair, tokens=4, usage=usage).of(PRUNED).weight_bytes == held
    assert measure_costs(model, tokens=4, usage=usage).weight_bytes == held


@pytest.mark.parametrize(("path", "tied"), [("0[:2] 1[3:]", (True, True)), (PRUNED, (True, False))])
def test_other_paths_have_two(path: str, tied: tuple[bool, bool]) -> None:
    """An embedding of another anchor than the head's, or an anchor that does not tie."""
    pair = [tiny_model(large=n == 1, seed=n, tie_word_embeddings=one) for n, one in enumerate(tied)]
    model = stitched(pair, path)
    assert not model.config.tie_word_embeddings and not is_tied(model)
    cost = measure_costs(model, tokens=9)
    assert measure_path_costs(pair, tokens=9).of(path) == cost
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", quick(EMBEDDINGS, ["llama", "gpt_neox"]))
def test_it_is_stored_once_and_comes_back(family: str, tmp_path: Path) -> None:
    model = stitched(anchors(family))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert set(model.state_dict()) - stored == {"lm_head.weight"}
    assert f"model.slices.0.{EMBEDDINGS[family]}.weight" in stored
    for loader in (StitchedModel, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert is_tied(loaded) and torch.equal(logits_of(loaded), logits_of(model))
    body = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(body(token_ids(2, 9)).last_hidden_state, model.model(token_ids(2, 9)).last_hidden_state)
    loaded.resize_token_embeddings(70)
    assert is_tied(loaded) and logits_of(loaded).shape[-1] == 70


def test_a_checkpoint_of_the_format_before_keeps_its_two(tmp_path: Path) -> None:
    """Format 2 stored the embedding and the head of one anchor by themselves; training may have parted them."""
    model = stitched(anchors())
    model.config.tie_word_embeddings, model._tied_weights_keys = False, None
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.all_tied_weights_keys = {}
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"format_version": 2}))
    loaded = StitchedModel.from_pretrained(tmp_path)
    assert not is_tied(loaded) and torch.equal(logits_of(loaded), logits_of(model))
    assert measure_costs(loaded, tokens=9).parameters == sum(one.numel() for one in loaded.parameters())


def test_training_all_trains_it_as_the_anchor_does(tmp_path: Path) -> None:
    """A path of a whole anchor learns what the anchor learns, and what was trained is still one tensor."""
    pair = anchors()
    config = TrainingConfig(
        max_steps=3, per_device_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2, trainable="full"
    )
    whole, pruned = stitched(pair, "1[:]"), stitched(pair)
    losses = train_stitches(whole, examples(), config).losses
    assert train_stitches(pair[1], examples(), config).losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(whole.lm_head.weight, pair[1].lm_head.weight)
    before = pruned.lm_head.weight.detach().clone()
    train_stitches(pruned, examples(), config, output_dir=tmp_path / "run")
    assert is_tied(pruned) and not torch.equal(pruned.lm_head.weight, before)
    pruned.save_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(StitchedModel.from_pretrained(tmp_path / "model")), logits_of(pruned))


def test_a_path_of_a_supernet_is_tied_too() -> None:
    supernet = StitchedSupernet.from_anchors(anchors(), [PRUNED, "0[:2] 1[3:]"])
    ids = token_ids(2, 9)
    for path, one in ((PRUNED, True), ("1[:]", True), ("0[:2] 1[3:]", False)):
        model = supernet.extract(path)
        assert is_tied(model) == model.config.tie_word_embeddings == one
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, supernet(ids, path=path).logits)
        costs = dict(zip(map(str, supernet.paths), supernet.path_costs, strict=True))
        assert costs[path].parameters == model.num_parameters()


def test_a_server_is_told() -> None:
    """vLLM ties its own head to its own embedding where the configuration says so."""
    config = stitched(anchors()).config
    text = type(config).from_dict(copy.deepcopy(config.to_dict())).get_text_config()
    assert text.tie_word_embeddings and text.embedding_size == text.hidden_size
