"""Publishing on the Hub, whole or not at all.

The folder is made and everything is checked here first; what goes up goes up in one commit on the commit that was
looked at, so nobody ever downloads half of it, and nothing that was there is lost unasked.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from transformers import PreTrainedModel

from klas_hf.hub.cards import model_card
from klas_hf.hub.folder import carry_legal_files, draw_picture, find_processor, picture_name, save
from klas_hf.hub.licences import is_legal_file
from klas_hf.hub.subject import Subject, identity
from klas_hf.hub.subjects import describe
from klas_hf.rows import ResultRow
from klas_hf.scores.values import StitchScores

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_HARMLESS = (".gitattributes", ".gitignore", "README.md")


def publish(
    what: PreTrainedModel | StitchScores,
    repo_id: str,
    *,
    tokenizer_or_processor: Any = None,
    card: ModelCard | None = None,
    rows: Sequence[ResultRow] | None = None,
    metric: str | None = None,
    cost: str = "macs",
    base_model: Sequence[str] | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str = "50GB",
    **about: Any,
) -> CommitInfo:
    """Put a stitched model, a supernet, probes or scores on the Hub, with a card and all that is needed to use it.

    Args:
        what: the model, probes or scores.
        repo_id: `user/name`, or `name` in the user's own namespace; made if it is not there.
        tokenizer_or_processor: None takes the last anchor's, where it has one.
        card: a card of your own, such as one of `model_card` that you went on writing; None writes one.
        rows: what was measured, of this model and the others on its curve, which is drawn.
        metric: the figure of the curve; None takes the first.
        cost: what the curve is drawn over, as for `TradeoffCurve`.
        base_model: Hub ids of the anchors, where they were read from folders.
        private: whether a new repo is private; None leaves it to the Hub.
        overwrite: replace whatever the repo holds, instead of refusing if that is something else.
        token: None takes the one that is logged in.
        revision: branch, made if it is not there; None takes main.
        create_pr: open a pull request instead of committing.
        commit_message, commit_description: of the commit.
        max_shard_size: of a weight file, as for `save_pretrained`.
        about: the other arguments of `model_card`: dataset, split, licence, training, tags.

    Returns:
        The commit, or the last one where nothing has changed.

    Raises:
        PermissionError: no token, a wrong one, or one that may not write there.
        ValueError: the repo holds something else, or is public where private was asked for; what `model_card` refuses.
        ConnectionError: the Hub was not reached, or the upload broke off: then nothing was committed.

    Example:
        >>> model = StitchedModel.from_anchors(source, target, stitch=(2, 1), calibration=batches)
        >>> publish(model, "me/between", rows=rows, dataset="my_text", private=True)  # doctest: +SKIP
        >>> publish(target, "me/between")  # an anchor is refused before the Hub is asked
        Traceback (most recent call last):
        TypeError: got LlamaForCausalLM; expected StitchScores or one of StitchedForCausalLM, ...
    """
    subject = describe(what, base_model)
    api = HfApi(token=token)
    repo_id = _full_name(api, repo_id)
    with _connected(repo_id):
        info = _look(api, repo_id, revision, private)
        stale = [] if info is None else _check_content(api, info, subject, overwrite)
    processor = tokenizer_or_processor or find_processor(subject, token)
    if card is not None:
        about.setdefault("licence", card.data.get("license"))
    written = model_card(
        what, repo_id, rows=rows, cost=cost, base_model=base_model, token=token, processor=processor is not None,
        picture=picture_name(what, rows), **about,
    )  # fmt: skip
    with TemporaryDirectory() as name:
        folder = Path(name)
        (card or written).save(folder / "README.md")
        draw_picture(folder, what, subject, rows, metric, cost)
        carry_legal_files(folder, subject, token)
        save(folder, what, subject, max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        additions = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        added = {operation.path_in_repo for operation in additions}
        deletions = [CommitOperationDelete(path) for path in stale if path not in added]
        with _connected(repo_id):
            parent = _make(api, repo_id, info, revision, private)
            return api.create_commit(
                repo_id, [*deletions, *additions], commit_message=commit_message or f"Upload {type(what).__name__}",
                commit_description=commit_description, revision=revision, create_pr=create_pr, parent_commit=parent,
            )  # fmt: skip


# --- the repo ---


def _full_name(api: HfApi, repo_id: str) -> str:
    """The repo with its namespace; the token is tried by it.

    Raises:
        PermissionError: no token, a wrong one, or one that can only read.
        ConnectionError: the Hub was not reached.
    """
    with _connected(repo_id):
        try:
            user = api.whoami()
        except LocalTokenNotFoundError as error:
            raise PermissionError(
                f"got no token to write to {repo_id} with; expected one with write access. Log in with "
                "`hf auth login`, set HF_TOKEN, or pass token=…"
            ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"got a token of {user['name']} that can only read; expected one with write access to {repo_id}. Make one "
            "at https://huggingface.co/settings/tokens"
        )
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def _look(api: HfApi, repo_id: str, revision: str | None, private: bool | None) -> ModelInfo | None:
    """What the repo holds at the branch (on main, if the branch is still to be made), or None if there is no repo.

    Raises:
        ValueError: it is private where it should be public, or the other way round.
    """
    try:
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    if private is not None and info.private != private:
        words = {True: "private", False: "public"}
        raise ValueError(
            f"got private={private} for {repo_id}, which is there and {words[bool(info.private)]}; expected a new "
            "repo. Change its settings on the Hub first, or leave private out"
        )
    return info


def _check_content(api: HfApi, info: ModelInfo, subject: Subject, overwrite: bool) -> list[str]:
    """The files that the commit is to delete unless it replaces them.

    Raises:
        ValueError: the repo holds something else, and nobody said that it may be replaced.
    """
    there = [one.rfilename for one in info.siblings or []]
    content = [name for name in there if name not in _HARMLESS and not is_legal_file(name)]
    if overwrite:
        return [name for name in there if name != ".gitattributes"]
    if content:
        config: Mapping[str, Any] = {}
        if "config.json" in content:
            path = hf_hub_download(info.id, "config.json", revision=info.sha, token=api.token)
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        found = identity(config)
        wanted = json.loads(json.dumps(dict(subject.identity)))
        if found != wanted:
            keys = [key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key)]
            holds = ", ".join(f"{key}={found.get(key)!r} (here: {wanted.get(key)!r})" for key in sorted(keys))
            raise ValueError(
                f"got the repo {info.id}, which holds something else: {', '.join(content[:5])}"
                f"{' …' if len(content) > 5 else ''}, with {holds}; expected a new repo, or one of this very "
                f"{subject.kind.lower()}. Choose another name, or pass overwrite=True to replace all that is there"
            )
    return [name for name in there if any(fnmatch(name, pattern) for pattern in _WEIGHTS)]


def _make(api: HfApi, repo_id: str, info: ModelInfo | None, revision: str | None, private: bool | None) -> str | None:
    """The commit to build on; repo and branch are made if they are not there.

    A repo that was there is built upon as it was looked at: if it has changed since, the Hub refuses the commit.
    """
    if info is None:
        api.create_repo(repo_id, private=private)
    if revision is not None and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision)
    return api.model_info(repo_id, revision=revision).sha if info is None else info.sha


@contextmanager
def _connected(repo_id: str) -> Iterator[None]:
    """Say what an error on the way to the Hub means."""
    try:
        yield
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        status = error.response.status_code
        if status in (401, 403, 404):
            raise PermissionError(
                f"the Hub refused the token, or it may not write to {repo_id} ({reason}); expected a token with write "
                "access to that namespace. Look at `hf auth whoami`. Nothing was committed"
            ) from error
        if status == 412:
            raise ConnectionError(
                f"{repo_id} was changed by somebody else meanwhile ({reason}). Nothing was committed: publish again"
            ) from error
        raise ConnectionError(f"the Hub failed ({reason}). Nothing was committed to {repo_id}: try again") from error
    except (HTTPError, RuntimeError) as error:  # huggingface_hub makes a RuntimeError of a broken upload
        raise ConnectionError(
            f"the connection to the Hub broke off ({error}: {error.__cause__ or 'no answer'}). Nothing was committed "
            f"to {repo_id}: try again"
        ) from error
