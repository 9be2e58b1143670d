"""Scores of all stitches against a float64 loop over tokens and pairs, and against what they must not depend on."""

import copy
import json
import math
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from klas_hf.paths import Stitch
from klas_hf.probes import ProbeConfig, ProbeNet, fit_probes
from klas_hf.scores.driver import score_stitches
from klas_hf.scores.values import StitchScores
from klas_hf.selection.klas import select_stitches

BOS = 1
Batch = dict[str, Tensor]


def llama(depth: int, width: int, *, seed: int, vocabulary: int = 31) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        bos_token_id=BOS,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    return llama(3, 8, seed=1)


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return llama(4, 12, seed=2)


@pytest.fixture(scope="module")
def probes(source: LlamaForCausalLM, target: LlamaForCausalLM) -> tuple[ProbeNet, ProbeNet]:
    data = batches(12, seed=9)
    return fit_probes(source, data), fit_probes(target, data)


def batches(count: int, *, rows: int = 3, tokens: int = 10, seed: int = 0, vocabulary: int = 31) -> list[Batch]:
    """Right-padded batches of sequences of 4 to 10 tokens, the first of them BOS."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
        ids[:, 0] = BOS
        lengths = torch.randint(4, tokens + 1, (rows, 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()})
    return made


def single_sequences(data: list[Batch]) -> list[Batch]:
    rows = [(batch, row) for batch in data for row in range(len(batch["input_ids"]))]
    return [{name: field[row : row + 1] for name, field in batch.items()} for batch, row in rows]


@torch.no_grad()
def distributions(model: LlamaForCausalLM, probes: ProbeNet, sequence: Batch) -> list[list[Tensor]]:
    """For every block, the float64 log-probabilities of every counted token of one sequence."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in model.model.layers
    ]
    model(**sequence)
    for handle in handles:
        handle.remove()
    counts = sequence["attention_mask"].bool() & (sequence["input_ids"] != BOS)
    made = []
    for block, output in enumerate(outputs):
        hidden = output[counts].float()
        if block < len(outputs) - 1:
            weight = probes.translators[block].weight if len(probes.translators) else torch.zeros(hidden.shape[1], 1)
            hidden = hidden + (hidden @ weight.T if len(probes.translators) else 0) + probes.offsets[block]
        logits = model.lm_head(model.model.norm(hidden.to(model.dtype)))
        made.append(list(logits.double().log_softmax(-1)))
    return made


class Naive:
    """Alg. 2 as a loop: sums per sequence, then ratios of sums and their errors, one pair at a time."""

    def __init__(self, source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any, data: list[Batch]):
        m, n = source.config.num_hidden_layers, target.config.num_hidden_layers
        self.cross: list[np.ndarray] = []
        self.capacity: list[np.ndarray] = []
        self.tokens: list[int] = []
        for sequence in single_sequences(data):
            p, q = distributions(source, probes[0], sequence), distributions(target, probes[1], sequence)
            if not p[0]:
                continue
            cross, capacity = np.zeros((m, n)), np.zeros(n - 1)
            for t in range(len(p[0])):
                for i in range(m):
                    for j in range(n):
                        cross[i, j] += F.kl_div(q[j][t], p[i][t], reduction="sum", log_target=True).item()
                for j in range(n - 1):
                    capacity[j] += kl_divergence(Categorical(logits=q[j][t]), Categorical(logits=q[j + 1][t])).item()
            self.cross.append(cross)
            self.capacity.append(capacity)
            self.tokens.append(len(p[0]))

    @staticmethod
    def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> tuple[float, float]:
        a, b = list(numerators), list(denominators)
        value = sum(a) / sum(b)
        squares = sum((x - value * y) ** 2 for x, y in zip(a, b, strict=True))
        return value, math.sqrt(len(a) / (len(a) - 1) * squares) / sum(b)

    def check(self, got: StitchScores, rtol: float = 2e-4, atol: float = 2e-6) -> None:
        def same(measured: np.ndarray, error: np.ndarray, place: Any, expected: tuple[float, float]) -> None:
            assert measured[place] == pytest.approx(expected[0], rel=rtol, abs=atol)
            assert error[place] == pytest.approx(expected[1], rel=10 * rtol, abs=atol)

        m, n = self.cross[0].shape
        assert (got.cross.shape, got.capacity.shape, got.gamma.shape) == ((m, n), (n - 1,), (m, n - 1))
        for j in range(n):
            for i in range(m):
                theta = self.ratio((c[i, j] for c in self.cross), self.tokens)
                same(got.cross, got.cross_error, (i, j), theta)
                if j < n - 1:
                    gamma = self.ratio((c[i, j] for c in self.cross), (c[j] for c in self.capacity))
                    same(got.gamma, got.gamma_error, (i, j), gamma)
            if j < n - 1:
                same(got.capacity, got.capacity_error, j, self.ratio((c[j] for c in self.capacity), self.tokens))
        assert (got.sequences, got.tokens) == (len(self.tokens), sum(self.tokens))


def assert_same(one: StitchScores, other: StitchScores, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for name in ("cross", "capacity", "cross_error", "capacity_error", "gamma", "gamma_error"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=rtol, atol=atol, err_msg=name)
    assert (one.sequences, one.tokens) == (other.sequences, other.tokens)


@pytest.mark.parametrize("kind", ["ridge", "logit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_naive_loop(kind: str, dtype: torch.dtype) -> None:
    anchors = llama(3, 8, seed=1).to(dtype), llama(4, 12, seed=2).to(dtype)
    fitted = tuple(fit_probes(anchor, batches(12, seed=9), ProbeConfig(kind=kind)) for anchor in anchors)
    data = batches(3)
    got = score_stitches(*anchors, data, probes=fitted, score="klas")
    # In bf16 a matrix product over several rows may round otherwise than one over a single sequence.
    Naive(*anchors, fitted, data).check(got, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 1000])
def test_the_workspace_changes_nothing(
    source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any, chunk_tokens: int
) -> None:
    """Chunks end inside sequences, and hold the end of one and the start of the next."""
    data, vocabulary_bytes = batches(3), 4 * 31
    blocks = 3 + 4 + 2 * (4 + 1)  # the distributions of both anchors, and scratch
    got = score_stitches(
        source, target, data, probes=probes, workspace_bytes=chunk_tokens * vocabulary_bytes * blocks + 1, score="klas"
    )
    assert_same(got, score_stitches(source, target, data, probes=probes, score="klas"))


@pytest.mark.parametrize("form", ["sequences", "one batch", "left padding", "more padding", "iterator", "plain ids"])
def test_batch_split_padding_and_form_change_nothing(
    source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any, form: str
) -> None:
    data = batches(3)
    if form == "plain ids":
        data = [{"input_ids": batch["input_ids"]} for batch in data]
    expected = score_stitches(source, target, data, probes=probes, score="klas")
    changed: Any = data
    if form == "sequences":
        changed = single_sequences(data)
    elif form == "one batch":
        changed = [{name: torch.cat([batch[name] for batch in data]) for name in data[0]}]
    elif form == "left padding":
        changed = []
        for one in single_sequences(data):
            shift = int((one["attention_mask"] == 0).sum())
            changed.append({name: field.roll(shift, 1) for name, field in one.items()})
    elif form == "more padding":
        changed = [{name: F.pad(field, (0, 5)) for name, field in batch.items()} for batch in data]
        changed[0]["input_ids"][:, -1] = 7
    elif form == "iterator":
        changed = iter(data)
    else:
        changed = [batch["input_ids"] for batch in data]
    assert_same(score_stitches(source, target, changed, probes=probes, score="klas"), expected, rtol=1e-3, atol=2e-6)


def test_sequences_without_a_counted_token_do_not_count(
    source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any
) -> None:
    data = batches(2)
    empty = {"input_ids": torch.full((2, 10), 5), "attention_mask": torch.zeros(2, 10, dtype=torch.long)}
    empty["attention_mask"][1, 0] = 1  # one token: the first, which never counts
    mixed = {name: torch.cat([data[0][name], empty[name]]) for name in empty}
    got = score_stitches(source, target, [empty, mixed, data[1]], probes=probes, score="klas")
    assert_same(got, score_stitches(source, target, data, probes=probes, score="klas"))
    assert got.sequences == 6


def test_one_sequence_has_scores_but_no_errors(source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any) -> None:
    got = score_stitches(source, target, single_sequences(batches(1))[:1], probes=probes, score="klas")
    assert got.sequences == 1 and np.isfinite(got.cross).all() and np.isfinite(got.gamma).all()
    for error in (got.cross_error, got.capacity_error, got.gamma_error, *got.interval("gamma")):
        assert np.isnan(error).all()


def test_an_anchor_scored_against_its_own_blocks(target: LlamaForCausalLM, probes: Any) -> None:
    twin = copy.deepcopy(target)
    with torch.no_grad():
        twin.model.embed_tokens.weight[0] += 1  # a token that no batch has: the same function, of other weights
    data = batches(12, seed=9)
    got = score_stitches(twin, target, batches(3), probes=(fit_probes(twin, data), probes[1]), score="klas")
    assert (got.cross >= 0).all() and got.cross.diagonal().max() < 1e-6
    np.testing.assert_allclose(got.cross.diagonal(1), got.capacity, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.gamma.diagonal(1), got.capacity[:-1] / got.capacity[1:], rtol=1e-4)
    for j in range(3):
        assert got.gamma[:, j].argmin() == j and got.gamma[j, j] < 1e-4 < got.gamma[j + 1, j]


def test_a_target_block_without_capacity_is_undefined_not_best() -> None:
    """A block that adds nothing: Θ / 0, which rounding must not turn into a large negative score."""
    source, target = llama(3, 8, seed=1), llama(4, 12, seed=2)
    with torch.no_grad():
        target.model.layers[2].self_attn.o_proj.weight.zero_()
        target.model.layers[2].mlp.down_proj.weight.zero_()
    lens = tuple(fit_probes(anchor, [], ProbeConfig(kind="logit")) for anchor in (source, target))
    got = score_stitches(source, target, batches(3), probes=lens, score="klas")
    assert got.capacity[1] == 0 and (got.capacity[[0, 2]] > 0).all()
    assert not np.isfinite(got.gamma[:, 1]).any() and (got.gamma[:, [0, 2]] > 0).all()
    assert all(stitch.target_start != 2 for stitch in (*got.stitches, *select_stitches(got, threshold=1e9)))
    got.plot()


def test_without_probes_they_are_fitted_to_the_first_half_alone(
    source: LlamaForCausalLM, target: LlamaForCausalLM
) -> None:
    data = batches(7)
    fitted = fit_probes(source, data[:3]), fit_probes(target, data[:3])
    got = score_stitches(source, target, iter(data), score="klas")
    assert_same(got, score_stitches(source, target, data[3:], probes=fitted, score="klas"), rtol=1e-9, atol=0)
    assert got.provenance["source"]["probes"]["kind"] == got.provenance["target"]["probes"]["kind"] == "ridge"


def test_the_score_ranks_and_changes_no_statistic(
    source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any
) -> None:
    klas, theta = (score_stitches(source, target, batches(2), probes=probes, score=name) for name in ("klas", "theta"))
    assert_same(klas, theta, rtol=0, atol=0)
    np.testing.assert_array_equal(klas.values[:, 1:], klas.gamma)
    np.testing.assert_array_equal(theta.values[:, 1:], theta.cross[:, :-1])
    assert klas.score == "klas" and theta.score == "theta"
    assert score_stitches(source, target, batches(2), probes=probes, score="klas").score == "klas"


def test_scores_carry_costs_and_provenance(
    source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any, tmp_path: Path
) -> None:
    got = score_stitches(source, target, batches(2), probes=probes, tokens=5, score="klas")
    assert got.costs.tokens == 5 and len(got.stitches) == 3 * 3
    assert score_stitches(source, target, batches(2), probes=probes, score="klas").costs.tokens == 128
    assert got.costs.of(Stitch(1, 3)) < got.costs.of(Stitch(3, 1))
    assert json.loads(json.dumps(got.provenance)) == got.provenance
    for side, probe in zip(("source", "target"), probes, strict=True):
        assert got.provenance[side]["fingerprint"] == probe.config.anchor_fingerprint
    assert torch.__version__.startswith(got.provenance["versions"]["torch"])
    assert_same(StitchScores.load(got.save(tmp_path / "scores.safetensors")), got, rtol=0, atol=0)


def test_anchors_are_left_as_they_were(probes: Any) -> None:
    anchors = llama(3, 8, seed=1), llama(4, 12, seed=2)
    anchors[0].train()
    score_stitches(*anchors, batches(2), probes=probes, score="klas")
    assert anchors[0].training and not anchors[1].training
    assert not any(module._forward_hooks for anchor in anchors for module in anchor.modules())


def test_folders_are_loaded(tmp_path: Path, source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any) -> None:
    source.save_pretrained(tmp_path / "small")
    target.save_pretrained(tmp_path / "large")
    got = score_stitches(str(tmp_path / "small"), tmp_path / "large", batches(2), probes=probes, score="klas")
    assert_same(got, score_stitches(source, target, batches(2), probes=probes, score="klas"), rtol=1e-5)
    assert got.provenance["target"]["name"] == str(tmp_path / "large")


def test_an_unknown_score_is_refused_before_anything_is_loaded(
    source: LlamaForCausalLM, target: LlamaForCausalLM
) -> None:
    with pytest.raises(ValueError, match="got score='best'; expected one of"):
        score_stitches("no such folder", "nor this", [], score="best")
    with pytest.raises(ValueError, match=r"got score='cka'; expected one of .* it needs \['cka'\]"):
        score_stitches(source, target, [], score="cka")  # known, but of images


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_batches_to_halve_are_refused(source: LlamaForCausalLM, target: LlamaForCausalLM, count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count} batches; expected at least two"):
        score_stitches(source, target, batches(count), score="klas")


def test_data_without_a_token_is_refused(source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any) -> None:
    padding = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    for data in ([], [padding, padding]):
        with pytest.raises(ValueError, match="got no token that is neither padding nor BOS"):
            score_stitches(source, target, data, probes=probes, score="klas")


def test_reversed_anchors_are_refused(source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any) -> None:
    with pytest.raises(ValueError, match="reversed.*Swap source and target"):
        score_stitches(target, source, batches(2), probes=probes[::-1], score="klas")


def test_unequal_vocabularies_are_refused(source: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="got vocabularies of 31 and 37 entries"):
        score_stitches(source, llama(4, 12, seed=2, vocabulary=37), batches(2), score="klas")


def test_probes_of_another_model_are_refused(source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any) -> None:
    with pytest.raises(ValueError, match="got probes of 4 blocks 12 wide"):
        score_stitches(source, target, batches(2), probes=probes[::-1], score="klas")
    with pytest.raises(ValueError, match="other weights"):
        score_stitches(source, llama(4, 12, seed=3), batches(2), probes=probes, score="klas")


def test_weights_that_are_not_finite_are_refused() -> None:
    source, target = llama(3, 8, seed=1), llama(4, 12, seed=2)
    with torch.no_grad():
        target.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    lens = tuple(fit_probes(anchor, [], ProbeConfig(kind="logit")) for anchor in (source, target))
    with pytest.raises(ValueError, match="got probe distributions with NaN or infinite divergences"):
        score_stitches(source, target, batches(2), probes=lens, score="klas")


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and nobody has let go of; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in given | self._seen:
                    self._seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(*anchors: LlamaForCausalLM, data: Iterator[Batch], probes: Any, workspace: int) -> int:
    with LiveBytes() as memory:
        score_stitches(*anchors, data, probes=probes, workspace_bytes=workspace, score="klas")
    return memory.peak


def test_the_count_of_bytes_counts() -> None:
    with LiveBytes() as memory:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500)
        _ = kept + 1
        del kept, _
        torch.zeros(100)
    assert memory.peak == 8000 and memory.live <= 400


def test_memory_does_not_grow_with_the_data(source: LlamaForCausalLM, target: LlamaForCausalLM, probes: Any) -> None:
    peaks = [
        peak_bytes(source, target, data=iter(batches(1) * count), probes=probes, workspace=20_000) for count in (2, 8)
    ]
    assert peaks[1] <= 1.02 * peaks[0]


def test_a_vocabulary_of_128256_fits_the_workspace() -> None:
    source, target = (llama(depth, 4, seed=depth, vocabulary=128_256) for depth in (2, 3))
    lens = tuple(fit_probes(anchor, [], ProbeConfig(kind="logit")) for anchor in (source, target))
    (large,) = batches(1, rows=2, tokens=7, vocabulary=128_256)
    data = [{name: field[:1, :3] for name, field in large.items()}, large]  # the first needs less than a whole chunk
    workspace = 3 * (4 * 128_256 * (2 + 3 + 3 + 1))  # three tokens at a time
    peak = peak_bytes(source, target, data=iter(data), probes=lens, workspace=workspace)
    assert 0.9 * workspace < peak < 1.05 * workspace
    got = score_stitches(source, target, data, probes=lens, workspace_bytes=workspace, score="klas")
    Naive(source, target, lens, data).check(got)
