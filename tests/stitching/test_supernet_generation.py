"""Language supernets generate on any path: as the extracted model does, on their own weights, with shared prefixes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PAD, VOCABULARY, left_padded, tiny_model, token_ids
from tiny_supernets import alone
from tiny_supernets import supernet_of as image_supernet_of
from torch import Tensor, nn

from klas_hf import PrefixCache, StitchedSupernet, StitchedSupernetForCausalLM, Usage, measure_costs
from klas_hf.paths import Path as AnchorPath

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer", "ignore:.*do not determine")

PATHS = ["0[:1] 1[2:]", "0[:2] 1[2:]", "0[:2] 1[4:]", "1[:1] 0[1:2] 1[2:]", "1[:2] 1[4:]", "0[:2] 1[5:]"]
EVERY = ["0[:]", "1[:]", *PATHS]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}


def supernet_of(family: str = "llama", **changes: Any) -> StitchedSupernetForCausalLM:
    anchors = [tiny_model(family, large=large, seed=1 + large, **changes) for large in (False, True)]
    for anchor in anchors:
        anchor.generation_config.eos_token_id = None
    return StitchedSupernet.from_anchors(anchors, PATHS, calibration=[token_ids(16, 12, seed=3)])


@pytest.fixture(scope="module")
def llamas() -> StitchedSupernetForCausalLM:
    return supernet_of().double()


def storages(*modules: nn.Module) -> dict[int, int]:
    """Address → bytes of everything that modules hold."""
    tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_every_path_says_what_the_extracted_model_says(family: str) -> None:
    supernet = supernet_of(family)
    prompts = left_padded(token_ids(2, 7), [7, 4])
    said = [supernet.generate(**prompts, path=path, **GREEDY) for path in EVERY]
    for path, tokens in zip(EVERY, said, strict=True):
        assert torch.equal(tokens, supernet.extract(path).generate(**prompts, **GREEDY)), path
    assert torch.equal(supernet.generate(**prompts, **GREEDY), said[1])  # the last anchor, unasked
    assert len({tuple(tokens.flatten().tolist()) for tokens in said}) > 4


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_held_once_whatever_path_has_run(tied: bool) -> None:
    """DESIGN: no more than anchors, stitches and one path; here no path has weights of its own."""
    supernet = supernet_of(tie_word_embeddings=tied)
    alone = storages(supernet)
    for path in EVERY:
        supernet.generate(token_ids(1, 5), path=path, **GREEDY)
    models = [supernet.path_model(path) for path in EVERY]
    beside = {place: size for place, size in storages(supernet, *models).items() if place not in alone}
    assert set(beside) <= set(storages(*(nn.ParameterList(model.buffers()) for model in models)))
    weights = {one.untyped_storage().data_ptr() for model in models for one in model.parameters()}
    assert weights <= set(alone)
    assert sum(beside.values()) < 0.01 * sum(alone.values())  # rotary frequencies


def test_what_is_learnt_or_moved_is_generated_with() -> None:
    supernet, ids = supernet_of(), token_ids(1, 5)
    before, model = supernet.generate(ids, path=PATHS[0], **GREEDY), supernet.path_model(PATHS[0])
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.mul_(-1.3)
    after = supernet.generate(ids, path=PATHS[0], **GREEDY)
    assert supernet.path_model(PATHS[0]) is model and not torch.equal(after, before)
    assert torch.equal(after, supernet.extract(PATHS[0]).generate(ids, **GREEDY))
    supernet.double()
    assert supernet.path_model(PATHS[0]).dtype == torch.float64
    assert torch.equal(
        supernet.generate(ids, path=PATHS[0], **GREEDY), supernet.extract(PATHS[0]).generate(ids, **GREEDY)
    )


# ---- prefixes


@contextmanager
def tokens_run(supernet: StitchedSupernetForCausalLM, path: str) -> Iterator[list[int]]:
    """How many tokens each block of a path's model has run on."""
    blocks = [block for part in supernet.path_model(path).model.slices for block in part.layers]
    counts, handles = [0] * len(blocks), []
    for number, block in enumerate(blocks):

        def count(module: nn.Module, args: tuple, kwargs: dict, output: Any, number: int = number) -> None:
            counts[number] += (args[0] if args else kwargs["hidden_states"]).shape[1]

        handles.append(block.register_forward_hook(count, with_kwargs=True))
    yield counts
    for handle in handles:
        handle.remove()


def test_a_prompt_is_not_read_anew(llamas: StitchedSupernetForCausalLM) -> None:
    """Of 20 tokens read on `0[:2] 1[2:]`, `0[:2] 1[4:]` reads those behind two blocks by itself, and the last."""
    cache, ids, new = PrefixCache(), token_ids(1, 20), 8
    expected = {path: llamas.extract(path).generate(ids, **GREEDY) for path in EVERY}
    with tokens_run(llamas, PATHS[1]) as run:
        assert torch.equal(llamas.generate(ids, path=PATHS[1], prefixes=cache, **GREEDY), expected[PATHS[1]])
    assert run == [20 + new - 1] * 5 and cache.reused == 0
    with tokens_run(llamas, PATHS[1]) as run:  # the same again: the last token alone
        assert torch.equal(llamas.generate(ids, path=PATHS[1], prefixes=cache, **GREEDY), expected[PATHS[1]])
    assert run == [new] * 5 and cache.reused == 19 * 5
    with tokens_run(llamas, PATHS[2]) as run:
        assert torch.equal(llamas.generate(ids, path=PATHS[2], prefixes=cache, **GREEDY), expected[PATHS[2]])
    assert run == [new] * 3 and cache.reused == 19 * 5 + 19 * 2
    held = cache.nbytes
    shared = cache.find(ids[0].tolist(), [()], None).tokens  # other weights: nothing is known, and all goes
    assert (held > 0, shared, cache.nbytes) == (True, 0, 0)


@pytest.mark.parametrize(
    "family",
    [
        "gemma3_text",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama", "mistral", "gemma2", "granite", "gpt_neox")),
    ],
)
def test_paths_that_share_a_cache_say_what_they_say_alone(family: str) -> None:
    """Conversations that go on, part and change their path, beyond every sliding window."""
    supernet, chance, cache = supernet_of(family).double(), random.Random(4), PrefixCache()
    turns = [token_ids(1, 9, seed=seed) for seed in (1, 2)]
    for seed in range(10):
        ids = chance.choice(turns)
        ids = torch.cat([ids[:, : chance.randint(4, ids.shape[1])], token_ids(1, chance.randint(1, 6), seed=seed)], 1)
        path = chance.choice(EVERY)
        tokens = supernet.generate(ids, path=path, prefixes=cache, **GREEDY)
        alone = supernet.path_model(path).generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert torch.equal(tokens, alone), (seed, path)
        turns.append(tokens)
    assert cache.reused > 100


def test_what_was_used_longest_ago_goes_first(llamas: StitchedSupernetForCausalLM) -> None:
    one, other, third = (token_ids(1, 12, seed=seed) for seed in (1, 2, 3))
    whole = PrefixCache()
    llamas.generate(one, path="1[:]", prefixes=whole, **GREEDY)
    cache = PrefixCache(max_bytes=2 * whole.nbytes)
    for ids in (one, other, one, third):
        llamas.generate(ids, path="1[:]", prefixes=cache, **GREEDY)
        assert cache.nbytes <= cache.max_bytes
    before = cache.reused
    llamas.generate(one, path="1[:]", prefixes=cache, **GREEDY)
    assert cache.reused > before
    before = cache.reused
    llamas.generate(other, path="1[:]", prefixes=cache, **GREEDY)
    assert cache.reused == before
    llamas.generate(one, path="1[:]", prefixes=PrefixCache(max_bytes=1), **GREEDY)
    with pytest.raises(ValueError, match="got max_bytes=0; expected at least 1"):
        PrefixCache(0)


def test_nothing_is_reused_once_the_weights_have_changed() -> None:
    supernet, cache, ids = supernet_of(), PrefixCache(), token_ids(1, 12)
    supernet.generate(ids, path="1[:]", prefixes=cache, **GREEDY)
    with torch.no_grad():
        supernet.anchors[1].model.layers[0].mlp.up_proj.weight.add_(0.5)
    tokens = supernet.generate(ids, path="1[:]", prefixes=cache, **GREEDY)
    assert cache.reused == 0 and torch.equal(tokens, supernet.extract("1[:]").generate(ids, **GREEDY))


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (token_ids(2, 5), {}),
        (token_ids(1, 5), {"num_beams": 2}),
        (token_ids(1, 5), {"do_sample": True, "num_return_sequences": 2}),
        (token_ids(1, 5), {"prompt_lookup_num_tokens": 2}),
        (token_ids(1, 5), {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}),
    ],
)
def test_prefixes_of_more_than_one_sequence_are_refused(
    llamas: StitchedSupernetForCausalLM, ids: Tensor, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="got prefixes with .* expected one prompt without padding and one answer"):
        llamas.generate(ids, prefixes=PrefixCache(), max_new_tokens=3, **options)


# ---- budgets


def test_a_budget_takes_the_best_path_that_it_allows(llamas: StitchedSupernetForCausalLM, tmp_path: Path) -> None:
    cost = {str(path): measure_costs(llamas.extract(path)) for path in llamas.paths}
    whole = cost["1[:]"]
    ids = token_ids(1, 6)
    for budget in (0.5, "80%", 1.0):
        share = float(budget.rstrip("%")) / (100 if "%" in budget else 1) if isinstance(budget, str) else budget
        within = [path for path in cost if cost[path].macs <= share * whole.macs]
        dearest = max(within, key=lambda path: cost[path].macs)
        assert str(llamas.best_path(budget)) == dearest
    tokens = llamas.generate(ids, budget="60%", **GREEDY)
    assert torch.equal(tokens, llamas.generate(ids, path=llamas.best_path(0.6), **GREEDY))
    size = sorted(one.parameters for one in cost.values())[3]
    path = llamas.best_path(f"{size * 8 / 1e3} KB")
    assert cost[str(path)].parameters <= size

    llamas.rank({path: -cost[str(path)].macs if path.joints else 0 for path in llamas.paths})  # anchors are worst
    assert str(llamas.best_path(1.0)) == max(PATHS, key=lambda path: cost[path].macs)
    llamas.rank({path: cost[str(path)].macs for path in llamas.paths})
    cheapest = min(cost, key=lambda path: cost[path].macs)
    assert str(llamas.best_path("100%")) == cheapest
    llamas.save_pretrained(tmp_path)
    assert str(StitchedSupernet.from_pretrained(tmp_path).best_path("100%")) == cheapest
    llamas.config.ranking = None


def test_paths_of_images_have_budgets_too() -> None:
    supernet, _ = image_supernet_of("vit")
    whole = supernet.path_costs[supernet.paths.index(alone(1))].macs
    chosen = supernet.path_costs[supernet.paths.index(supernet.best_path("70%"))]
    assert chosen.macs == max(cost.macs for cost in supernet.path_costs if cost.macs <= 0.7 * whole)


def test_seconds_are_measured_once(
    llamas: StitchedSupernetForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    usage = Usage(prompt=4)
    assert llamas.best_path("1000 s, 60%", usage=usage) == llamas.best_path("60%")
    monkeypatch.setattr("klas_hf.stitching.supernet_budgets.costs_of", None)
    assert llamas.best_path("1000 s, 60%", usage=Usage(prompt=4)) == llamas.best_path("60%")


def test_budgets_and_paths_that_cannot_be_had_are_refused(llamas: StitchedSupernetForCausalLM) -> None:
    ids = token_ids(1, 6)
    with pytest.raises(ValueError, match=r"below what any path found here reaches.*The nearest: .* times the budget"):
        llamas.generate(ids, budget="1%")
    with pytest.raises(ValueError, match="which this supernet of 6 paths was not made with; expected one of"):
        llamas.generate(ids, path="0[:1] 1[4:]")
    with pytest.raises(ValueError, match="got path=0.* and budget='60%'; expected one of them"):
        llamas.generate(ids, path="0[:]", budget="60%")
    with pytest.raises(ValueError, match="got no prompt; expected token ids"):
        llamas.generate(path="0[:]")
    with pytest.raises(ValueError, match="not measured on a device; expected a search with usage"):
        llamas.generate(ids, budget="20 ms")
    with pytest.raises(ValueError, match="device='meta', which is not here or has no clock"):
        llamas.generate(ids, budget="20 ms", usage=Usage(device="meta"))
    with pytest.raises(ValueError, match=r"without 1\[:\] of the supernet's and with 0\[:1\] 1\[4:\]"):
        llamas.rank({AnchorPath.parse(path): 0.0 for path in ["0[:]", *PATHS, "0[:1] 1[4:]"]})


def test_a_prompt_longer_than_an_anchor_reads_is_refused() -> None:
    supernet = supernet_of(max_position_embeddings=10)
    supernet.config.anchor_configs[0].max_position_embeddings = supernet.anchors[0].config.max_position_embeddings = 6
    ids = torch.randint(3, VOCABULARY, (1, 7))
    assert supernet.generate(ids, path="1[:]", max_new_tokens=2, pad_token_id=PAD).shape[1] > 7
    with pytest.raises(ValueError, match=r"got a prompt of 7 tokens .* read up to 6, 10; expected fewer than 6"):
        supernet.generate(ids, path=PATHS[0])
