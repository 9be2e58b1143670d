"""Publishing to a Hub on the loopback with the unmodified client, and using what was published from an empty cache."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hub_calls import (
    STITCHED_FILES,
    TOKENIZER_FILES,
    Folders,
    all_paths,
    expected_of,
    load_images,
    logits_of,
    plain_files,
    publish_object,
    publish_of_hub,
    push_images,
    push_lm,
    push_probes,
    push_scores,
    push_supernet,
    run_code,
    words_of,
)
from hub_client import HubClient
from hub_examples import (
    image_anchors,
    page,
    rows_of,
    some_scores,
    stitched_lm,
    text_anchors,
)
from hub_server import RIGHT_TOKEN, HubServer
from huggingface_hub import ModelCard
from tiny_models import tiny_model, token_ids
from tiny_vision import images
from transformers import (
    AutoTokenizer,
)

from klas_hf import (
    ImageProbeNet,
    ProbeNet,
    StitchScores,
)
from klas_hf.hub import model_card

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return text_anchors(tmp_path)


# --- language models ---


def test_a_language_model_with_its_tokenizer(client: HubClient, hub: HubServer, folders: Folders) -> None:
    expected, settings = expected_of(folders)
    commit = client(push_lm, folders, "me/lm")
    assert plain_files(hub, "me/lm") == STITCHED_FILES | TOKENIZER_FILES
    assert commit.oid == hub.repos["me/lm"].head().oid
    assert [one.message for one in hub.repos["me/lm"].branches["main"]] == [
        "initial commit",
        "Upload StitchedForCausalLM",
    ]
    logits, loaded = client(logits_of, "me/lm", as_token=None)
    assert torch.equal(logits, expected)
    assert loaded == settings and loaded["max_new_tokens"] == 7
    assert client(words_of, "me/lm") == [3, 4, 5, 6]


def test_nothing_of_the_users_folders_is_published(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "me/private-paths")
    files = hub.repos["me/private-paths"].files()
    assert not [name for name, content in files.items() if str(folders[0].parent).encode() in content]
    config = json.loads(files["config.json"])
    assert config["anchor_names"] == ["small-lm", "large-lm"]


def test_the_code_on_the_card_runs_in_a_fresh_process(
    client: HubClient, hub: HubServer, folders: Folders, tmp_path: Path
) -> None:
    client(push_lm, folders, "me/code")
    card = ModelCard(hub.repos["me/code"].files()["README.md"].decode())
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    with mock.patch.dict("os.environ", settings):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time word")


def test_rows_become_metrics_table_and_curve(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "me/rows", rows=rows_of(), metric="extra", dataset="org/corpus", tags=["mine"])
    files = hub.repos["me/rows"].files()
    assert files["curve.png"].startswith(b"\x89PNG")
    card = ModelCard(files["README.md"].decode())
    assert "![picture of the results](curve.png)" in card.text and "mine" in card.data.tags
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", 3.0), ("extra", 1.5)]
    with pytest.raises(ValueError, match="without 'bleu'"):
        client(push_lm, folders, "me/no-such-metric", rows=rows_of(), metric="bleu", dataset="org/corpus")
    assert "me/no-such-metric" not in hub.repos


def test_a_model_in_memory_goes_without_tokenizer_or_with_the_one_given(
    client: HubClient, hub: HubServer, folders: Folders
) -> None:
    model = stitched_lm((tiny_model(seed=1), tiny_model(large=True, seed=2)))
    client(publish_object, model, "me/memory")
    assert plain_files(hub, "me/memory") == STITCHED_FILES
    assert "tensor([[" in client(run_code, "me/memory")
    client(publish_object, model, "me/memory", tokenizer_or_processor=AutoTokenizer.from_pretrained(folders[0]))
    assert plain_files(hub, "me/memory") == STITCHED_FILES | TOKENIZER_FILES
    assert "Once upon a time" in client(run_code, "me/memory")


def test_a_card_of_ones_own(client: HubClient, hub: HubServer, folders: Folders) -> None:
    model = stitched_lm(folders)
    card = model_card(model, "me/own")
    card.text += "\nAnd one more thing."
    client(publish_object, model, "me/own", card=card)
    assert hub.repos["me/own"].files()["README.md"].decode() == str(card)
    page(folders[0], "llama3.2")
    page(folders[1], "llama3.2")
    with pytest.raises(ValueError, match="expected llama3.2"):  # it says MIT
        client(publish_object, model, "me/Llama-own", card=card)


def test_a_sharded_model_replaces_a_whole_one(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "me/shards")
    client(push_lm, folders, "me/shards", max_shard_size="20KB")
    files = set(hub.repos["me/shards"].files())
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files
    assert torch.equal(client(logits_of, "me/shards")[0], expected_of(folders)[0])
    client(push_lm, folders, "me/shards")
    assert plain_files(hub, "me/shards") == STITCHED_FILES | TOKENIZER_FILES


def test_publishing_the_same_again_changes_nothing(client: HubClient, hub: HubServer, folders: Folders) -> None:
    first = client(push_lm, folders, "me/twice", rows=rows_of(), dataset="x")
    again = client(push_lm, folders, "me/twice", rows=rows_of(), dataset="x")
    assert again.oid == first.oid and len(hub.repos["me/twice"].branches["main"]) == 2


# --- licences ---


def test_licence_files_and_a_notice_go_with_llama(client: HubClient, hub: HubServer, tmp_path: Path) -> None:
    folders = text_anchors(tmp_path, ("llama3.2", "llama3.2"))
    for folder, policy in zip(folders, ("be kind", "be wise"), strict=True):
        page(folder, None, {"LICENSE.txt": "the agreement", "USE_POLICY.md": policy})
    with pytest.raises(ValueError, match="begins with 'Llama'"):
        client(push_lm, folders, "me/between")
    assert "me/between" not in hub.repos
    client(push_lm, folders, "me/Llama-between")
    files = hub.repos["me/Llama-between"].files()
    assert files["LICENSE.txt"] == b"the agreement"
    assert (files["USE_POLICY.md"], files["USE_POLICY-large-lm.md"]) == (b"be kind", b"be wise")
    assert files["NOTICE"].decode().startswith("Llama 3.2 is licensed under")
    assert b"Built with Llama" in files["README.md"]


def test_anchors_on_the_hub_are_base_models_and_read_there(client: HubClient, hub: HubServer, tmp_path: Path) -> None:
    """At the commit that the model was made from, with the token that was passed."""
    names = ("me/Small", "me/Large")
    for name, folder in zip(names, text_anchors(tmp_path), strict=True):
        page(folder, None, {"LICENSE": "do as you like"})
        hub.make(name, {path.name: path.read_bytes() for path in folder.iterdir()}, private=True)
    large = hub.repos["me/Large"]
    used = large.head()
    later = used.files | {"README.md": b"---\nlicense: gpl-3.0\n---\n", "LICENSE": b"share"}
    del later["tokenizer_config.json"], later["tokenizer.json"]
    large.add(later, used.lfs)
    warned = client(publish_of_hub, "me/of-hub", names, RIGHT_TOKEN, target_revision=used.oid, as_token=None)
    assert not [one for one in warned if "anchor" in one or "licence" in one]
    files = hub.repos["me/of-hub"].files()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == (list(names), "merge")
    assert card.data.license == "mit" and files["LICENSE"] == b"do as you like" and "LICENSE-Large" not in files
    assert set(files) >= TOKENIZER_FILES and f"at `{used.oid}`" in card.text
    assert json.loads(files["config.json"])["anchor_names"][0] == "me/Small"


def test_an_anchor_that_is_gone_needs_a_word(client: HubClient, hub: HubServer, folders: Folders) -> None:
    model = stitched_lm(folders)
    model.config.anchor_names[0] = "org/gone"
    with pytest.raises(OSError, match="page of the anchor org/gone .* pass licence="):
        client(publish_object, model, "me/gone")
    assert "me/gone" not in hub.repos
    client(publish_object, model, "me/gone", licence="mit")
    assert "Once" in client(run_code, "me/gone")


# --- images, supernets, probes, scores ---


def test_an_image_classifier_with_its_processor(client: HubClient, hub: HubServer, tmp_path: Path) -> None:
    folders = image_anchors(tmp_path)
    expected = client(push_images, folders, "me/vit")
    assert plain_files(hub, "me/vit") == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    logits, processor = client(load_images, "me/vit")
    assert torch.equal(logits, expected)
    assert list(processor["image_mean"]) == [0.4] * 3 and dict(processor["size"]) == {"height": 32, "width": 32}
    assert "'label': '" in client(run_code, "me/vit")


def test_a_supernet(client: HubClient, hub: HubServer, tmp_path: Path) -> None:
    client(push_supernet, image_anchors(tmp_path), "me/supernet")
    paths = client(all_paths, "me/supernet")
    printed = client(run_code, "me/supernet").splitlines()
    assert [line.rpartition(" ")[0] for line in printed[:-1]] == paths
    assert printed[-1] == "StitchedForImageClassification"
    files = hub.repos["me/supernet"].files()
    assert b"Stitched supernet" in files["README.md"] and str(tmp_path).encode() not in b"".join(files.values())


def test_probes(client: HubClient, hub: HubServer, tmp_path: Path) -> None:
    small, _ = text_anchors(tmp_path)
    loaded = client(push_probes, small, "me/probes", {"input_ids": token_ids(8, 16)})
    assert loaded == ("ProbeNet", "small-lm")
    assert "small-lm" in client(run_code, "me/probes")
    vit, _ = image_anchors(tmp_path)
    batch = {"pixel_values": images("vit", 8, dtype=torch.float32), "labels": torch.arange(8) % 5}
    assert client(push_probes, vit, "me/image-probes", batch) == ("ImageProbeNet", "small-vit")
    for name, kind in (("me/probes", ProbeNet), ("me/image-probes", ImageProbeNet)):
        assert kind.__name__ in hub.repos[name].files()["README.md"].decode()


@pytest.mark.parametrize("probed", [True, False])
def test_scores(probed: bool, client: HubClient, hub: HubServer, tmp_path: Path) -> None:
    repo = f"me/scores-{probed}"
    (tmp_path / "small-lm").mkdir()
    scores, loaded = client(push_scores, tmp_path, repo, probed)
    assert plain_files(hub, repo) == {"README.md", "config.json", "heatmap.png", "scores.safetensors"}
    assert loaded.provenance["source"]["name"] == "small-lm" and loaded.provenance["target"]["name"] == "big/model"
    assert (loaded.values == scores.values)[:, 1:-1].all() and loaded.score == scores.score
    assert str(tmp_path).encode() not in b"".join(hub.repos[repo].files().values())
    assert len(client(run_code, repo).splitlines()) >= 1


def test_scores_of_a_folder(tmp_path: Path) -> None:
    scores = some_scores(tmp_path)
    scores.save(tmp_path / "kept" / "scores.safetensors")
    assert (StitchScores.from_pretrained(tmp_path / "kept").cross == scores.cross).all()
