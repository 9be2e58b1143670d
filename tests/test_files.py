"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from klas_hf.files import remove_folder, write_atomically, write_folder_atomically


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


def test_a_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen, synced = tmp_path / "new" / "model", [], []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))

    def half(part: Path) -> None:
        (part / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def whole(part: Path) -> None:
        seen.append(path.exists())
        (part / "deep").mkdir()
        (part / "deep" / "weights").write_text("1")

    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(path, half)
    assert not path.exists() and not synced
    for _ in range(2):
        assert write_folder_atomically(path, whole) == path
    assert [one.name for one in path.parent.iterdir()] == ["model"]
    assert [one.name for one in path.rglob("*")] == ["deep", "weights"] and seen == [False, True]
    part = str(path.with_name(".model.part"))
    assert synced == 2 * [f"{part}/deep", f"{part}/deep/weights", part, str(path.parent)]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_that_dies_while_it_replaces_a_folder_loses_nothing(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many renames: of the old one away, of the new one into its place, of the old one once more."""
    path, rename, done = tmp_path / "model", Path.rename, []
    write_folder_atomically(path, lambda part: (part / "old").write_text(""))

    def until(one: Path, other: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(other)
        return rename(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until)
        with pytest.raises(KeyboardInterrupt):
            write_folder_atomically(path, lambda part: (part / "new").write_text(""))

    def fails(part: Path) -> None:
        assert [one.name for one in path.iterdir()] == ["new" if renames == 2 else "old"]
        raise OSError

    with pytest.raises(OSError):
        write_folder_atomically(path, fails)
    assert path.exists()
    write_folder_atomically(path, lambda part: (part / "third").write_text(""))
    assert [one.name for one in path.iterdir()] == ["third"] and [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_folder_half_removed_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    (path / "deep").mkdir(parents=True)

    def killed(folder: Path, **options: bool) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(path)
    assert not path.exists()
    write_folder_atomically(path, lambda part: None)
    remove_folder(path)
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: calls.append(name) or real(*given))
    write_atomically(tmp_path / "file.txt", lambda part: part.write_text("new"))
    assert calls == ["fsync", "replace", "fsync"]
