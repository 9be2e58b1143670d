"""Generation: every way of caching gives the tokens that hooks on the whole anchors give without a cache."""

from typing import Any

import pytest
import torch
from tiny_models import EOS, left_padded, randomise_joints, reference_logits, tiny_model, token_ids
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel

from klas_hf import StitchedForCausalLM, StitchedModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")

# The anchors of `tiny_model` differ in KV heads and head_dim. Prompts and answers outgrow the sliding windows.
PAIRS = [
    ("llama", "llama"),
    ("mistral", "llama"),  # a window on one side only
    ("mistral", "mistral"),  # two different windows
    ("qwen2", "gemma2"),
    ("gemma3_text", "gemma3_text"),
    ("smollm3", "mixtral"),
    ("gpt_neox", "phi"),
]
STITCH = (2, 2)
PATHS = ["0[:2] 1[2:]", "0[:1] 1[1:3] 1[4:]", "0[:1] 1[2:4] 0[2:]", "1[:4] 1[2:]"]
NEW_TOKENS = 8
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}


def stitched(source: PreTrainedModel, target: PreTrainedModel, path: str = PATHS[0]) -> StitchedForCausalLM:
    model = StitchedModel.from_path([source, target], path)
    randomise_joints(model)
    return model


def prompts() -> dict[str, Tensor]:
    return left_padded(token_ids(3, 9), [9, 5, 7])


def greedy_reference(model: StitchedForCausalLM, source: PreTrainedModel, target: PreTrainedModel) -> Tensor:
    """The whole sequence runs through whole anchors for every new token; EOS is not taken."""
    ids, mask = prompts().values()
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = reference_logits([source, target], model.config.path, model.stitching_layers(), **inputs)[:, -1]
        logits[:, EOS] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
    return ids


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("source_family", "target_family"), PAIRS)
def test_every_cache_gives_the_tokens_of_whole_anchors(source_family: str, target_family: str, path: str) -> None:
    source, target = tiny_model(source_family, seed=1), tiny_model(target_family, large=True, seed=2)
    model = stitched(source, target, path)
    expected = greedy_reference(model, source, target)
    assert len(expected[:, 9:].unique()) > 3
    ways: dict[str, dict[str, Any]] = {
        "dynamic": {},
        "none": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "a cache made without a config": {"past_key_values": DynamicCache()},
        "the prompt in chunks": {"prefill_chunk_size": 4},
        "static, the prompt in chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
    }
    got = {name: model.generate(**prompts(), **GREEDY, **way) for name, way in ways.items()}
    assert [name for name, ids in got.items() if not torch.equal(ids, expected)] == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("theta", [10.0, 100.0])
def test_cached_forward_of_anchors_with_one_kv_shape(theta: float, path: str) -> None:
    """Blocks of several slices with the same number would share a cache layer without an error."""
    shape = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": theta}
    source = tiny_model(seed=1, **shape, rope_parameters=rope).double()
    target = tiny_model(large=True, seed=2, **shape).double()
    model = stitched(source, target, path)
    ids, cache = token_ids(2, 9), None
    expected = reference_logits([source, target], path, model.stitching_layers(), input_ids=ids)
    for chunk in (slice(0, 4), slice(4, 8), slice(8, 9)):
        with torch.no_grad():
            output = model(ids[:, chunk], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        torch.testing.assert_close(output.logits, expected[:, chunk], rtol=1e-10, atol=1e-10)
    assert [layer.get_seq_length() for layer in cache.layers] == [9] * model.config.num_hidden_layers


def test_a_cache_made_without_a_config_gets_the_layers_of_all_slices() -> None:
    model = stitched(tiny_model("mistral", seed=1), tiny_model("llama", large=True, seed=2), "0[:2] 1[2:4] 0[2:]")
    caches = [DynamicCache(), model(token_ids(1, 9)).past_key_values]
    model(token_ids(1, 9), past_key_values=caches[0])
    for cache in caches:
        assert cache.is_sliding == [True, True, False, False, True]
        assert [layer.keys.shape[-2] for layer in cache.layers] == [4 - 1] * 2 + [9] * 2 + [4 - 1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_a_left_padded_batch_gives_what_each_row_gives_alone(cache: dict[str, Any], path: str) -> None:
    model = stitched(tiny_model("gemma2", seed=1), tiny_model("gemma3_text", large=True, seed=2), path)
    batch, lengths = prompts(), [9, 5, 7]
    together = model.generate(**batch, **GREEDY, **cache)
    for row, length in enumerate(lengths):
        alone = model.generate(batch["input_ids"][row : row + 1, -length:], **GREEDY, **cache)
        assert torch.equal(together[row, -length - NEW_TOKENS :], alone[0])


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_beam_search(cache: dict[str, Any], path: str) -> None:
    """As without a cache; and the score of a beam is the mean log-probability of its tokens by the whole anchors."""
    source, target = tiny_model("mistral", seed=1), tiny_model("llama", large=True, seed=2)
    model = stitched(source, target, path)
    ids = token_ids(1, 6)
    beams = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(ids, **GREEDY, **beams, **cache)
    plain = model.generate(ids, **GREEDY, **beams, use_cache=False)
    assert torch.equal(output.sequences, plain.sequences)
    assert len(output.sequences.unique(dim=0)) == 3
    sequences = output.sequences
    logits = reference_logits([source, target], path, model.stitching_layers(), input_ids=sequences)[:, 5:-1]
    log_p = logits.log_softmax(-1).gather(-1, sequences[:, 6:, None]).squeeze(-1)
    torch.testing.assert_close(output.sequences_scores, log_p.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS[:3])
def test_assisted_generation_both_ways_and_prompt_lookup(path: str) -> None:
    source, target = tiny_model("gemma2", seed=1), tiny_model("llama", large=True, seed=2)
    model, ids = stitched(source, target, path), token_ids(1, 6)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=source), expected)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=2), expected)
    whole = target.generate(ids, **GREEDY)
    assert torch.equal(target.generate(ids, **GREEDY, assistant_model=model), whole)


def test_generation_stops_at_each_eos_of_the_target() -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    ids = token_ids(1, 6)
    free = stitched(source, target).generate(ids, **GREEDY)[0, 6:].tolist()
    target.generation_config.eos_token_id = [EOS, free[3]]
    stopped = stitched(source, target).generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, 6:].tolist()
    assert stopped == free[: free.index(free[3]) + 1]


def test_logits_to_keep() -> None:
    model = stitched(tiny_model(seed=1), tiny_model("granite", large=True, seed=2))
    ids = token_ids(2, 7)
    with torch.no_grad():
        every = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, every[:, -1:])
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, every[:, -3:])
        kept = torch.tensor([0, 4])
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, every[:, kept])


def test_hidden_states_are_the_inputs_of_every_block_and_the_normed_output() -> None:
    model = stitched(tiny_model(seed=1), tiny_model(large=True, seed=2), "0[:2] 1[1:3] 1[4:]")
    inputs: list[Tensor] = []
    blocks = [block for part in model.model.slices for block in part.layers]
    for block in blocks:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        output = model(token_ids(2, 7), output_hidden_states=True)
        headless = model.model(token_ids(2, 7))
    states = output.hidden_states
    assert [state.shape for state in states] == [(2, 7, 16)] * 2 + [(2, 7, 48)] * 4
    assert all(torch.equal(state, x) for state, x in zip(states[:-1], inputs[:5], strict=True))
    assert torch.equal(states[-1], headless.last_hidden_state)
    assert output.attentions is None
    assert headless.hidden_states is None


def test_attentions_in_eager() -> None:
    source, target = tiny_model(seed=1), tiny_model("mistral", large=True, seed=2)
    model = StitchedModel.from_anchors(source, target, STITCH, attn_implementation="eager")
    with torch.no_grad():
        attentions = model(token_ids(2, 9), output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(2, 2, 9, 9)] * 2 + [(2, 4, 9, 9)] * 3
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert attentions[-1][0, 0, 8, 2] == 0 < attentions[-1][0, 0, 8, 3]  # the target's window is 6
    assert attentions[0][0, 0, 8, 0] > 0  # the source has none


def test_each_slice_can_have_its_own_attention() -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    slices = {"slice_0": "eager", "slice_1": "sdpa"}
    model = StitchedModel.from_anchors(source, target, STITCH, attn_implementation=slices)
    assert model.model.slices[0].config._attn_implementation == "eager"
    assert model.model.slices[1].config._attn_implementation == "sdpa"
    same = stitched(source, target)
    randomise_joints(model)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids(2, 9)).logits, same(token_ids(2, 9)).logits, rtol=1e-4, atol=1e-4)


def test_loss_is_the_mean_cross_entropy_of_the_next_tokens_that_have_a_label() -> None:
    model = stitched(tiny_model(seed=1), tiny_model(large=True, seed=2))
    ids = token_ids(2, 7)
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        loss, logits = model(ids, labels=labels, return_dict=False, use_cache=False)
    log_p = output.logits.double().log_softmax(-1)
    picked = [log_p[row, place - 1, ids[row, place]] for row in range(2) for place in range(3, 7)]
    torch.testing.assert_close(output.loss.double(), -torch.stack(picked).mean(), rtol=1e-5, atol=1e-5)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_inputs_embeds_in_place_of_ids() -> None:
    model = stitched(tiny_model("gemma2", seed=1), tiny_model(large=True, seed=2))
    ids = token_ids(2, 7)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        assert embedded.shape == (2, 7, 16)
        assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_continuous_batching_where_all_layers_are_alike() -> None:
    shape = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = stitched(tiny_model(seed=1, **shape), tiny_model(large=True, seed=2, **shape))
    rows = [token_ids(5, seed=1).tolist(), token_ids(3, seed=2).tolist()]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=EOS)
    expected = [model.generate(torch.tensor([row]), generation_config=config)[0, len(row) :].tolist() for row in rows]
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(rows, config, continuous_batching_config=memory, progress_bar=False)
    assert [output.generated_tokens for output in outputs.values()] == expected


@pytest.mark.parametrize(
    ("source_family", "target_family", "changes", "message"),
    [
        ("llama", "llama", {}, r"\[\(1, 8\), \(2, 16\)\].*Use generate"),
        ("mistral", "mistral", {"head_dim": 8, "num_key_value_heads": 1}, r"windows of \[4, 6\]"),
    ],
)
def test_continuous_batching_is_refused_where_layers_differ(
    source_family: str, target_family: str, changes: dict[str, int], message: str
) -> None:
    model = stitched(tiny_model(source_family, seed=1), tiny_model(target_family, large=True, seed=2, **changes))
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=EOS))
