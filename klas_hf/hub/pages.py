"""Anchors as they are on the Hub or in a folder: what their cards, licence files and tokenizers say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id


@dataclass(frozen=True)
class AnchorPage:
    """Where an anchor can be read about.

    Attributes:
        name: Hub id or folder that the anchor was loaded from; None for a model that was only ever in memory.
        revision: its commit on the Hub, where known.
        base_model: the Hub id that the card names as its base model; None where it has none.
    """

    name: str | None
    revision: str | None = None
    base_model: str | None = None

    @property
    def title(self) -> str:
        """How the card calls it; of a folder only the last part, for the rest is the user's own business."""
        if self.base_model:
            return self.base_model
        return Path(self.name).name if self.name else "a model in memory"

    @property
    def folder(self) -> Path | None:
        return Path(self.name) if self.name and Path(self.name).is_dir() else None

    def card(self, token: str | bool | None = None) -> ModelCard | None:
        """Its model card, or None where it has none.

        Raises:
            OSError: it should be on the Hub, but cannot be read.
        """
        path = self.file("README.md", token)
        return None if path is None else ModelCard.load(path, ignore_metadata_errors=True)

    def file(self, name: str, token: str | bool | None = None) -> Path | None:
        """The local path of one of its files, downloaded if need be; None where it has no such file.

        Raises:
            OSError: the anchor should be on the Hub, but cannot be read.
        """
        if self.folder:
            return self.folder / name if (self.folder / name).is_file() else None
        if self.base_model is None:
            return None
        try:
            return Path(hf_hub_download(self.base_model, name, revision=self.revision, token=token))
        except RemoteEntryNotFoundError:
            return None
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise self._unreadable(error) from error

    def files(self, token: str | bool | None = None) -> list[str]:
        """Names of its files, those in folders of it left out.

        Raises:
            OSError: it should be on the Hub, but cannot be read.
        """
        if self.folder:
            return sorted(path.name for path in self.folder.iterdir() if path.is_file())
        if self.base_model is None:
            return []
        try:
            names = HfApi(token=token).list_repo_files(self.base_model, revision=self.revision)
        except (HfHubHTTPError, ConnectionError) as error:
            raise self._unreadable(error) from error
        return sorted(name for name in names if "/" not in name)

    def _unreadable(self, error: Exception) -> OSError:
        reason = str(error).strip().splitlines()[0]
        return OSError(
            f"cannot read the page of the anchor {self.title} on the Hub ({reason}); expected its card and licence. "
            "If the name was that of a folder, say by base_model=[…] which models on the Hub the anchors are; if the "
            "anchor is gone, pass licence=…, and save the tokenizer or image processor into the model's folder or pass "
            "tokenizer_or_processor=…"
        )


def anchor_pages(
    anchors: Sequence[tuple[str | None, str | None]], base_models: Sequence[str] | None = None
) -> tuple[AnchorPage, ...]:
    """The pages of anchors.

    Args:
        anchors: name and revision of each.
        base_models: the Hub id of each, for anchors that were read from folders; None goes by the names.

    Raises:
        ValueError: not as many Hub ids as anchors.
    """
    if base_models is None:
        return tuple(AnchorPage(name, revision, _hub_id(name)) for name, revision in anchors)
    if isinstance(base_models, str) or len(base_models) != len(anchors):
        raise ValueError(f"got base_model={base_models!r}; expected a list of {len(anchors)} Hub ids, one per anchor")
    given = zip(anchors, base_models, strict=True)
    return tuple(AnchorPage(name, revision, base_model) for (name, revision), base_model in given)


def _hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id: `user/model`, and no folder."""
    if name is None or "/" not in name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
