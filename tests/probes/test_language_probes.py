"""Probes against the logit lens and ridge regression done by other means."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from klas_hf.anchors import LanguageAnchor
from klas_hf.probes import ProbeConfig, ProbeNet, fit_probes

BOS = 1


def llama(depth: int = 3, width: int = 8, *, seed: int = 0, bos: int | None = BOS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=width,
        intermediate_size=12,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        bos_token_id=bos,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if "Norm" in type(m).__name__):
            norm.weight += 0.3 * torch.randn(width)  # a norm left out, or applied twice, shows
    return model


def batches(count: int = 4, rows: int = 3, tokens: int = 9, seed: int = 0) -> list[dict[str, Tensor]]:
    """Right-padded batches, the first of its tokens BOS."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 29, (rows, tokens), generator=generator)
        ids[:, 0] = BOS
        lengths = torch.randint(4, tokens + 1, (rows, 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()})
    return made


@torch.no_grad()
def block_outputs(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> list[Tensor]:
    """`(batch, tokens, width)` of every block, by hooks of our own."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in model.model.layers
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return outputs


def gathered(model: LlamaForCausalLM, data: list[dict[str, Tensor]]) -> list[Tensor]:
    """Rows `(counted tokens, width)` of every block: neither padding nor the BOS at the start of a sequence."""
    kept: list[list[Tensor]] = [[] for _ in model.model.layers]
    for batch in data:
        counts = batch["attention_mask"].bool() & (batch["input_ids"] != BOS)
        for rows, output in zip(kept, block_outputs(model, batch), strict=True):
            rows.append(output[counts])
    return [torch.cat(rows).double() for rows in kept]


def log_probs(probes: ProbeNet, model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """`(blocks, batch · tokens, vocabulary)`."""
    hidden = torch.stack([h.flatten(0, 1) for h in block_outputs(model, batch)])
    with torch.no_grad():
        return probes.log_probs(hidden, LanguageAnchor(model))


def test_logit_probes_are_the_logit_lens() -> None:
    model, (batch,) = llama(), batches(1)
    got = log_probs(fit_probes(model, [], ProbeConfig(kind="logit")), model, batch)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        # hidden_states: embeddings, blocks 1 to m - 1, and the last block's output already normed.
        for block in (0, 1):
            lens = model.lm_head(model.model.norm(output.hidden_states[block + 1]))
            torch.testing.assert_close(got[block], lens.log_softmax(-1).flatten(0, 1))
        torch.testing.assert_close(got[2], model.lm_head(output.hidden_states[3]).log_softmax(-1).flatten(0, 1))


@pytest.mark.parametrize("kind", ["logit", "ridge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_probe_is_the_model_itself(kind: str, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    batch, *data = batches(4)
    got = log_probs(fit_probes(model, data, ProbeConfig(kind=kind)), model, batch)
    assert got.dtype == torch.float32
    with torch.no_grad():
        expected = model(**batch).logits.float().log_softmax(-1).flatten(0, 1)
    assert torch.equal(got[2], expected)
    assert not torch.allclose(got[1], expected, atol=0.1)


@pytest.mark.parametrize("ridge", [1e-4, 0.5])
def test_ridge_probes_are_sklearns_on_what_each_block_has_still_to_add(ridge: float) -> None:
    model, data = llama(), batches(8)
    probes = fit_probes(model, data, ProbeConfig(ridge=ridge))
    *earlier, last = gathered(model, data)
    for block, x in enumerate(earlier):
        scaler = StandardScaler().fit(x)
        reference = Ridge(alpha=ridge * len(x)).fit(scaler.transform(x), last - x)
        weight = reference.coef_ / scaler.scale_
        np.testing.assert_allclose(probes.translators[block].weight.detach(), weight, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            translated = probes.translate(block, x.float())
        expected = x.numpy() + reference.predict(scaler.transform(x))
        np.testing.assert_allclose(translated, expected, rtol=1e-4, atol=1e-4)
    assert len(probes.translators) == 2


def test_r2_is_the_share_of_variance_explained_of_what_is_to_come() -> None:
    model, data = llama(), batches(8)
    probes = fit_probes(model, data)
    *earlier, last = gathered(model, data)
    for block, x in enumerate(earlier):
        with torch.no_grad():
            missed = last - probes.translate(block, x.float()).double()
        expected = 1 - missed.var(0).sum() / (last - x).var(0).sum()
        assert probes.config.r2[block] == pytest.approx(float(expected), abs=1e-4)
    assert len(probes.config.r2) == 2


def test_a_trained_translator_predicts_the_last_block_better_than_none() -> None:
    model, data = llama(), batches(60)
    probes = fit_probes(model, data)
    held_out = batches(8, seed=1)
    *earlier, last = gathered(model, held_out)
    for block, x in enumerate(earlier):
        with torch.no_grad():
            missed = (last - probes.translate(block, x.float())).square().sum()
        assert missed < 0.8 * (last - x).square().sum()


@pytest.mark.parametrize("bos", [BOS, None])
def test_padding_and_bos_play_no_part(bos: int | None) -> None:
    """Without a BOS the first token is left out all the same: attention sinks into it."""
    model, data = llama(bos=bos), batches(6)
    assert any((batch["attention_mask"] == 0).any() for batch in data)
    first = fit_probes(model, data)
    for batch in data:
        batch["input_ids"][batch["attention_mask"] == 0] = 17
    assert_equal_probes(fit_probes(model, data), first, tolerance=0)
    *_, last = gathered(model, data)
    bias = first.offsets[0] + first.translators[0].weight @ gathered(model, data)[0].mean(0).float()
    torch.testing.assert_close(bias, (last - gathered(model, data)[0]).mean(0).float(), rtol=1e-4, atol=1e-4)


def assert_equal_probes(one: ProbeNet, other: ProbeNet, tolerance: float) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=tolerance, atol=tolerance)


def test_batch_split_and_padding_side_change_nothing() -> None:
    model, data = llama(), batches(4)
    whole = fit_probes(model, data)
    singles = [{name: field[r : r + 1] for name, field in batch.items()} for batch in data for r in range(3)]
    assert_equal_probes(fit_probes(model, singles), whole, tolerance=1e-4)
    left = []
    for one in singles:
        length = int(one["attention_mask"].sum())
        left.append({name: field.roll(field.shape[1] - length, 1) for name, field in one.items()})
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(singles, left, strict=True))
    assert_equal_probes(fit_probes(model, left), whole, tolerance=1e-3)
    assert_equal_probes(fit_probes(model, iter(data)), whole, tolerance=0)


@pytest.mark.parametrize("kind", ["logit", "ridge"])
def test_saved_probes_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    model, data = llama(), batches(5)
    probes = fit_probes(model, data, ProbeConfig(kind=kind, ridge=0.01))
    probes.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = ProbeNet.from_pretrained(tmp_path)
    assert_equal_probes(again, probes, tolerance=0)
    assert not again.training
    again.check(LanguageAnchor(model))
    assert torch.equal(log_probs(again, model, data[0]), log_probs(probes, model, data[0]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (again.config.kind, config["kind"], again.config.ridge) == (kind, kind, 0.01)
    assert (again.config.num_blocks, again.config.width) == (3, 8)
    assert config["anchor_fingerprint"] == again.config.anchor_fingerprint == LanguageAnchor(model).fingerprint
    assert config.get("r2") == again.config.r2 == probes.config.r2
    # A translator of each block but the last; the anchor's own norm and unembedding are not saved again.
    weights = load_file(tmp_path / "model.safetensors")
    translators = {f"translators.{block}.weight" for block in range(2)} if kind == "ridge" else set()
    assert weights.keys() == {"offsets"} | translators


def test_what_was_asked_for_is_left_as_it_was() -> None:
    asked = ProbeConfig(ridge=0.2)
    probes = fit_probes(llama(), batches(5), asked)
    assert asked.anchor_fingerprint is None and asked.r2 is None
    assert probes.config.ridge == 0.2 and probes.config.anchor_fingerprint


def test_probes_of_another_shape_are_refused() -> None:
    probes = fit_probes(llama(depth=3), [], ProbeConfig(kind="logit"))
    for other in (llama(depth=4), llama(width=16)):
        with pytest.raises(ValueError, match=r"got probes of 3 blocks 8 wide .* train probes for this anchor"):
            probes.check(LanguageAnchor(other))


def test_probes_of_other_weights_are_refused() -> None:
    probes = fit_probes(llama(seed=0), [], ProbeConfig(kind="logit"))
    probes.check(LanguageAnchor(llama(seed=0)))
    with pytest.raises(ValueError, match="other weights; expected the model they were trained on"):
        probes.check(LanguageAnchor(llama(seed=1)))
    tuned = llama(seed=0)
    with torch.no_grad():
        tuned.lm_head.weight[3, 4] += 0.5
    with pytest.raises(ValueError, match="other weights"):
        probes.check(LanguageAnchor(tuned))


def test_a_checkpoint_is_the_same_anchor_in_either_precision(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    half, full = (LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert LanguageAnchor(half).fingerprint == LanguageAnchor(full).fingerprint
    fit_probes(half, [], ProbeConfig(kind="logit")).check(LanguageAnchor(full))


def test_the_anchor_is_left_as_it_was() -> None:
    model, data = llama(), batches(3)
    model.config.attention_dropout = 0.5
    reference = fit_probes(model, data)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_equal_probes(fit_probes(model, data), reference, tolerance=0)  # dropout was off
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_anchor_that_fails_is_left_as_it_was() -> None:
    model = llama().train()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit_probes(model, batches(2))
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="got NaN or infinite hidden states"):
        fit_probes(model, batches(2))


def test_data_without_a_token_to_fit_to_is_refused() -> None:
    batch = {"input_ids": torch.full((2, 5), BOS), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    for data in ([], [batch]):
        with pytest.raises(ValueError, match="got no rows to fit; expected at least one token"):
            fit_probes(llama(), data)


@pytest.mark.parametrize("option", ["kind", "tuned_loss", "tuned_start"])
def test_unknown_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"got {option}='other'; expected one of"):
        ProbeConfig(**{option: "other"})


def test_tuned_probes_start_where_they_are_told() -> None:
    model, data = llama(), batches(4)
    ridge = fit_probes(model, data)
    assert_equal_probes(fit_probes(model, data, ProbeConfig(kind="tuned")), ridge, tolerance=0)
    zero = fit_probes(model, data, ProbeConfig(kind="tuned", tuned_start="zero"))
    assert len(zero.translators) == 2 and not any(p.any() for p in zero.parameters())
    lens = fit_probes(model, data, ProbeConfig(kind="logit"))
    torch.testing.assert_close(log_probs(zero, model, data[0]), log_probs(lens, model, data[0]))


def test_a_single_block_needs_no_translator() -> None:
    model, (batch,) = llama(depth=1), batches(1)
    probes = fit_probes(model, [batch])
    assert len(probes.translators) == 0 and probes.config.r2 == []
    with torch.no_grad():
        expected = model(**batch).logits.log_softmax(-1).flatten(0, 1)
    assert torch.equal(log_probs(probes, model, batch)[0], expected)


def test_log_probs_are_written_where_they_are_wanted() -> None:
    model, (batch,) = llama().to(torch.bfloat16), batches(1)
    probes = fit_probes(model, [], ProbeConfig(kind="logit"))
    hidden = torch.stack([h.flatten(0, 1) for h in block_outputs(model, batch)])
    room = torch.full((3, 50, 29), torch.nan)[:, : hidden.shape[1]]
    with torch.no_grad():
        got = probes.log_probs(hidden, LanguageAnchor(model), out=room)
    assert got is room and torch.equal(room, log_probs(probes, model, batch))
