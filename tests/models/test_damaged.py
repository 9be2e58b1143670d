"""Checkpoints that are damaged, hostile or of a newer version, and saves that fail: refused, and nothing is lost."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import tiny_vision
import torch
from failing_disk import full_disk
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from klas_hf import StitchedForCausalLM, StitchedForImageClassification, StitchedModel, StitchedSupernet
from klas_hf.anchors.language import load_anchor
from klas_hf.anchors.vision import load_vision_anchor
from klas_hf.models import StitchedTextModel

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")
LOADERS = {
    "text": (StitchedModel, StitchedForCausalLM, AutoModelForCausalLM),
    "image": (StitchedModel, StitchedForImageClassification, AutoModelForImageClassification),
}


def stitched(kind: str, seed: int = 1) -> PreTrainedModel:
    if kind == "text":
        anchors = tiny_models.tiny_model(seed=seed), tiny_models.tiny_model(large=True, seed=seed + 1)
        return StitchedModel.from_anchors(*anchors, (2, 3))
    source, target, stitch = tiny_vision.middle("vit")
    with torch.no_grad():
        source.vit.embeddings.cls_token += seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StitchedModel.from_anchors(source, target, stitch)


def sharded(kind: str, folder: Path) -> Path:
    stitched(kind).save_pretrained(folder, max_shard_size="20KB")
    assert len(shards(folder)) > 3
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def truncate(file: Path, share: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def refused(kind: str, folder: Path, *parts: str, error: type[Exception] = OSError) -> None:
    """Every loader raises, and says all of `parts`."""
    for loader in LOADERS[kind]:
        with pytest.raises(error) as raised:
            loader.from_pretrained(folder)
        for part in parts:
            assert part in str(raised.value)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_missing_shard_is_named(kind: str, tmp_path: Path) -> None:
    lost = shards(sharded(kind, tmp_path))[2]
    lost.unlink()
    refused(kind, tmp_path, str(tmp_path), f"{lost.name} is missing", "save it again")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_truncated_shard_is_named(kind: str, share: float, tmp_path: Path) -> None:
    broken = shards(sharded(kind, tmp_path))[2]
    truncate(broken, share)
    refused(kind, tmp_path, str(tmp_path), f"{broken.name} is damaged", "save it again")


@pytest.mark.parametrize("kind", LOADERS)
def test_a_truncated_file_is_named(kind: str, tmp_path: Path) -> None:
    stitched(kind).save_pretrained(tmp_path)
    truncate(tmp_path / "model.safetensors")
    refused(kind, tmp_path, "model.safetensors is damaged")


@pytest.mark.parametrize("kind", LOADERS)
def test_a_damaged_index_is_named(kind: str, tmp_path: Path) -> None:
    sharded(kind, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in (index.read_text()[:200], "{}", "[]"):
        index.write_text(content)
        refused(kind, tmp_path, "model.safetensors.index.json is damaged")


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_tensors_are_not_made_up(kind: str, tmp_path: Path) -> None:
    stitched(kind).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = [name for name in sorted(tensors) if "joints" in name]
    save_file({name: tensors[name] for name in tensors.keys() - lost}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(kind, tmp_path, "2 tensors are missing", *lost)


def test_the_loading_info_is_handed_on(tmp_path: Path) -> None:
    stitched("text").save_pretrained(tmp_path)
    model, info = StitchedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, StitchedForCausalLM)
    assert not info["missing_keys"]
    assert isinstance(StitchedModel.from_pretrained(tmp_path, output_loading_info=False), StitchedForCausalLM)
    assert StitchedTextModel.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]


@pytest.mark.parametrize("change", [{}, {"slices": "two"}, {"a_new_field": {"of": "unknown meaning"}}])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_newer_format_is_refused(kind: str, change: dict, tmp_path: Path) -> None:
    stitched(kind).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["format_version"] == 3
    (tmp_path / "config.json").write_text(json.dumps(written | change | {"format_version": 4}))
    refused(kind, tmp_path, "format 4", "format 3", "newer klas_hf", "pip install -U klas_hf", error=ValueError)
    with pytest.raises(ValueError, match="newer klas_hf"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("named", [{"format_version": 1}, {}])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_format_of_two_anchors_and_one_joint_is_refused(kind: str, named: dict, tmp_path: Path) -> None:
    stitched(kind).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["format_version"], written["slices"], written["path"]
    old = written | named | {"source_stop": 2, "target_start": 3}
    (tmp_path / "config.json").write_text(json.dumps(old))
    refused(kind, tmp_path, "format 1", "expected format 2 or newer", "Stitch its anchors again", error=ValueError)
    with pytest.raises(ValueError, match="format 1"):
        AutoConfig.from_pretrained(tmp_path)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("form", ["plain", "trap", "index"])
@pytest.mark.parametrize("kind", LOADERS)
def test_pickled_weights_are_refused(kind: str, form: str, tmp_path: Path) -> None:
    stitched(kind).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    name = "pytorch_model.bin"
    torch.save(Trap(tmp_path / "run") if form == "trap" else tensors, tmp_path / name)
    if form == "index":
        (tmp_path / name).rename(tmp_path / "pytorch_model-00001-of-00001.bin")
        name = "pytorch_model.bin.index.json"
        weights = dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")
        (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    refused(kind, tmp_path, "pickled", name, "safetensors")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="use_safetensors=False.*any code"):
        StitchedModel.from_pretrained(tmp_path, use_safetensors=False)
    for explicit in (None, True):
        with pytest.raises(OSError, match="pickled"):
            StitchedModel.from_pretrained(tmp_path, use_safetensors=explicit)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    stitched("text").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused("text", tmp_path, "model.safetensors is missing")


# Anchors.


def anchors(kind: str, folder: Path) -> tuple[PreTrainedModel, Path, tuple[int, int]]:
    """A source in memory, a sharded target in a folder, and a stitch between them."""
    if kind == "text":
        source, target, stitch = tiny_models.tiny_model(seed=1), tiny_models.tiny_model(large=True, seed=2), (2, 3)
    else:
        source, target, stitch = tiny_vision.middle("vit")
    target.save_pretrained(folder, max_shard_size="10KB")
    assert len(shards(folder)) > 3
    return source, folder, stitch


def shard_of(folder: Path, part: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(file for name, file in index.items() if part in name)


LAST = {"text": "layers.4.mlp.down_proj", "image": "classifier.weight"}  # what every stitch uses


@pytest.mark.parametrize("damage", ["missing", "damaged"])
@pytest.mark.parametrize("kind", LOADERS)
def test_an_anchor_with_a_missing_or_truncated_shard_is_refused(kind: str, damage: str, tmp_path: Path) -> None:
    source, target, stitch = anchors(kind, tmp_path)
    shard = shard_of(target, LAST[kind])
    shard.unlink() if damage == "missing" else truncate(shard)
    with pytest.raises(OSError) as raised:
        StitchedModel.from_anchors(source, target, stitch)
    assert str(target) in str(raised.value)
    expected = f"is missing {shard.name}" if damage == "missing" else f"{shard.name} is damaged"
    assert expected in str(raised.value)
    assert "again" in str(raised.value)


@pytest.mark.parametrize("kind", LOADERS)
def test_an_anchor_with_a_damaged_index_is_refused(kind: str, tmp_path: Path) -> None:
    source, target, stitch = anchors(kind, tmp_path)
    index = target / "model.safetensors.index.json"
    for content in (index.read_text()[:200], "{}", "[]"):
        index.write_text(content)
        with pytest.raises(OSError, match="model.safetensors.index.json is damaged"):
            StitchedModel.from_anchors(source, target, stitch)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_pickled_anchor_is_refused(kind: str, tmp_path: Path) -> None:
    source, target, stitch = anchors(kind, tmp_path)
    for file in target.glob("model*"):
        file.unlink()
    torch.save(Trap(tmp_path / "run"), target / "pytorch_model.bin")
    with pytest.raises(OSError, match="only safetensors weights are read, never pickled ones"):
        StitchedModel.from_anchors(source, target, stitch)
    for whole in (load_anchor if kind == "text" else load_vision_anchor, load_supernet_of(source)):
        with pytest.raises(OSError, match="safetensors"):
            whole(target)
    assert not (tmp_path / "run").exists()


def load_supernet_of(source: Path) -> Callable[[Path], object]:
    return lambda target: StitchedSupernet.from_anchors([source, target], [(1, 1)])


def test_a_supernet_is_loaded_whole_or_not_at_all_and_survives_a_full_disk(tmp_path: Path) -> None:
    models = tiny_models.tiny_model(seed=1), tiny_models.tiny_model(large=True, seed=2)
    supernet = StitchedSupernet.from_anchors(models, [(1, 1), (2, 3)])
    supernet.save_pretrained(tmp_path, max_shard_size="20KB")
    held = contents(tmp_path)
    with full_disk(2000), pytest.raises(Exception, match="(?i)file too large|os error 27"):
        supernet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert contents(tmp_path) == held
    assert_same(StitchedSupernet.from_pretrained(tmp_path), supernet)
    shards(tmp_path)[0].unlink()
    with pytest.raises(OSError, match="is missing"):
        StitchedSupernet.from_pretrained(tmp_path)


@pytest.mark.parametrize("known", [False, True])
def test_an_anchors_own_code_never_runs_unasked(known: bool, tmp_path: Path) -> None:
    """Whether or not transformers knows the model type; a machine without a terminal is not asked."""
    source, target, stitch = anchors("text", tmp_path)
    trap = f"import pathlib; pathlib.Path({str(tmp_path / 'run')!r}).touch()\n"
    (target / "strange.py").write_text(trap + "from transformers import LlamaConfig as Strange\n")
    config = json.loads((target / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "strange.Strange", "AutoModelForCausalLM": "strange.Strange"}}
    config |= {} if known else {"model_type": "strange"}
    (target / "config.json").write_text(json.dumps(config))
    if known:
        StitchedModel.from_anchors(source, target, stitch)
    else:
        with pytest.raises(ValueError, match="custom code"):
            StitchedModel.from_anchors(source, target, stitch)
    assert not (tmp_path / "run").exists()


# Saving.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("before", ["1GB", "20KB"])
@pytest.mark.parametrize("after", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_old_checkpoint_survives_a_full_disk(kind: str, before: str, after: str, tmp_path: Path) -> None:
    old, new = stitched(kind, seed=1), stitched(kind, seed=5)
    old.save_pretrained(tmp_path, max_shard_size=before)
    (tmp_path / "README.md").write_text("mine")
    held = contents(tmp_path)
    new.save_pretrained(tmp_path / "measured", max_shard_size=after)
    sizes = sorted(file.stat().st_size for file in (tmp_path / "measured").glob("*.safetensors"))
    new.config.anchor_names = ["another", "large"]  # config.json would be new too
    with full_disk(sizes[-1] - 1), pytest.raises(Exception, match="(?i)file too large|os error 27"):
        new.save_pretrained(tmp_path, max_shard_size=after)
    kept = {name: content for name, content in contents(tmp_path).items() if not name.startswith("measured")}
    assert kept == held
    assert not list(tmp_path.glob(".saving*"))
    assert_same(StitchedModel.from_pretrained(tmp_path), old)
    new.save_pretrained(tmp_path, max_shard_size=after)  # there is room again
    assert_same(StitchedModel.from_pretrained(tmp_path), new)


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_last_save_is_what_loads(kind: str, tmp_path: Path) -> None:
    """Whatever number of files the one before had; files that are not the model's stay."""
    others = ("README.md", "tokenizer.json", "model.fp16.safetensors", "adapter_model.safetensors", "model.onnx")
    for name in others:
        (tmp_path / name).write_text(name)
    for seed, size in enumerate(["1GB", "20KB", "40KB", "1GB"], start=1):
        model = stitched(kind, seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_same(StitchedModel.from_pretrained(tmp_path), model)
        index = tmp_path / "model.safetensors.index.json"
        assert index.exists() == (size != "1GB") != (tmp_path / "model.safetensors").exists()
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
        assert {file.name for file in shards(tmp_path)} == listed
    assert {name: (tmp_path / name).read_text() for name in others} == {name: name for name in others}


def test_a_variant_is_saved_beside_the_model(tmp_path: Path) -> None:
    models = {None: stitched("text", 1), "fp16": stitched("text", 5)}
    for size in ("1GB", "20KB", "1GB"):
        for variant, model in models.items():
            model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
        for variant, model in models.items():
            assert_same(StitchedModel.from_pretrained(tmp_path, variant=variant), model)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_an_adapter_is_saved_beside_the_model(tmp_path: Path) -> None:
    model = stitched("text")
    model.save_pretrained(tmp_path)
    held = (tmp_path / "model.safetensors").read_bytes()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == held
    ids = tiny_models.token_ids(2, 9)
    with torch.no_grad():
        for loader in LOADERS["text"]:
            assert torch.equal(loader.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_an_adapter_alone_loads_its_base_model(tmp_path: Path) -> None:
    stitched("text").save_pretrained(tmp_path / "base")
    model = StitchedModel.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    ids = tiny_models.token_ids(2, 9)
    with torch.no_grad():
        for loader in (StitchedForCausalLM, AutoModelForCausalLM):
            assert torch.equal(loader.from_pretrained(tmp_path / "adapter")(ids).logits, model(ids).logits)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    stitched("text", 1).save_pretrained(tmp_path)
    held = contents(tmp_path)
    stitched("text", 5).save_pretrained(tmp_path, is_main_process=False)
    assert contents(tmp_path) == held


def test_given_tensors_are_what_is_saved(tmp_path: Path) -> None:
    model, other = stitched("text", 1), stitched("text", 5)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same(StitchedModel.from_pretrained(tmp_path), other)
    with pytest.raises(ValueError, match="state_dict and push_to_hub"):
        model.save_pretrained(tmp_path, state_dict=other.state_dict(), push_to_hub=True)


def test_the_body_of_a_saved_model_loads(tmp_path: Path) -> None:
    model = stitched("text")
    model.save_pretrained(tmp_path)
    assert_same(AutoModel.from_pretrained(tmp_path), model.model)
