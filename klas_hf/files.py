"""Writing files and folders complete or absent: an interrupted write, or a power cut, leaves what was there.

And by one process at a time: another one that would write to the same place is refused.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Missing parent folders are made. If `write` raises, `path` keeps what it held. The content is on the disk before it
    is put in place, and its name is when this returns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(descriptor)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o666 & ~_umask())
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_folder_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a hidden folder beside `path`, then put it in place; what was at `path` goes.

    Missing parent folders are made. If `write` raises, or the process dies in it, `path` keeps what it held; what was
    left half done is overwritten by the next call. Between two renames nothing is at `path`: a process that dies there
    leaves what was in a hidden folder, from where the next call brings it back.
    """
    path = Path(path)
    part, replaced = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "replaced"))
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    for written in [*part.rglob("*"), part]:
        _sync(written)
    if replaced.exists():
        remove_folder(replaced)
    if path.exists():
        path.rename(replaced)
    part.rename(path)
    _sync(path.parent)
    if replaced.exists():
        remove_folder(replaced)
    return path


def remove_folder(path: Path) -> None:
    """Remove a folder that is never seen half removed under its name."""
    going = path.with_name(f".{path.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    path.rename(going)
    shutil.rmtree(going)


@contextmanager
def understood(path: str | Path, expected: str) -> Iterator[None]:
    """Say which file it is, and what it should be, where its content makes no sense.

    Raises:
        ValueError: in place of whatever went wrong, for a damaged file gives nearly any error; OSErrors pass.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"got {path}, which is damaged or something else ({type(error).__name__}: {error}); expected {expected}"
        ) from error


class Claim:
    """A file or folder that no other process claims, as long as this lives; a process that dies lets go of it.

    Within a process, `claim` gives every user of a place the same one; `with claim(path):` keeps it meanwhile.

    Raises:
        BlockingIOError: another process has claimed it.
    """

    def __init__(self, path: Path):
        from filelock import FileLock, Timeout

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"got {path}, to which another run is writing; wait for its end, stop it, or name another output"
            ) from error
        finalize(self, _let_go, lock, os.getpid())

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_CLAIMS: "WeakValueDictionary[Path, Claim]" = WeakValueDictionary()


def claim(path: str | Path) -> Claim:
    """The claim to a file or folder, which lasts until nothing holds it; see `Claim`."""
    path = Path(path).absolute()
    found = _CLAIMS.get(path)
    if found is None:
        found = _CLAIMS[path] = Claim(path)
    return found


def _let_go(lock: Any, process: int) -> None:
    if os.getpid() == process:  # not a worker that was forked off
        with suppress(OSError):  # a lock file that is open cannot be removed everywhere
            os.unlink(lock.lock_file)  # still locked: who waits for it sees that it is gone, and makes another
        lock.release()


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk; Windows opens no folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
