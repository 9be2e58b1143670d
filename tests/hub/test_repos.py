"""Tokens, private repos, repos that hold something else, and what breaks on the way to the Hub."""

from pathlib import Path

import pytest
import torch
from hub_calls import (
    STITCHED_FILES,
    TOKENIZER_FILES,
    Folders,
    downloaded_from_half,
    expected_of,
    logits_of,
    plain_files,
    publish_object,
    push_lm,
    push_nowhere,
    push_to_a_busy_repo,
    without_waiting,
)
from hub_client import HubClient
from hub_examples import (
    stitched_lm,
    text_anchors,
)
from hub_server import OTHER_TOKEN, READ_TOKEN, RIGHT_TOKEN, WRONG_TOKEN, HubServer
from tiny_models import token_ids

from klas_hf import (
    StitchedModel,
)

pytestmark = pytest.mark.filterwarnings("ignore:the stitching layer is random")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return text_anchors(tmp_path)


# --- tokens and private repos ---


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "got no token to write to me/denied.*hf auth login"),
        (WRONG_TOKEN, "the Hub refused the token.*Invalid user token"),
        (READ_TOKEN, "can only read; expected one with write access to me/denied"),
        (OTHER_TOKEN, "may not write to me/denied"),
    ],
)
def test_tokens_that_will_not_do(
    token: str | None, message: str, client: HubClient, hub: HubServer, folders: Folders
) -> None:
    with pytest.raises(PermissionError, match=message):
        client(push_lm, folders, "me/denied", as_token=token)
    assert "me/denied" not in hub.repos


def test_a_token_can_be_passed_and_a_bare_name_is_ones_own(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "bare", token=RIGHT_TOKEN, as_token=None)
    assert 'from_pretrained("me/bare")' in hub.repos["me/bare"].files()["README.md"].decode()
    with pytest.raises(PermissionError, match="refused the token"):
        client(push_lm, folders, "bare", token=WRONG_TOKEN)


def test_private_repos(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "me/secret", private=True)
    assert hub.repos["me/secret"].private
    assert torch.equal(client(logits_of, "me/secret")[0], expected_of(folders)[0])
    for token in (None, OTHER_TOKEN):
        with pytest.raises(OSError, match="me/secret"):
            client(logits_of, "me/secret", as_token=token, force_download=True)
    with pytest.raises(PermissionError, match="may not write to me/secret"):
        client(push_lm, folders, "me/secret", as_token=OTHER_TOKEN)
    with pytest.raises(ValueError, match="got private=False for me/secret, which is there and private"):
        client(push_lm, folders, "me/secret", private=False)
    assert len(hub.repos["me/secret"].branches["main"]) == 2
    client(push_lm, folders, "me/secret", private=True, commit_description="why", tags=["t"])
    assert hub.repos["me/secret"].head().message == "Upload StitchedForCausalLM\n\nwhy"


# --- repos that hold something ---


@pytest.mark.parametrize(
    ("name", "files", "why"),
    [
        ("llama", {"config.json": '{"model_type": "llama"}', "model.safetensors": "x"}, "model_type='llama'"),
        ("gguf", {"model.gguf": "x"}, "model.gguf, with"),
        ("weights", {"model.safetensors": "x", "README.md": "# Mine"}, "model_type=None"),
    ],
)
def test_other_content_is_not_replaced_unasked(
    name: str, files: dict[str, str], why: str, client: HubClient, hub: HubServer, folders: Folders
) -> None:
    repo = hub.make(f"me/{name}", {key: content for key, content in files.items()})
    before = repo.head().oid
    with pytest.raises(ValueError, match=f"holds something else: .*{why}.*overwrite=True"):
        client(push_lm, folders, f"me/{name}")
    assert repo.head().oid == before
    client(push_lm, folders, f"me/{name}", overwrite=True)
    assert plain_files(hub, f"me/{name}") == STITCHED_FILES | TOKENIZER_FILES


def test_a_repo_with_a_mere_readme_is_free(client: HubClient, hub: HubServer, folders: Folders) -> None:
    hub.make("me/readme", {"README.md": "# Soon", "LICENSE": "mine", ".gitignore": "x"})
    client(push_lm, folders, "me/readme")
    assert {".gitignore", "LICENSE"} | STITCHED_FILES <= set(hub.repos["me/readme"].files())


def test_another_stitch_is_other_content_and_the_same_one_is_not(
    client: HubClient, hub: HubServer, folders: Folders
) -> None:
    client(push_lm, folders, "me/stitch")
    other = StitchedModel.from_anchors(*folders, (1, 3), calibration=[token_ids(8, 16)])
    with pytest.raises(ValueError, match=r"path=.0\[:2\] 1\[3:\]. \(here: .0\[:1\] "):
        client(publish_object, other, "me/stitch")
    trained = stitched_lm(folders)
    with torch.no_grad():
        trained.stitching_layers()[0].bias.add_(1.0)
        expected = trained(token_ids(2, 9)).logits
    client(publish_object, trained, "me/stitch", commit_message="better")
    assert hub.repos["me/stitch"].head().message == "better"
    assert torch.equal(client(logits_of, "me/stitch")[0], expected)


def test_branches_and_pull_requests(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "me/branches", revision="try")
    repo = hub.repos["me/branches"]
    assert not repo.files() and set(repo.files("try")) >= STITCHED_FILES
    assert torch.equal(client(logits_of, "me/branches", revision="try")[0], expected_of(folders)[0])
    client(push_lm, folders, "me/branches", revision="try", tags=["again"])
    assert len(repo.branches["try"]) == 3
    client(push_lm, folders, "me/branches", revision="second")  # of a repo that is there
    assert set(repo.files("second")) >= STITCHED_FILES and not repo.files()
    commit = client(push_lm, folders, "me/branches", create_pr=True)
    assert not repo.files() and set(repo.files(commit.pr_revision)) >= STITCHED_FILES


# --- what breaks on the way ---


def test_an_upload_that_is_cut_leaves_the_repo_as_it_was(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "me/cut", tags=["first"])
    before = hub.repos["me/cut"].head().oid
    model = stitched_lm(folders)
    with torch.no_grad():
        model.stitching_layers()[0].bias.add_(0.5)
        expected = model(token_ids(2, 9)).logits
    hub.cut_uploads = 1000
    with pytest.raises(ConnectionError, match="broke off .*model.safetensors.* Nothing was committed to me/cut"):
        client(without_waiting, publish_object, model, "me/cut")
    hub.cut_uploads = 0
    assert hub.repos["me/cut"].head().oid == before
    assert torch.equal(client(logits_of, "me/cut")[0], expected_of(folders)[0])
    client(publish_object, model, "me/cut")
    assert torch.equal(client(logits_of, "me/cut")[0], expected)


def test_a_new_repo_whose_upload_is_cut_stays_empty(client: HubClient, hub: HubServer, folders: Folders) -> None:
    model = stitched_lm(folders)
    with torch.no_grad():
        model.stitching_layers()[0].bias.add_(0.25)
    hub.cut_uploads = 1000
    with pytest.raises(ConnectionError, match="Nothing was committed"):
        client(without_waiting, publish_object, model, "me/cut-new")
    hub.cut_uploads = 0
    assert not hub.repos["me/cut-new"].files()
    with pytest.raises(ValueError, match="me/cut-new"):
        client(logits_of, "me/cut-new")
    hub.cut_uploads = 1  # the client tries again by itself
    client(without_waiting, publish_object, model, "me/cut-new")
    assert hub.cut_uploads == 0 and set(hub.repos["me/cut-new"].files()) >= STITCHED_FILES


def test_a_commit_that_fails_leaves_the_repo_as_it_was(client: HubClient, hub: HubServer, folders: Folders) -> None:
    hub.fail_commits = 1
    with pytest.raises(ConnectionError, match="the Hub failed .*500.* Nothing was committed to me/failing"):
        client(push_lm, folders, "me/failing")
    assert hub.fail_commits == 0 and not hub.repos["me/failing"].files()
    client(push_lm, folders, "me/failing")
    assert set(hub.repos["me/failing"].files()) >= STITCHED_FILES


def test_a_repo_that_changes_meanwhile_is_not_written_over(client: HubClient, hub: HubServer, folders: Folders) -> None:
    client(push_lm, folders, "me/busy")
    with pytest.raises(ConnectionError, match="changed by somebody else"):
        client(push_to_a_busy_repo, folders, "me/busy")
    assert hub.repos["me/busy"].files()["notes.md"] == b"mine"


def test_a_hub_that_is_not_there(client: HubClient, folders: Folders) -> None:
    with pytest.raises(ConnectionError, match="Nothing was committed to me/nowhere"):
        client(push_nowhere, folders)


@pytest.mark.parametrize("part_size", [10_000, None])
def test_uploads_in_parts(part_size: int | None, client: HubClient, hub: HubServer, folders: Folders) -> None:
    model = stitched_lm(folders)
    with torch.no_grad():
        model.stitching_layers()[0].bias.add_(float(part_size or 7))
        expected = model(token_ids(2, 9)).logits
    hub.part_size, since = part_size, len(hub.requests)
    client(publish_object, model, f"me/parts-{part_size}")
    hub.part_size = None
    assert any("/part/2" in request for request in hub.requests[since:]) == (part_size is not None)
    assert torch.equal(client(logits_of, f"me/parts-{part_size}")[0], expected)


def test_the_server_answers_ranges(client: HubClient, hub: HubServer) -> None:
    content = bytes(range(250)) * 100
    hub.make("me/range", {"a.safetensors": content, "b.txt": "text"})
    assert client(downloaded_from_half, "me/range", "a.safetensors") == content
    assert client(downloaded_from_half, "me/range", "b.txt") == b"text"
