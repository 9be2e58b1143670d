"""Streaming, drafts, sampling and kept caches: what `generate` offers beside greedy decoding."""

import copy
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from saved_models import SavedModel, greedy, save_stitched
from tiny_models import tiny_model, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, TextStreamer

from klas_hf import StitchedForCausalLM, StitchedModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

TOKENS = 10
GREEDY: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    return save_stitched(tmp_path_factory.mktemp("saved"), "mistral", "gemma2")


def test_text_is_printed_as_it_comes(saved: SavedModel, capsys: pytest.CaptureFixture[str]) -> None:
    ids = saved.encode(PROMPT)
    saved.model.generate(ids, **GREEDY, streamer=TextStreamer(saved.tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == PROMPT + saved.continuation(ids, TOKENS) + "\n"


def test_text_is_handed_out_as_it_comes(saved: SavedModel) -> None:
    ids = saved.encode(PROMPT)
    streamer = TextIteratorStreamer(saved.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    thread = Thread(target=saved.model.generate, args=(ids,), kwargs={**GREEDY, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces) == saved.continuation(ids, TOKENS)


def count_calls(module: nn.Module) -> list[int]:
    """One entry for each of the module's forwards from now on."""
    calls: list[int] = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


def test_drafts_that_are_right_save_forwards_of_the_stitched_model() -> None:
    """A stitch of an anchor with itself says what the anchor says, so all of the anchor's drafts are taken."""
    anchor = tiny_model(large=True, seed=2)
    model = StitchedModel.from_anchors(anchor, anchor, (3, 3))
    with torch.no_grad():
        model.stitching_layers()[0].weight.copy_(torch.eye(48))
        model.stitching_layers()[0].bias.zero_()
    ids = token_ids(1, 6)
    expected = greedy(lambda ids: anchor(ids).logits, ids, TOKENS)
    assert len(expected) == TOKENS
    calls, drafts = count_calls(model), count_calls(anchor)
    assert model.generate(ids, **GREEDY, assistant_model=anchor)[0, 6:].tolist() == expected
    assert len(calls) <= TOKENS // 2
    assert len(drafts) >= TOKENS - len(calls)


def test_the_prompt_as_a_draft_saves_forwards() -> None:
    """A random model soon repeats itself, and then the text so far holds what comes next."""
    model, ids = double(), token_ids(1, 6)
    plain = model.generate(ids, do_sample=False, max_new_tokens=60, min_new_tokens=60)
    calls = count_calls(model)
    drafted = model.generate(ids, do_sample=False, max_new_tokens=60, min_new_tokens=60, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted, plain)
    assert len(calls) < 50


def double() -> StitchedForCausalLM:
    """In float64, so that sampling takes the same tokens however the logits were computed."""
    source, target = tiny_model("mistral", seed=1), tiny_model("gemma3_text", large=True, seed=2)
    return StitchedModel.from_anchors(source, target, (2, 2)).double()


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "guidance_scale": 1.8},
        {"do_sample": False, "num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
    ],
    ids=["samples", "penalties", "sampled beams", "guidance", "beams"],
)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_cache_changes_no_mode_of_decoding(mode: dict[str, Any], cache: dict[str, Any]) -> None:
    model, ids = double(), token_ids(1, 7)

    def run(**way: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(ids, max_new_tokens=TOKENS, **mode, **way)

    plain = run(use_cache=False)
    assert torch.equal(run(**cache), plain)
    assert not torch.equal(plain[:1], model.generate(ids, **GREEDY)[:, : plain.shape[1]])


def test_generation_stops_at_a_string(saved: SavedModel) -> None:
    ids = saved.encode(PROMPT)
    whole = saved.continuation(ids, TOKENS)
    stop = whole[4:6]
    got = saved.model.generate(ids, **GREEDY, stop_strings=[stop], tokenizer=saved.tokenizer)
    text = saved.tokenizer.decode(got[0, ids.shape[1] :], skip_special_tokens=True)
    assert stop in text
    assert whole.startswith(text)
    assert len(text) < len(whole)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_kept_cache_goes_on_with_the_next_turn(static: bool) -> None:
    model = double()
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    first = model.generate(token_ids(1, 7), **GREEDY, past_key_values=cache)
    turn = torch.cat([first, token_ids(1, 6, seed=5)], dim=1)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    second = model.generate(turn, **GREEDY, past_key_values=cache)
    assert seen[0] == 6 + 1  # the last token of the first answer has not been in the cache
    assert torch.equal(second, model.generate(turn, **GREEDY, use_cache=False))


@torch.no_grad()
def test_a_copied_cache_serves_several_questions_about_one_text() -> None:
    model = double()
    prefix = token_ids(1, 9)
    cache = model(prefix, use_cache=True).past_key_values
    for seed in (1, 2):
        ids = torch.cat([prefix, token_ids(1, 4, seed=seed)], dim=1)
        got = model.generate(ids, **GREEDY, past_key_values=copy.deepcopy(cache))
        assert torch.equal(got, model.generate(ids, **GREEDY, use_cache=False))
    assert cache.get_seq_length() == 9


def test_settings_saved_with_the_model_are_the_defaults(saved: SavedModel, tmp_path: Path) -> None:
    model = copy.deepcopy(saved.model)
    model.generation_config.update(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=2)
    model.save_pretrained(tmp_path)
    ids = saved.encode(PROMPT)
    got = StitchedModel.from_pretrained(tmp_path).generate(ids)
    expected = saved.model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=2)
    assert got.shape == (1, ids.shape[1] + 5)
    assert torch.equal(got, expected)
