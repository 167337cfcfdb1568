"""Laws of locks and staging folders: they are this user's own, and what others put in their place is not followed."""

import os
from pathlib import Path

import pytest

from lora_fuse.errors import Refused
from lora_fuse.machine.files import FileRecord
from lora_fuse.machine.staging import exclusive, staging_folder

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
    """A staging folder in which a file is marked as whole."""
    (folder / "files").mkdir(parents=True)
    (folder / "done").mkdir()
    (folder / "files" / "a").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (folder / "done" / "a.json").write_text(f'{{"size": 0, "sha256": "{empty}"}}')


def test_a_run_goes_on_in_its_own_folder_only(tmp_path: Path) -> None:
    def kept() -> dict[str, FileRecord]:
        with staging_folder(tmp_path / "out", KEY) as staged:
            return staged.keep_finished(["a"])

    finished(tmp_path / NAME)
    assert kept().keys() == {"a"}
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
