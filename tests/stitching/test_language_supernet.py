"""Supernets of language models: every path against hooks on whole anchors, learning, measuring, saving, extracting."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    FAMILIES,
    VOCABULARY,
    left_padded,
    reference_logits,
    save_with_tokenizer,
    tiny_model,
    token_ids,
)
from tiny_vision import tiny_classifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from klas_hf import (
    RowFile,
    Stitch,
    StitchedForCausalLM,
    StitchedModel,
    StitchedSupernet,
    StitchedSupernetForCausalLM,
    TrainingConfig,
    evaluate,
    evaluate_supernet,
    measure_costs,
    train_stitches,
)
from klas_hf.paths import Path as AnchorPath

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer", "ignore:.*do not determine")

STITCHES = [(1, 0), (1, 2), (2, 2), (2, 4), (3, 3)]
PATHS = [*STITCHES, "1[:1] 0[1:2] 1[2:]", "0[:2] 1[1:3] 1[4:]", "1[:2] 1[4:]", "0[:2] 1[5:]"]


def anchors(family: str = "llama") -> list[PreTrainedModel]:
    return [tiny_model(family, seed=1), tiny_model(family, large=True, seed=2)]


def supernet_of(models: list[PreTrainedModel], stitches: list = STITCHES, **options) -> StitchedSupernet:
    return StitchedSupernet.from_anchors(models, stitches, calibration=[token_ids(16, 12, seed=3)], **options)


def inputs() -> dict[str, Tensor]:
    return left_padded(token_ids(3, 12), [12, 7, 10])


def examples(count: int = 12) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": ids} for ids in token_ids(count, 10, seed=5).tolist()]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_path_is_what_hooks_on_the_whole_anchors_give(family: str) -> None:
    models = anchors(family)
    supernet = supernet_of(models, PATHS)
    given = inputs()
    real = given["attention_mask"].bool()
    for place, model in enumerate(models):
        assert torch.equal(supernet(**given, path=f"{place}[:]").logits[real], model(**given).logits[real])
    for path in supernet.paths[2:]:
        expected = reference_logits(models, str(path), supernet.joints_of(path), **given)
        torch.testing.assert_close(supernet(**given, path=path).logits[real], expected[real], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "granite"])
@torch.no_grad()
def test_layers_start_as_those_of_stitched_models(family: str) -> None:
    models = anchors(family)
    calibration = [left_padded(token_ids(16, 12, seed=3), [12, 4, 9, 12] * 4), token_ids(8, 9, seed=4)]
    supernet = StitchedSupernet.from_anchors(models, STITCHES, calibration=calibration, ridge=1e-3)
    for number, stitch in enumerate(STITCHES):
        alone = StitchedModel.from_anchors(*models, stitch, calibration=calibration, ridge=1e-3)
        (layer,) = supernet.joints_of(stitch)
        torch.testing.assert_close(layer.weight, alone.stitching_layers()[0].weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bias, alone.stitching_layers()[0].bias, rtol=1e-4, atol=1e-4)
        assert supernet.config.joint_fits[number]["r2"] == pytest.approx(alone.config.joint_fits[0]["r2"], abs=1e-5)


def test_loss_is_that_of_the_next_tokens_and_the_last_anchor_is_the_default_path() -> None:
    models = anchors()
    supernet = supernet_of(models)
    ids = token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = supernet(ids, labels=labels)
    expected = models[1](ids, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert torch.equal(out.logits, expected.logits)
    assert float(supernet(ids, labels=labels, num_items_in_batch=26).loss.detach()) == pytest.approx(
        float(out.loss.detach()) * 13 / 26
    )
    loss, logits = supernet(ids, labels=labels, path=Stitch(2, 2), return_dict=False)
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, shifted)


def test_a_path_extracted_gives_the_same_and_generates(tmp_path: Path) -> None:
    models = anchors()
    models[1].generation_config.eos_token_id = [2, 5]
    supernet = supernet_of(models)
    train_stitches(supernet, examples(), TrainingConfig(trainable="full", max_steps=3, per_device_batch_size=4))
    given = inputs()
    real = given["attention_mask"].bool()
    for stitch in STITCHES:
        model = supernet.extract(stitch)
        assert isinstance(model, StitchedForCausalLM)
        with torch.no_grad():
            expected = supernet(**given, path=Stitch(*stitch)).logits
            assert torch.equal(model(**given).logits[real], expected[real])
        number = supernet.paths.index(Stitch(*stitch).path)
        cost = measure_costs(model)
        assert supernet.path_costs[number] == cost
        assert model.generation_config.eos_token_id == [2, 5]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    greedy = {"do_sample": False, "max_new_tokens": 5}
    assert torch.equal(again.generate(token_ids(1, 6), **greedy), model.generate(token_ids(1, 6), **greedy))


def test_extracting_copies() -> None:
    supernet = supernet_of(anchors())
    before = copy.deepcopy(supernet.state_dict())
    model = supernet.extract((2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, tensor in supernet.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied target, tied source
def test_a_saved_supernet_is_the_same_and_has_its_tensors_once(family: str, tmp_path: Path) -> None:
    supernet = supernet_of(anchors(family))
    supernet.save_pretrained(tmp_path)
    again = StitchedSupernet.from_pretrained(tmp_path)
    assert isinstance(again, StitchedSupernetForCausalLM)
    assert again.paths == supernet.paths and again.path_costs == supernet.path_costs
    with torch.no_grad():
        for path in supernet.paths:
            assert torch.equal(again(**inputs(), path=path).logits, supernet(**inputs(), path=path).logits)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert stored == pytest.approx(4 * sum(p.numel() for p in supernet.parameters()), rel=0.2)


def test_a_forward_trains_the_path_that_it_runs_and_no_other() -> None:
    supernet = supernet_of(anchors()).train()
    path = Stitch(1, 2)
    supernet(token_ids(2, 9), labels=token_ids(2, 9), path=path).loss.backward()
    touched = {name for name, parameter in supernet.named_parameters() if parameter.grad is not None}
    blocks = {name for name in touched if ".layers." in name}
    assert {name.split(".layers.")[1].split(".")[0] for name in blocks if name.startswith("anchors.0")} == {"0"}
    assert {name.split(".layers.")[1].split(".")[0] for name in blocks if name.startswith("anchors.1")} == {
        "2", "3", "4"
    }  # fmt: skip
    (number,) = supernet.config.joint_of[STITCHES.index((1, 2))]
    assert {name for name in touched if name.startswith("joints")} == {
        f"joints.{number}.weight", f"joints.{number}.bias"
    }  # fmt: skip


def test_gradients_are_those_of_the_stitched_model_with_checkpointing_and_without() -> None:
    supernet = supernet_of(anchors())
    ids = token_ids(2, 9)
    alone = supernet.extract((2, 2)).train()
    alone(ids, labels=ids).loss.backward()
    supernet.train()
    for checkpointing in (False, True):
        supernet.zero_grad()
        if checkpointing:
            supernet.gradient_checkpointing_enable({"use_reentrant": False})
        supernet(ids, labels=ids, path=Stitch(2, 2)).loss.backward()
        (layer,) = supernet.joints_of(Stitch(2, 2))
        torch.testing.assert_close(layer.weight.grad, alone.stitching_layers()[0].weight.grad)
        for mine, other in (
            (supernet.anchors[0].model.layers[1], alone.model.slices[0].layers[1]),
            (supernet.anchors[1].model.layers[2], alone.model.slices[1].layers[0]),
        ):
            for one, expected in zip(mine.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(one.grad, expected.grad)


def test_modes_reach_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny_model(seed=1, attention_dropout=0.5), tiny_model(large=True, seed=2, attention_dropout=0.5)]
    supernet = supernet_of(models)
    ids, path = token_ids(2, 9), Stitch(2, 2)
    with torch.no_grad():
        assert torch.equal(supernet(ids, path=path).logits, supernet(ids, path=path).logits)
        supernet.train()
        assert not torch.equal(supernet(ids, path=path).logits, supernet(ids, path=path).logits)
        supernet.eval()
        assert torch.equal(supernet(ids, path=path).logits, supernet(ids, path=path).logits)


@pytest.mark.parametrize("trainable", ["stitch", "lora", "full"])
def test_training_lowers_the_loss_and_resumes_exactly(trainable: str, tmp_path: Path) -> None:
    config = TrainingConfig(
        trainable=trainable, max_steps=16, per_device_batch_size=6, gradient_accumulation_steps=1, learning_rate=1e-2,
        save_steps=4, sampling="bucket", sampling_buckets=3,
    )  # fmt: skip
    whole, parts = supernet_of(anchors()), supernet_of(anchors())
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in [token_ids(12, 10, seed=5)]
    ]
    rows = RowFile(tmp_path / "rows.jsonl", {})
    before = evaluate_supernet(whole, batches, rule="before", rows=rows)
    losses = train_stitches(whole, examples(), config, output_dir=tmp_path / "whole").losses
    after = evaluate_supernet(whole, batches, rule="after", rows=rows)
    stitched = [n for n, row in enumerate(before) if row.stitch]
    assert np.mean([after[n].metrics["loss"] for n in stitched]) < np.mean(
        [before[n].metrics["loss"] for n in stitched]
    )

    class Stop(Exception):
        pass

    class Failing(list):
        def __getitem__(self, index):
            if self.seen > 50:
                raise Stop
            self.seen += 1
            return super().__getitem__(index)

    failing = Failing(examples())
    failing.seen = 0
    with pytest.raises(Stop):
        train_stitches(parts, failing, config, output_dir=tmp_path / "parts")
    parts = supernet_of(anchors())
    resumed = train_stitches(parts, examples(), config, output_dir=tmp_path / "parts")
    assert resumed.losses == losses
    for (name, one), (_, other) in zip(whole.state_dict().items(), parts.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_lora_leaves_every_head_alone() -> None:
    supernet = supernet_of([tiny_model(seed=1), tiny_model(large=True, seed=2, tie_word_embeddings=False)])
    heads = [model.lm_head.weight.clone() for model in supernet.anchors]
    config = TrainingConfig(trainable="lora", max_steps=4, per_device_batch_size=6, learning_rate=1e-2)
    train_stitches(supernet, examples(), config)
    for model, head in zip(supernet.anchors, heads, strict=True):
        assert torch.equal(model.lm_head.weight, head)


def test_rows_are_the_losses_of_extracted_models(tmp_path: Path) -> None:
    supernet = supernet_of(anchors())
    padded = left_padded(token_ids(3, 12), [12, 7, 10])
    padded["labels"] = torch.where(padded["attention_mask"].bool(), padded["input_ids"], -100)
    ids = token_ids(2, 9, seed=9)
    batches = [padded, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    rows = evaluate_supernet(supernet.train(), batches, rule="every", rows=RowFile(tmp_path / "rows.jsonl", {}), seed=4)
    assert supernet.training
    assert [row.stitch for row in rows] == [None, None, *map(Stitch.of, STITCHES)]
    for row in rows:
        place = AnchorPath.parse(row.path).anchors[0]
        model = supernet.anchors[place] if row.stitch is None else supernet.extract(row.stitch)
        assert row.metrics["loss"] == pytest.approx(evaluate(model, batches).metrics["loss"], rel=1e-5)
        assert row.seed == 4 and row.rule == "every"
    with pytest.raises(ValueError, match="leave them out"):
        evaluate_supernet(supernet, batches, rule="x", rows=RowFile(tmp_path / "x.jsonl", {}), classes=[1])


def test_three_anchors_and_shared_layers() -> None:
    models = [tiny_model(seed=1), tiny_model(seed=7, num_hidden_layers=4), tiny_model(large=True, seed=2)]
    stitches = [(1, 1, 0, 1), (2, 2, 0, 1), (3, 3, 1, 2)]
    supernet = supernet_of(models, stitches, shared=[0, 0, 1])
    assert len(supernet.joints) == 2 and list(map(str, supernet.paths[:3])) == ["0[:]", "1[:]", "2[:]"]
    given = inputs()
    real = given["attention_mask"].bool()
    with torch.no_grad():
        for path in supernet.paths[3:]:
            expected = reference_logits(models, str(path), supernet.joints_of(path), **given)
            assert torch.equal(supernet(**given, path=path).logits[real], expected[real])


def test_a_deep_copy_is_a_supernet_of_its_own() -> None:
    supernet = supernet_of(anchors())
    ids, path = token_ids(2, 9), Stitch(2, 2)
    with torch.no_grad():
        before = supernet(ids, path=path).logits
        twin = copy.deepcopy(supernet)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(supernet(ids, path=path).logits, before)
        assert not torch.equal(twin(ids, path=path).logits, before)


def test_what_cannot_be_joined_is_refused() -> None:
    small, large = anchors()
    cases = {
        "reversed": ([large, small], [(1, 1)]),
        "twice": ([small, small], [(1, 1)]),
        "more than once": ([small, large], [(1, 1), (1, 1)]),
        "no paths": ([small, large], []),
        "positions from 0 to 0": ([small], [(1, 1)]),
        "positions from 0 to 1": ([small, large], [(1, 1, 0, 2)]),
        "out of range": ([small, large], [(4, 1)]),
        "entries": ([small, tiny_model(large=True, vocab_size=VOCABULARY + 1)], [(1, 1)]),
        "one kind": ([small, tiny_classifier("vit")], [(1, 1)]),
    }
    for message, (models, stitches) in cases.items():
        with pytest.raises(ValueError, match=message):
            StitchedSupernet.from_anchors(models, stitches)
    supernet = supernet_of([small, large])
    for path in (Stitch(1, 1), 2, -1, "0"):
        with pytest.raises((TypeError, ValueError), match="expected"):
            supernet(token_ids(1, 4), path=path)
    with pytest.raises(ValueError, match="not made with"):
        supernet.extract((1, 1))


def test_the_tokenizer_travels_from_the_anchors_into_what_is_saved(tmp_path: Path) -> None:
    folders = [tmp_path / "small", tmp_path / "large"]
    for model, folder in zip(anchors(), folders, strict=True):
        save_with_tokenizer(model, folder)
    supernet = supernet_of(folders, ["1[:1] 0[1:2] 1[2:]"])
    supernet.save_pretrained(tmp_path / "supernet")
    for number, one in enumerate((supernet, StitchedSupernet.from_pretrained(tmp_path / "supernet"))):
        one.extract("1[:1] 0[1:2] 1[2:]").save_pretrained(tmp_path / str(number))
        found = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert found.get_vocab() == AutoTokenizer.from_pretrained(folders[1]).get_vocab()
    supernet_of(anchors(), [(1, 1)]).extract((1, 1)).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "tokenizer.json").exists()


def test_calibration_reads_no_more_than_it_needs() -> None:
    read: list[int] = []

    class Counted(list):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                read.append(number)
                yield batch

    many = Counted(token_ids(32, 12, seed=seed) for seed in range(20))
    StitchedSupernet.from_anchors(anchors(), [(1, 1)], calibration=(batch for batch in many))
    assert len(read) == 256 / 32
    read.clear()
    StitchedSupernet.from_anchors(anchors(), [(1, 1)], calibration=(batch for batch in many), calibration_items=64)
    assert len(read) == 2
