"""Checkpoints carry their code: they load where klas_hf is not installed, and where it is that code never runs."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_vision
import torch
import uninstalled
from hub_client import HubClient
from hub_server import HubServer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedModel,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports

from klas_hf import StitchedForCausalLM, StitchedModel
from klas_hf.hub.delta import save_delta

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")
PATHS = {"swin": "1[:1] 0[1:3] 1[3:]", "resnet": "0[:1] 1[1:]"}
IMAGES = list(PATHS)

# Prints what it found as JSON.
WITHOUT_KLAS_HF = """
import copy, json, sys
from pathlib import Path

import torch
from transformers import AutoBackbone, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

torch.set_num_threads(1)
root = Path(sys.argv[1])

def refusal(load, *args, **kwargs):
    try:
        load(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]

def facts(auto, name, folder):
    model = auto.from_pretrained(name, trust_remote_code=True)
    inputs, expected = torch.load(root / f"{folder}.pt")
    with torch.no_grad():
        same = torch.equal(copy.deepcopy(model)(inputs)[0], expected)
    return model, {"same": same, "module": type(model).__module__, "class": type(model).__name__}

def everything(prefix):
    found = {}
    text, found["text"] = facts(AutoModelForCausalLM, prefix + "text", "text")
    inputs, generated = torch.load(root / "generated.pt")
    found["generates"] = torch.equal(text.generate(inputs, max_new_tokens=5, do_sample=False), generated)
    _, found["body"] = facts(AutoModel, prefix + "text", "body")
    for kind in sys.argv[3].split(","):
        image, found[kind] = facts(AutoModelForImageClassification, prefix + kind, kind)
    for name, model in (("text", text), ("resnet", image)):
        model.save_pretrained(root / "again" / name)
    found["again"] = facts(AutoModelForCausalLM, root / "again" / "text", "text")[1]["same"]
    for consent, options in {"unasked": {}, "refused": {"trust_remote_code": False}}.items():
        found[consent] = refusal(AutoModelForCausalLM.from_pretrained, prefix + "text", **options)
    found["delta"] = refusal(AutoModelForCausalLM.from_pretrained, prefix + "delta", trust_remote_code=True)
    found["push"] = refusal(text.push_to_hub, "me/pushed")
    found["anchors"] = refusal(type(text).from_anchors, "small", "large", (1, 1))
    return found

found = [everything(prefix) for prefix in sys.argv[2].split(",")]
# Of the Hub's alone: AutoBackbone takes no folders.
found[1]["backbone"] = type(AutoBackbone.from_pretrained("me/resnet", trust_remote_code=True)).__module__
assert not [name for name in sys.modules if name.partition(".")[0] == "klas_hf"]
print()  # after transformers' question
print(json.dumps(found))
"""


@torch.no_grad()
def output(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(model)(inputs)[0]  # a copy's tensors are aligned as another's are


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in folders, and what their models give."""
    root = tmp_path_factory.mktemp("saved")
    small, large = tiny_models.tiny_model("llama", seed=1), tiny_models.tiny_model("gemma3_text", large=True, seed=2)
    small.save_pretrained(root / "small")
    large.save_pretrained(root / "large")
    model = StitchedModel.from_anchors(root / "small", root / "large", (2, 3))
    model.save_pretrained(root / "text")
    save_delta(model, root / "delta")
    ids = tiny_models.token_ids(2, 9)
    torch.save((ids, output(model, ids)), root / "text.pt")
    torch.save((ids, output(model.model, ids)), root / "body.pt")
    torch.save((ids, model.generate(ids, max_new_tokens=5, do_sample=False)), root / "generated.pt")
    for kind in IMAGES:
        classifier = tiny_vision.tiny_path(tiny_vision.tiny_pair(kind), PATHS[kind], **tiny_vision.sized(kind))
        classifier.save_pretrained(root / kind)
        pixels = tiny_vision.images(kind)
        torch.save((pixels, output(classifier, pixels)), root / f"{kind}.pt")
    return root


@pytest.fixture(scope="module")
def found(saved: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a process without klas_hf found in the folders, and on the Hub."""
    for name in ("text", "delta", *IMAGES):
        hub.make(f"me/{name}", {file.name: file.read_bytes() for file in (saved / name).iterdir()})
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
    names, cache = ",".join(IMAGES), tmp_path_factory.mktemp("cache")
    return uninstalled.run(WITHOUT_KLAS_HF, str(saved), f"{saved}/,me/", names, cache=cache, **settings)


@pytest.mark.parametrize("place", [0, 1], ids=["folder", "hub"])
def test_checkpoints_load_without_klas_hf(place: int, found: list[dict[str, Any]]) -> None:
    here = found[place]
    classes = {"text": "StitchedForCausalLM", "body": "StitchedTextModel"}
    for name in ("text", "body", *IMAGES):
        assert here[name]["same"], name
        assert here[name]["class"] == classes.get(name, "StitchedForImageClassification")
        assert here[name]["module"].startswith("transformers_modules." + ("me." if place else ""))
    assert here["generates"]
    assert here["again"]


@pytest.mark.parametrize("place", [0, 1], ids=["folder", "hub"])
def test_nothing_runs_without_consent(place: int, found: list[dict[str, Any]]) -> None:
    for consent in ("unasked", "refused"):
        kind, message = found[place][consent]
        assert kind == "ValueError"
        assert "trust_remote_code=True" in message


@pytest.mark.parametrize("place", [0, 1], ids=["folder", "hub"])
@pytest.mark.parametrize("what", ["delta", "push", "anchors"])
def test_what_needs_klas_hf_says_so(what: str, place: int, found: list[dict[str, Any]]) -> None:
    kind, message = found[place][what]
    assert kind == "ImportError"
    assert "pip install klas_hf" in message


def test_a_backbone_on_the_hub_loads_without_klas_hf(found: list[dict[str, Any]]) -> None:
    assert found[1]["backbone"].startswith("transformers_modules.me.resnet")


def test_what_was_saved_without_klas_hf_loads_with_it(saved: Path, found: list[dict[str, Any]]) -> None:
    ids, expected = torch.load(saved / "text.pt")
    again = AutoModelForCausalLM.from_pretrained(saved / "again" / "text")
    assert isinstance(again, StitchedForCausalLM)
    assert torch.equal(output(again, ids), expected)
    pixels, expected = torch.load(saved / "resnet.pt")
    again = AutoModelForImageClassification.from_pretrained(saved / "again" / "resnet")
    assert torch.equal(output(again, pixels), expected)


@pytest.mark.parametrize("trusted", [None, False, True])
def test_carried_code_never_runs_where_klas_hf_is_installed(trusted: bool | None, saved: Path, tmp_path: Path) -> None:
    options = {} if trusted is None else {"trust_remote_code": trusted}
    loaders = {
        "text": [StitchedModel, AutoModelForCausalLM, AutoModel, AutoConfig],
        "delta": [StitchedModel, AutoModelForCausalLM],
        "swin": [StitchedModel, AutoModelForImageClassification, AutoConfig],
    }
    for name in loaders:
        folder = tmp_path / name
        folder.mkdir()
        for file in (saved / name).iterdir():
            trap = f"open({str(tmp_path / 'run')!r}, 'w')\n"
            (folder / file.name).write_bytes(trap.encode() if file.suffix == ".py" else file.read_bytes())
        for loader in loaders[name]:
            assert type(loader.from_pretrained(folder, **options)).__module__.startswith("klas_hf.models.")
    pipe = pipeline("image-classification", tmp_path / "swin", image_processor=_NoProcessor(), device="cpu", **options)
    assert type(pipe.model).__module__ == "klas_hf.models.modeling_stitched_vision"
    assert not (tmp_path / "run").exists()


class _NoProcessor:
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no image here")


def test_carried_code_needs_what_transformers_needs(saved: Path) -> None:
    known = sys.stdlib_module_names | {"torch", "transformers", "safetensors", "huggingface_hub"}
    for name in ("text", "delta", *IMAGES):
        code = list((saved / name).glob("*.py"))
        assert len(code) >= 3
        for file in code:
            assert set(get_imports(file)) <= known, file
            assert "klas_hf" not in {line.split(".")[0] for line in get_imports(file)}


def test_the_configuration_names_every_auto_class(saved: Path) -> None:
    expected = {
        "text": {
            "AutoConfig": "configuration_stitched.StitchedConfig",
            "AutoModel": "modeling_stitched.StitchedTextModel",
            "AutoModelForCausalLM": "modeling_stitched.StitchedForCausalLM",
        },
        "swin": {
            "AutoConfig": "configuration_stitched_vision.StitchedVisionConfig",
            "AutoModelForImageClassification": "modeling_stitched_vision.StitchedForImageClassification",
            "AutoBackbone": "modeling_stitched_vision.StitchedBackbone",
        },
    }
    expected["delta"] = expected["text"]
    for name, classes in expected.items():
        assert classes.items() <= json.loads((saved / name / "config.json").read_text())["auto_map"].items()


def save_and_push(source: Path, folder: Path, **options: Any) -> None:
    StitchedModel.from_pretrained(source).save_pretrained(folder, push_to_hub=True, **options)


def test_saving_may_push(saved: Path, hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    client(save_and_push, saved / "text", tmp_path / "named-by-folder")
    client(
        save_and_push,
        saved / "text",
        tmp_path / "x",
        repo_id="me/asked",
        private=True,
        commit_message="first",
        max_shard_size="20KB",
    )
    for folder, name in (("named-by-folder", "me/named-by-folder"), ("x", "me/asked")):
        here = {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        there = hub.repos[name].files()
        shared = [file for file in here if file.endswith((".py", ".safetensors"))]
        assert len(shared) > 3
        assert {file: there[file] for file in shared} == {file: here[file] for file in shared}
        assert there["config.json"]
        assert "README.md" in there
    assert hub.repos["me/asked"].private
    assert not hub.repos["me/named-by-folder"].private
    assert hub.repos["me/asked"].head().message == "first"
    assert len([file for file in hub.repos["me/asked"].files() if file.endswith(".safetensors")]) > 3
