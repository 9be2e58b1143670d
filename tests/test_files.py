"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from klas_hf.files import write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    assert write_atomically(path, lambda part: part.write_text("one")) == path
    write_atomically(str(path), lambda part: part.write_text("two"))
    assert path.read_text() == "two" and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: type) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(part: Path) -> None:
        part.write_text("half of the n")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_the_old_content_is_there_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    seen = []

    def write(part: Path) -> None:
        part.write_text("new")
        seen.append(path.read_text())
        assert part.suffix == path.suffix and part.parent == path.parent  # one file system: replacing is one step

    with path.open() as reader:
        write_atomically(path, write)
        assert reader.read() == "old"  # the file was replaced, not written into
    assert seen == ["old"] and path.read_text() == "new"


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "ours", lambda part: part.write_text(""))
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
