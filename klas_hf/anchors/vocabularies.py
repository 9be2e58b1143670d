"""Whether two anchors mean the same text by the same token ids."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from klas_hf.models.checkpoint_files import VOCABULARY_FILES


def tokenizer_vocabulary(name: str | None, **hub: Any) -> dict[str, int] | None:
    """The token → id map of the tokenizer that lies with an anchor; None where there is none."""
    if not name:
        return None
    try:
        files = (
            cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) for file in VOCABULARY_FILES
        )
        if not any(files):  # AutoTokenizer would make up an empty one
            return None
        return AutoTokenizer.from_pretrained(name, **hub).get_vocab()
    except (OSError, ValueError, KeyError, TypeError):  # what AutoTokenizer raises where there is no tokenizer
        return None


def check_vocabularies(
    first: str | None, first_config: PreTrainedConfig, last: str | None, last_config: PreTrainedConfig, **hub: Any
) -> None:
    """Compare the anchors' token → id maps, or sizes where an anchor has no tokenizer with it.

    Raises:
        ValueError: they differ.
    """
    one, other = tokenizer_vocabulary(first, **hub), tokenizer_vocabulary(last, **hub)
    if one is not None and other is not None:
        differing = sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
        if differing:
            raise ValueError(
                f"got vocabularies that differ in {len(differing):,} tokens (such as {differing[:3]}): the same id "
                f"means different text to {first} and {last}; expected anchors that share a tokenizer"
            )
    if first_config.vocab_size != last_config.vocab_size:
        raise ValueError(
            f"got vocabularies of {first_config.vocab_size:,} and {last_config.vocab_size:,} entries; expected anchors "
            "that share a tokenizer and the size of its embedding. Where one is only padded, resize it with "
            "model.resize_token_embeddings and pass the models"
        )
