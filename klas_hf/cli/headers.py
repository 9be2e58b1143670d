"""What an anchor's safetensors files hold, from their headers alone: no weight is read or downloaded."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from klas_hf.anchors.language import explained_access


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        file: the safetensors file that holds it.
        dtype: as safetensors names it: F32, BF16, …
        shape: its shape.
        bytes: that it takes in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def stored_tensors(anchor: str) -> dict[str, StoredTensor]:
    """Every tensor of an anchor, by Hub id or folder; of the Hub, only the headers are fetched.

    Raises:
        OSError: not to be reached, damaged, or without safetensors weights (pickled ones are not read).
    """
    folder = _local(anchor)
    with explained_access(anchor):
        try:
            if folder is None:
                files = get_safetensors_metadata(anchor).files_metadata
            else:
                files = get_local_safetensors_metadata(folder).files_metadata
                for name in files:
                    with safe_open(folder / name, "pt"):  # compares the header with the length of the file
                        pass
        except NotASafetensorsRepoError as error:
            raise OSError(f"{error} Only safetensors weights are read, never pickled ones") from error
        except (SafetensorsParsingError, SafetensorError) as error:
            raise OSError(f"its weights are damaged ({error}); download or save them again") from error
    return {
        key: StoredTensor(name, tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0])
        for name, file in sorted(files.items())
        for key, tensor in file.tensors.items()
    }


def _local(anchor: str) -> Path | None:
    """The folder of an anchor that is on this machine whole in one file, or None."""
    if Path(anchor).is_dir():
        return Path(anchor)
    cached = try_to_load_from_cache(anchor, "model.safetensors")
    return Path(cached).parent if isinstance(cached, str) else None
