"""Laws of locks and staging folders: they are this user's own, and what others put in their place is not followed."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from lora_fuse.errors import Refused
from lora_fuse.machine.files import FileRecord
from lora_fuse.machine.staging import exclusive, staging_folder, whole
from tests.support.kills import kill_at_every_step

KEY = "a" * 64
NAME = f".out.partial-{KEY[:16]}"


def test_a_lock_that_is_a_link_is_not_followed_and_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("content")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(Refused, match=r"\.out\.lock cannot be opened \(.*links.*\); it has to be a file"):
        exclusive(tmp_path / "out").__enter__()
    (tmp_path / ".out.lock").unlink()
    os.mkfifo(tmp_path / ".out.lock")
    with pytest.raises(Refused, match="a named pipe"):
        exclusive(tmp_path / "out").__enter__()
    (tmp_path / ".out.lock").unlink()
    (tmp_path / ".out.lock").write_text("stays")
    with exclusive(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == "stays"
    assert (tmp_path / "mine").read_text() == "content"


def test_a_staging_folder_is_closed_to_others_and_what_it_holds_is_not(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(0o777)  # as a version before left it
    with staging_folder(tmp_path / "out", KEY) as staged:
        assert staged.folder.name == NAME
        assert staged.folder.stat().st_mode & 0o777 == 0o700
        umask = os.umask(0)
        os.umask(umask)
        assert staged.files.stat().st_mode & 0o777 == 0o777 & ~umask


def finished(folder: Path) -> None:
    """A staging folder in which files are marked as whole; `b` is not, and `c` is of another size."""
    (folder / "files").mkdir(parents=True)
    (folder / "done").mkdir()
    for name, content in {"a": b"a file", "b": b"a fi1e", "c": b"a"}.items():
        (folder / "files" / name).write_bytes(content)
        mark = {"size": 6, "sha256": hashlib.sha256(b"a file").hexdigest()}
        (folder / "done" / f"{name}.json").write_text(json.dumps(mark))


def test_a_run_goes_on_in_its_own_folder_only_and_with_what_is_whole(tmp_path: Path) -> None:
    told: list[int] = []

    def kept() -> dict[str, FileRecord]:
        with staging_folder(tmp_path / "out", KEY) as staged:
            return staged.keep_finished(["a", "b", "c", "d"], told.append)

    finished(tmp_path / NAME)
    assert kept().keys() == {"a"}
    assert sum(told) == 6
    finished(tmp_path / "planted")
    (tmp_path / NAME).symlink_to("planted")
    assert kept() == {}
    assert (tmp_path / "planted" / "files" / "a").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another user are made by root")
def test_a_folder_of_another_user_is_neither_gone_on_with_nor_put_in_place(tmp_path: Path) -> None:
    finished(tmp_path / NAME)
    os.chown(tmp_path / NAME, 65534, 65534)
    finished(tmp_path / ".out.partial-bbbbbbbbbbbbbbbb")
    (tmp_path / ".out.partial-bbbbbbbbbbbbbbbb" / "previous").mkdir()
    os.chown(tmp_path / ".out.partial-bbbbbbbbbbbbbbbb", 65534, 65534)
    with staging_folder(tmp_path / "out", KEY) as staged:
        assert staged.keep_finished(["a"]) == {}
        assert staged.folder.stat().st_uid == 0
    assert not (tmp_path / "out").exists()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def renewed(out: Path, *, stays: tuple[str, ...] = (), page: str = "page.html") -> None:
    with whole(out, stays=stays) as folder:
        (folder / "pictures").mkdir()
        (folder / "pictures" / "new.png").write_bytes(b"new")
        (folder / page).write_text("new")


def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "old.png").write_bytes(b"old")
    (out / "page.html").write_text("old")
    old = names(out)
    new = {"pictures", "pictures/new.png", "page.html"}
    seen = []

    def look() -> None:
        seen.append(names(out))
        assert (seen[-1], (out / "page.html").read_text()) in ((old, "old"), (new, "new"))

    assert kill_at_every_step(lambda: renewed(out), tmp_path, look) > 5
    assert seen[0] == old
    assert seen[-1] == new
    assert names(tmp_path) == {"out", *(f"out/{name}" for name in new)}  # nothing of a killed run is left


def test_a_failure_leaves_the_folder_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "page.html").write_text("old")
    with pytest.raises(IsADirectoryError):
        renewed(tmp_path / "out", page=".")
    assert names(tmp_path) == {"out", "out/page.html"}
    assert (tmp_path / "out" / "page.html").read_text() == "old"


def test_what_stays_is_taken_along_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "out" / "build").mkdir(parents=True)
    (tmp_path / "out" / "build" / "kept").write_text("kept")
    (tmp_path / "out" / "else").write_text("")
    renewed(tmp_path / "out", stays=("build", "missing"))
    assert names(tmp_path / "out") == {"pictures", "pictures/new.png", "page.html", "build", "build/kept"}


def test_all_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    synced: list[str] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        sync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path).as_posix())

    monkeypatch.setattr(os, "fsync", record)
    renewed(tmp_path / "out")
    files = f".out.partial-{'0' * 16}/files"
    assert {f"{files}/page.html", f"{files}/pictures", f"{files}/pictures/new.png", files} == set(synced[:-1])
    assert synced[-1] == "."
