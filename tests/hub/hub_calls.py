"""What tests let the client's process do."""

import io
import re
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hub_examples import (
    image_stitches,
    some_scores,
    stitched_lm,
)
from hub_server import HubServer
from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from tiny_models import token_ids
from tiny_supernets import tiny_supernet
from tiny_vision import images
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from klas_hf import (
    StitchedModel,
    StitchedSupernet,
    StitchScores,
    train_probes,
)
from klas_hf.hub import publish

STITCHED_FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
Folders = tuple[Path, Path]


def push_lm(folders: Folders, repo_id: str, *, seed: int = 0, **options: Any) -> CommitInfo:
    """Make a stitched language model of two folders and push it by its own method."""
    torch.manual_seed(seed)
    return stitched_lm(folders).push_to_hub(repo_id, **options)


def logits_of(repo_id: str, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(repo_id, **options)
    with torch.no_grad():
        return model(token_ids(2, 9)).logits, model.generation_config.to_dict()


def words_of(repo_id: str) -> list[int]:
    return AutoTokenizer.from_pretrained(repo_id)("Once upon a time")["input_ids"]


def run_code(repo_id: str) -> str:
    """Run the code of a repo's card, and what it prints."""
    card = ModelCard.load(repo_id)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue()


def push_images(folders: Folders, repo_id: str) -> torch.Tensor:
    model = StitchedModel.from_anchors(*map(str, folders), (1, 2), calibration=[images("vit", 8, dtype=torch.float32)])
    model.push_to_hub(repo_id)
    with torch.no_grad():
        return model(images("vit", dtype=torch.float32)).logits


def load_images(repo_id: str) -> tuple[torch.Tensor, dict[str, Any]]:
    model = AutoModelForImageClassification.from_pretrained(repo_id)
    with torch.no_grad():
        return model(images("vit", dtype=torch.float32)).logits, AutoImageProcessor.from_pretrained(repo_id).to_dict()


def push_supernet(folders: Folders, repo_id: str) -> None:
    models = tuple(AutoModelForImageClassification.from_pretrained(folder) for folder in folders)
    publish(tiny_supernet(models, image_stitches(models)), repo_id)


def all_paths(repo_id: str) -> list[str]:
    return [str(path) for path in StitchedSupernet.from_pretrained(repo_id).paths]


def push_probes(anchor: Path, repo_id: str, batch: dict[str, Any]) -> tuple[str, str]:
    options = {"validation": [batch]} if "labels" in batch else {}
    probes = train_probes(str(anchor), [batch], **options)
    probes.push_to_hub(repo_id)
    loaded = type(probes).from_pretrained(repo_id)
    assert loaded.config.anchor_fingerprint == probes.config.anchor_fingerprint
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in probes.state_dict().items())
    return type(loaded).__name__, loaded.config.anchor_name


def push_scores(root: Path, repo_id: str, probed: bool) -> tuple[StitchScores, StitchScores]:
    scores = some_scores(root, probed=probed)
    scores.push_to_hub(repo_id)
    return scores, StitchScores.from_pretrained(repo_id)


def publish_of_hub(repo_id: str, anchors: tuple[str, str], token: str, **revisions: str) -> list[str]:
    """Publish a model of anchors on the Hub, read with a token; what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        publish(stitched_lm(anchors, token=token, **revisions), repo_id, token=token)
    return [str(one.message) for one in caught]


def publish_object(what: PreTrainedModel, repo_id: str, **options: Any) -> CommitInfo:
    return publish(what, repo_id, **options)


def without_waiting(function: Callable[..., Any], *args: Any) -> Any:
    """The client waits half a minute, all told, before it gives up; here it does not."""
    with mock.patch.object(time, "sleep"):
        return function(*args)


def push_to_a_busy_repo(folders: Folders, repo_id: str) -> None:
    """Somebody commits between the look at the repo and our commit."""
    model = stitched_lm(folders)
    save = type(model).save_pretrained

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.md", repo_id=repo_id)
        save(*args, **kwargs)

    with mock.patch.object(type(model), "save_pretrained", meanwhile):
        publish(model, repo_id, tags=["new"])


def push_nowhere(folders: Folders) -> None:
    with mock.patch("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"):
        push_lm(folders, "me/nowhere")


def downloaded_from_half(repo_id: str, name: str) -> bytes:
    """Download a file of which half is there already, as after a broken download."""
    whole = Path(hf_hub_download(repo_id, name))
    blob, content = whole.resolve(), whole.read_bytes()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    half = blob.with_name(blob.name + ".incomplete")
    half.write_bytes(content[: len(content) // 2])
    return Path(hf_hub_download(repo_id, name)).read_bytes()


def expected_of(folders: Folders) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits and generation config of the model that `push_lm` makes."""
    torch.manual_seed(0)
    model = stitched_lm(folders)
    with torch.no_grad():
        return model(token_ids(2, 9)).logits, model.generation_config.to_dict()


def plain_files(hub: HubServer, repo_id: str) -> set[str]:
    """What a repo holds, beside the code that stitched models carry."""
    return {name for name in hub.repos[repo_id].files() if not name.endswith(".py")}
