"""Paths through anchors: what is read, how the stitching layers start, and what bad input is told."""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from tiny_models import (
    BOS,
    FAMILIES,
    PAD,
    block_list,
    left_padded,
    save_with_tokenizer,
    tiny_config,
    tiny_model,
    token_ids,
)
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from klas_hf import Stitch, StitchedForCausalLM, StitchedModel
from klas_hf.anchors import load_anchor
from klas_hf.anchors.checkpoints import AnchorCheckpoint
from klas_hf.anchors.fitting import write_fit
from klas_hf.maths.least_squares import LinearFit
from klas_hf.paths import Path as AnchorPath
from klas_hf.stitching.assembly import logger

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    return model(**(inputs or {"input_ids": token_ids(2, 9)})).logits


def calibration_batches() -> list[Any]:
    """Padded on either side or not at all, with BOS at the start, within or nowhere: 120 tokens count."""
    left = left_padded(token_ids(4, 16, seed=1), [16, 5, 11, 2])
    right = {name: tensor.flip(1) for name, tensor in left_padded(token_ids(4, 16, seed=2), [16, 9, 3, 7]).items()}
    right["input_ids"][:, 0] = BOS
    plain = token_ids(4, 16, seed=3)
    plain[1, 7] = BOS
    return [left, right, plain]


# ---- an anchor cut and joined to itself


@pytest.mark.parametrize("family", FAMILIES)
def test_an_anchor_joined_to_itself_by_identities_is_the_anchor(family: str) -> None:
    anchor = tiny_model(family, large=True, seed=1)
    inputs = left_padded(token_ids(3, 12), [12, 7, 10])
    real = inputs["attention_mask"].bool()
    expected = logits(anchor, **inputs)[real]
    for path in ["0[:1] 0[1:]", "0[:2] 0[2:3] 0[3:]", "0[:1] 0[1:3] 0[3:4] 0[4:]", "0[:3] 0[3:5] 0[5:]", "0[:]"]:
        model = StitchedModel.from_path([anchor], path)
        with torch.no_grad():
            for layer in model.stitching_layers():
                layer.weight.copy_(torch.eye(48))
                layer.bias.zero_()
        assert torch.equal(logits(model, **inputs)[real], expected), path
    ids = inputs["input_ids"][:1]
    greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(model.generate(ids, **greedy), anchor.generate(ids, **greedy))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_calibrated_self_stitch_is_the_anchor(family: str) -> None:
    anchor = tiny_model(family, large=True, seed=1).double()
    for path in ("0[:1] 0[1:]", "0[:1] 0[1:4] 0[4:]"):
        model = StitchedModel.from_path([anchor], path, calibration=[token_ids(16, 16)])
        for layer, fit in zip(model.stitching_layers(), model.config.joint_fits, strict=True):
            torch.testing.assert_close(layer.weight.data, torch.eye(48).double(), rtol=0, atol=1e-6)
            assert fit["r2"] == pytest.approx(1.0)
            assert fit["ridge"] == 0.0
        torch.testing.assert_close(logits(model), logits(anchor), rtol=1e-5, atol=1e-5)


# ---- least squares


def hidden_rows(anchor: PreTrainedModel, depth: int, batches: list[Any]) -> np.ndarray:
    """`(rows, width)` outputs of block `depth` (0: the embeddings) at the tokens that count, by a hook."""
    return rows_of(anchor, block_list(anchor)[depth - 1] if depth else anchor.get_input_embeddings(), batches)


@torch.no_grad()
def rows_of(model: PreTrainedModel, module: nn.Module, batches: list[Any], entering: bool = False) -> np.ndarray:
    """`(rows, width)` outputs of a module, or its inputs, at the tokens that count, by a hook."""
    rows: list[np.ndarray] = []
    for batch in batches:
        fields = batch if isinstance(batch, dict) else {"input_ids": batch}
        ids, mask = fields["input_ids"], fields.get("attention_mask", torch.ones_like(fields["input_ids"]))
        kept: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda _, args, output, kept=kept: kept.append(args[0] if entering else output)
        )
        model(ids, attention_mask=mask)
        handle.remove()
        output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        for row in range(len(ids)):
            present = [place for place in range(ids.shape[1]) if mask[row, place]][1:]  # the first token is a sink
            present = [place for place in present if ids[row, place] != BOS]
            rows += [output[row, place].double().numpy() for place in present]
    return np.stack(rows)


@pytest.mark.parametrize(
    ("source_family", "target_family", "stitch"),
    [("llama", "llama", (2, 3)), ("gemma2", "gpt_neox", (3, 1)), ("phi", "gemma3_text", (1, 0))],
)
def test_calibration_is_least_squares_between_the_hidden_states_of_the_whole_anchors(
    source_family: str, target_family: str, stitch: tuple[int, int]
) -> None:
    source, target = tiny_model(source_family, seed=1), tiny_model(target_family, large=True, seed=2)
    batches = calibration_batches()
    x, y = hidden_rows(source, stitch[0], batches), hidden_rows(target, stitch[1], batches)
    assert len(x) == 120
    design = np.column_stack([x, np.ones(len(x))])
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    r2 = 1 - ((y - design @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()

    model = StitchedModel.from_anchors(source, target, Stitch(*stitch), calibration=iter(batches))
    layer = model.stitching_layers()[0]
    np.testing.assert_allclose(layer.weight.detach(), solution[:-1].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.bias.detach(), solution[-1], rtol=1e-4, atol=1e-5)
    assert model.config.joint_fits == [{"r2": pytest.approx(r2, abs=1e-6), "ridge": 0.0, "rows": 120}]
    assert 0 < r2 < 1


@pytest.mark.parametrize("path", ["0[:2] 1[2:3] 1[4:]", "1[:1] 0[1:2] 1[3:]", "1[:4] 1[2:3] 1[5:]"])
@pytest.mark.parametrize("families", [("llama", "llama"), ("gemma2", "gpt_neox")])
def test_each_joint_is_fitted_on_what_the_path_before_it_gives(path: str, families: tuple[str, str]) -> None:
    """numpy's least squares, from what enters each joint of the finished path to what its next anchor has there."""
    anchors = [tiny_model(families[0], seed=1), tiny_model(families[1], large=True, seed=2)]
    batches = [*calibration_batches(), token_ids(8, 16, seed=5)]
    model = StitchedModel.from_path(anchors, path, calibration=iter(batches))
    assert len(model.config.joint_fits) == 2
    for layer, fed, fit in zip(
        model.stitching_layers(), AnchorPath.parse(path).slices[1:], model.config.joint_fits, strict=True
    ):
        x, y = rows_of(model, layer, batches, entering=True), hidden_rows(anchors[fed.anchor], fed.start, batches)
        design = np.column_stack([x, np.ones(len(x))])
        solution, *_ = np.linalg.lstsq(design, y, rcond=None)
        r2 = 1 - ((y - design @ solution) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        np.testing.assert_allclose(layer.weight.detach(), solution[:-1].T, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(layer.bias.detach(), solution[-1], rtol=2e-3, atol=2e-4)
        assert fit == {"r2": pytest.approx(r2, abs=1e-5), "ridge": 0.0, "rows": len(x)}


def test_calibration_from_folders_equals_calibration_from_models(tmp_path: Path) -> None:
    source, target = tiny_model("qwen2", seed=1), tiny_model("gemma2", large=True, seed=2)
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    anchors = [(source, target), (tmp_path / "source", str(tmp_path / "target"))]
    one, other = (StitchedModel.from_anchors(*pair, (2, 2), calibration=calibration_batches()) for pair in anchors)
    assert torch.equal(logits(one), logits(other))


def test_anchors_in_train_mode_are_calibrated_without_dropout_and_left_as_they_were() -> None:
    source = tiny_model("phi", seed=1, attention_dropout=0.5, resid_pdrop=0.5)
    target = tiny_model("llama", large=True, seed=2, attention_dropout=0.5)
    expected = StitchedModel.from_anchors(source, target, (2, 2), calibration=calibration_batches())
    source.train()
    target.train()
    block_list(target)[1].eval()
    before = [module.training for anchor in (source, target) for module in anchor.modules()]
    model = StitchedModel.from_anchors(source, target, (2, 2), calibration=calibration_batches())
    assert [module.training for anchor in (source, target) for module in anchor.modules()] == before
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.stitching_layers()[0].weight, expected.stitching_layers()[0].weight)


def test_a_ridge_asked_for_is_used_and_recorded() -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    plain, ridged = (
        StitchedModel.from_anchors(source, target, (2, 2), calibration=calibration_batches(), ridge=ridge)
        for ridge in (None, 0.5)
    )
    assert ridged.config.joint_fits[0]["ridge"] == 0.5
    assert ridged.config.joint_fits[0]["r2"] < plain.config.joint_fits[0]["r2"]
    assert ridged.stitching_layers()[0].weight.norm() < plain.stitching_layers()[0].weight.norm()


def test_fewer_tokens_than_the_source_is_wide_warn_and_take_a_ridge_that_is_recorded(tmp_path: Path) -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    with pytest.warns(UserWarning, match="7 rows do not determine a linear map of 16 features.*ridge"):
        model = StitchedModel.from_anchors(source, target, (2, 2), calibration=[token_ids(1, 8)])
    assert model.stitching_layers()[0].weight.isfinite().all()
    model.save_pretrained(tmp_path)
    fit = json.loads((tmp_path / "config.json").read_text())["joint_fits"][0]
    assert fit["rows"] == 7
    assert fit["ridge"] > 0
    assert fit["r2"] == pytest.approx(1.0, abs=1e-3)


def test_without_calibration_the_layer_is_random_and_says_so() -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    with pytest.warns(UserWarning, match="random.*calibration=") as caught:
        models = [StitchedModel.from_anchors(source, target, (2, 2)) for _ in range(2)]
    assert caught[0].filename == __file__
    weights = [model.stitching_layers()[0].weight for model in models]
    assert not torch.equal(*weights)
    assert models[0].config.joint_fits is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StitchedModel.from_anchors(source, target, (2, 2), calibration=[token_ids(8, 16)])


# ---- only what is used is read


def used(name: str, stitch: tuple[int, int], *, source: bool, tied: bool) -> bool:
    """Whether a stitched model holds this tensor of a llama's checkpoint."""
    if block := re.match(r"model\.layers\.(\d+)\.", name):
        return int(block[1]) < stitch[0] if source else int(block[1]) >= stitch[1]
    if name == "model.embed_tokens.weight":
        return source or tied
    return not source


@pytest.mark.parametrize("tied", [True, False])
def test_only_tensors_that_are_used_are_read_each_once(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []
    tensor = AnchorCheckpoint.tensor

    def counted(self: AnchorCheckpoint, key: str) -> Any:
        read.append((Path(self.name or "").name, key))
        return tensor(self, key)

    monkeypatch.setattr(AnchorCheckpoint, "tensor", counted)
    keys: dict[str, set[str]] = {}
    for side in ("source", "target"):
        anchor = tiny_model(large=side == "target", tie_word_embeddings=tied)
        anchor.save_pretrained(tmp_path / side)
        keys[side] = {key for key in anchor.state_dict() if not (tied and key == "lm_head.weight")}
    StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", (2, 3))
    expected = [
        (side, key) for side in keys for key in keys[side] if used(key, (2, 3), source=side == "source", tied=tied)
    ]
    assert sorted(read) == sorted(expected)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_that_hold_only_unused_tensors_are_not_needed(tied: bool, tmp_path: Path) -> None:
    for side in ("source", "target"):
        anchor = tiny_model(large=side == "target", seed=len(side), tie_word_embeddings=tied)
        anchor.save_pretrained(tmp_path / side, max_shard_size=100)
    whole = StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", (2, 3))
    missing = 0
    for side in ("source", "target"):
        shards = json.loads((tmp_path / side / "model.safetensors.index.json").read_text())["weight_map"]
        for key, shard in shards.items():
            if not used(key, (2, 3), source=side == "source", tied=tied):
                (tmp_path / side / shard).unlink()
                missing += 1
    assert missing > 9 + 3 * 9
    model = StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", (2, 3))
    model.stitching_layers()[0].load_state_dict(whole.stitching_layers()[0].state_dict())
    assert torch.equal(logits(model), logits(whole))
    with pytest.raises(OSError, match="target.*safetensors"):  # calibration runs the target's first blocks
        StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", (2, 3), calibration=calibration_batches())


def test_config_records_where_the_anchors_came_from(tmp_path: Path) -> None:
    source, target = tiny_model(seed=1), tiny_model(large=True, seed=2)
    source.save_pretrained(tmp_path / "source")
    target.save_pretrained(tmp_path / "target")
    config = StitchedModel.from_anchors(tmp_path / "source", tmp_path / "target", (2, 3)).config
    assert config.anchor_names == [str(tmp_path / "source"), str(tmp_path / "target")]
    assert (config.path, config.slices, config.anchor_blocks) == ("0[:2] 1[3:]", [[0, 0, 2], [1, 3, 5]], [3, 5])
    assert config.name_or_path == ""
    source.config._commit_hash = "1" * 40  # as of a model loaded from the Hub
    config = StitchedModel.from_anchors(source, target, (2, 3)).config
    assert config.anchor_names == [None, None]
    assert config.anchor_revisions == ["1" * 40, None]


def test_anchors_that_a_path_does_not_use_are_not_read(tmp_path: Path) -> None:
    for name in ("small", "middle", "large"):
        tiny_model(large=name == "large", seed=len(name)).save_pretrained(tmp_path / name)
    shutil.rmtree(tmp_path / "middle")
    folders = [tmp_path / name for name in ("small", "middle", "large")]
    config = StitchedModel.from_path(folders, "2[:1] 0[1:2] 2[4:]").config
    assert config.anchor_names == [str(folders[0]), None, str(folders[2])]
    assert config.slices == [[2, 0, 1], [0, 1, 2], [2, 4, 5]]


# ---- places and dtypes


PLACES: dict[str, dict[str, Any]] = {
    "a joint on the disk": {"model.slices": "cpu", "model.joints.0": "disk", "model.joints.1": "cpu", "lm_head": "cpu"},
    "slices on the disk": {
        "model.slices.0": "disk", "model.slices.1": "disk", "model.slices.2": "cpu", "model.joints": "cpu",
        "lm_head": "cpu",
    },
    "all but the head": {"model": "disk", "lm_head": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("places", PLACES)
def test_a_fit_is_kept_wherever_the_path_lies(places: str, tmp_path: Path) -> None:
    anchors = [tiny_model(seed=1), tiny_model("gemma2", large=True, seed=2)]
    path, batches = "0[:2] 1[2:3] 1[4:]", [token_ids(16, 16)]
    plain = StitchedModel.from_path(anchors, path, calibration=batches)
    offloaded = StitchedModel.from_path(
        anchors, path, calibration=batches, device_map=PLACES[places], offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert offloaded.config.joint_fits == plain.config.joint_fits
    assert torch.equal(logits(offloaded), logits(plain))
    offloaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(StitchedModel.from_pretrained(tmp_path / "saved")), logits(plain))


def test_a_fit_is_written_to_a_joint_that_accelerate_keeps_in_memory() -> None:
    """As `device_map` does for what has no room on the device: its parameters are copied there when it runs."""
    joint = nn.Linear(2, 3).to(torch.bfloat16)
    weights = OffloadedWeightsLoader(state_dict=joint.state_dict())
    attach_align_device_hook(joint, torch.device("cpu"), offload=True, weights_map=weights)
    assert joint.weight.is_meta
    weight = torch.randn(3, 2)
    write_fit(joint, LinearFit(weight, torch.zeros(3), r2=1.0, ridge=0.0, rows=9))
    with torch.no_grad():
        torch.testing.assert_close(joint(torch.eye(2).bfloat16()), weight.T.bfloat16(), rtol=0, atol=0)


def test_torch_dtype_is_dtype_with_transformers_own_warning(caplog: pytest.LogCaptureFixture) -> None:
    transformers_logger = logging.getLogger("transformers")
    logger.warning_once.cache_clear()
    transformers_logger.addHandler(caplog.handler)
    try:
        model = StitchedModel.from_anchors(tiny_model(), tiny_model(large=True), (2, 2), torch_dtype=torch.bfloat16)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "`torch_dtype` is deprecated! Use `dtype` instead!" in caplog.text


# ---- bad input is refused before any long work


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model was loaded before the input was checked")

    monkeypatch.setattr(StitchedForCausalLM, "from_pretrained", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("stitch", "error", "message"),
    [
        (
            (4, 0),
            ValueError,
            r"0\[:4\] 1\[:\], out of range: 0\[:4\] of an anchor of 3 blocks; expected bounds",
        ),
        ((3, 6), ValueError, r"1\[6:\] of an anchor of 5 blocks"),
        ("0[:1] 1[2:6] 1[3:]", ValueError, r"1\[2:6\] of an anchor of 5 blocks"),
        ("0[:1] 2[3:]", ValueError, "positions from 0 to 1"),
        ("0[1:] 1[3:]", ValueError, "starts with the first block"),
        ((0, 1), ValueError, "source_stop >= 1"),
        ((1, -1), ValueError, "target_start >= 0"),
        ((1, 2, 3), TypeError, r"\(1, 2, 3\).*expected Stitch\(i, j\) or a pair"),
    ],
)
def test_stitch_out_of_range(stitch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StitchedModel.from_anchors(tiny_model(), tiny_model(large=True), stitch)


@pytest.mark.usefixtures("no_loading")
def test_reversed_anchors() -> None:
    with pytest.raises(ValueError, match="larger than the target.*reversed.*Swap source and target"):
        StitchedModel.from_anchors(tiny_model(large=True), tiny_model(), (2, 1))


@pytest.mark.usefixtures("no_loading")
def test_vocabularies_of_one_size_that_name_tokens_differently(tmp_path: Path) -> None:
    source = save_with_tokenizer(tiny_model(), tmp_path / "source", ["pad", "bos", "eos", "cat", "dog"])
    target = save_with_tokenizer(tiny_model(large=True), tmp_path / "target", ["pad", "bos", "eos", "dog", "cat"])
    with pytest.raises(ValueError, match=r"differ in 2 tokens \(such as \['cat', 'dog'\]\).*share a tokenizer"):
        StitchedModel.from_anchors(source, target, (2, 1))
    loaded = load_anchor(source).model, load_anchor(target).model
    with pytest.raises(ValueError, match="differ in 2 tokens"):
        StitchedModel.from_anchors(*loaded, (2, 1))


@pytest.mark.usefixtures("no_loading")
def test_vocabularies_of_two_sizes() -> None:
    with pytest.raises(ValueError, match="vocabularies of 60 and 67 entries.*resize_token_embeddings"):
        StitchedModel.from_anchors(tiny_model(vocab_size=60), tiny_model(large=True), (2, 1))


def test_anchors_that_share_a_tokenizer_are_stitched(tmp_path: Path) -> None:
    words = ["pad", "bos", "eos"]
    source = save_with_tokenizer(tiny_model(), tmp_path / "source", words)
    target = save_with_tokenizer(tiny_model(large=True), tmp_path / "target", words)
    assert StitchedModel.from_anchors(source, target, (2, 1)).config.vocab_size == 67


def test_folders_without_a_tokenizer_are_compared_by_size(tmp_path: Path) -> None:
    """AutoTokenizer makes up an empty tokenizer for such a folder of some families."""
    for family in ("gemma2", "qwen3"):
        tiny_model(family, large=family == "qwen3").save_pretrained(tmp_path / family)
    assert StitchedModel.from_anchors(tmp_path / "gemma2", tmp_path / "qwen3", (2, 1)).config.vocab_size == 67


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "unknown type 'bert'; expected one of .*'llama'.*'qwen3'"),
        (GPT2Config(), "'gpt2', which adds position embeddings.*rotary.*'llama'"),
        ({"model_type": "klingon"}, "klingon(.|\n)*one of .*'llama'.*'qwen3'"),
    ],
)
def test_unknown_families_are_told_the_known_ones(side: str, config: Any, message: str, tmp_path: Path) -> None:
    """The folder holds no weights: the family is checked first."""
    if isinstance(config, dict):
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        config.save_pretrained(tmp_path)
    anchors = {"source": tiny_model(), "target": tiny_model(large=True)} | {side: tmp_path}
    with pytest.raises(ValueError, match=message):
        StitchedModel.from_anchors(anchors["source"], anchors["target"], (2, 1))
    with pytest.raises(ValueError, match=message):
        load_anchor(tmp_path)


@pytest.mark.usefixtures("no_loading")
def test_gpt2_in_memory() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match="'gpt2', which adds position embeddings"):
        StitchedModel.from_anchors(gpt2, tiny_model(large=True), (1, 1))


def padding_only() -> Iterator[dict[str, Tensor]]:
    for _ in range(3):
        yield {"input_ids": torch.full((2, 8), PAD), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (list, ValueError, "without a token that is neither padding nor BOS.*iterator was not used up"),
        (padding_only, ValueError, "without a token that is neither padding nor BOS"),
        (lambda: [torch.full((2, 8), BOS)], ValueError, "neither padding nor BOS"),
        (lambda: ["text"], TypeError, "batch of type str.*'input_ids'"),
        (lambda: [{"ids": token_ids(2, 8)}], ValueError, r"fields \['ids'\].*'input_ids'"),
        (lambda: [token_ids(8)], ValueError, r"shape \(8,\).*\(batch, tokens\)"),
    ],
)
def test_calibration_without_usable_tokens(
    calibration: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StitchedModel.from_anchors(tiny_model(), tiny_model(large=True), (2, 1), calibration=calibration())


@pytest.mark.parametrize("side", ["source", "target"])
def test_nan_weights_stop_the_calibration(side: str) -> None:
    anchors = {"source": tiny_model(), "target": tiny_model(large=True)}
    with torch.no_grad():
        next(block_list(anchors[side])[0].parameters())[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite hidden states.*check their weights"):
        StitchedModel.from_anchors(*anchors.values(), (2, 1), calibration=calibration_batches())


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no/such/folder"])
def test_an_anchor_that_cannot_be_reached_is_named(side: str, name: str) -> None:
    anchors = {"source": tiny_model(), "target": tiny_model(large=True)} | {side: name}
    with pytest.raises(OSError, match=rf"could not load the anchor '{name}'(.|\n)*Pass the path of a local folder"):
        StitchedModel.from_anchors(anchors["source"], anchors["target"], (2, 1))


@pytest.mark.usefixtures("no_loading")
def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    target = tiny_model(large=True)
    target.config.save_pretrained(tmp_path)
    torch.save(target.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="only safetensors weights are read, never pickled ones"):
        StitchedModel.from_anchors(tiny_model(), tmp_path, (2, 1))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_checkpoint_saved_without_its_head(side: str, tmp_path: Path) -> None:
    anchors: dict[str, Any] = {"source": tiny_model(), "target": tiny_model(large=True, tie_word_embeddings=False)}
    headless = anchors[side].model
    headless.save_pretrained(tmp_path)
    for anchor in (tmp_path, headless):
        anchors[side] = anchor
        with pytest.raises(ValueError, match="without the weights of its head.*AutoModelForCausalLM"):
            StitchedModel.from_anchors(anchors["source"], anchors["target"], (2, 1))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_truncated_file_is_named(shard_size: str, tmp_path: Path) -> None:
    tiny_model(large=True).save_pretrained(tmp_path, max_shard_size=shard_size)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"model.*\.safetensors is damaged.*Download or save it again"):
        StitchedModel.from_anchors(tiny_model(), tmp_path, (2, 1))


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_checkpoint_that_lacks_tensors_names_them(side: str, tmp_path: Path) -> None:
    anchors: dict[str, Any] = {"source": tiny_model(), "target": tiny_model(large=True)}
    state = anchors[side].state_dict()
    lacking = {"source": "layers.1.mlp.up_proj.weight", "target": "layers.4.mlp.up_proj.weight"}[side]
    anchors[side].save_pretrained(
        tmp_path, state_dict={name: tensor for name, tensor in state.items() if not name.endswith(lacking)}
    )
    anchors[side] = tmp_path
    renumbered, number = lacking.replace("4", "3"), ["source", "target"].index(side)
    with pytest.raises(
        ValueError, match=rf"missing_keys.*model\.slices\.{number}\.{renumbered}.*expected complete checkpoints"
    ):
        StitchedModel.from_anchors(anchors["source"], anchors["target"], (2, 1))


def test_config_only_anchors_of_another_depth_fail_by_name(tmp_path: Path) -> None:
    """config.json says more blocks than the weights hold."""
    tiny_model(large=True).save_pretrained(tmp_path)
    tiny_config("llama", large=True, num_hidden_layers=6).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing_keys.*model\.slices\.1\.layers\.4"):
        StitchedModel.from_anchors(tiny_model(), tmp_path, (2, 1))
