"""Laws of files and disks: large files keep their bytes, JSON is a mapping or refused, too small a disk is refused."""

import errno
import hashlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fuse.errors import BadCheckpoint, NoSpace
from lora_fuse.machine import direct_io, files
from lora_fuse.machine.direct_io import BLOCK, HashingWriter, Reader, Writer, block_memory, too_large_to_cache
from lora_fuse.machine.files import read_json
from lora_fuse.machine.space import free_bytes, require
from lora_fuse.pictures.picture import read_levels

CONTENT = np.random.default_rng(0).bytes(5 * BLOCK + 123)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(CONTENT)
    return path


def forget(path: Path) -> None:
    """Take a file out of the page cache, so that it has to be read from the disk."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@given(start=st.integers(0, len(CONTENT)), nbytes=st.integers(0, 2 * BLOCK), cached=st.booleans())
@settings(deadline=None)
def test_any_part_reads_as_it_is(file: Path, start: int, nbytes: int, cached: bool) -> None:
    if not cached:
        forget(file)
    memory = memoryview(bytearray(nbytes))
    with Reader(file) as source, pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_io, "AT_ONCE", BLOCK)
        got = source.read(memory, start)
    assert bytes(memory[:got]) == CONTENT[start : start + nbytes]


@pytest.mark.parametrize("lengths", [[BLOCK], [BLOCK, 5], [2 * BLOCK, BLOCK, 1], [7], [BLOCK, 9, 9], []])
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_what_was_given(tmp_path: Path, lengths: list[int], direct: bool) -> None:
    memory, at = block_memory(2 * BLOCK), 0
    (tmp_path / "out").write_bytes(b"an older and longer file" * BLOCK)
    with Writer(tmp_path / "out", direct) as sink:
        for nbytes in lengths:
            memory[:nbytes] = CONTENT[at : at + nbytes]
            sink.write(memory, nbytes)
            at += nbytes
    assert (tmp_path / "out").read_bytes() == CONTENT[:at]


@given(st.lists(st.integers(0, 3 * BLOCK), max_size=12))
@settings(deadline=None, max_examples=30)
def test_a_hashed_file_has_the_bytes_and_their_hash(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    path, whole = tmp_path_factory.mktemp("hashed") / "out", b""
    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_io, "WINDOW", 2 * BLOCK)
        with HashingWriter(path, told.append, direct=True) as file:
            for nbytes in lengths:
                file.append(CONTENT[:nbytes])
                whole += CONTENT[:nbytes]
            record = file.finish()
    assert path.read_bytes() == whole
    assert (record.size, record.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert sum(told) == len(whole)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_may_not_grow_is_an_error(tmp_path: Path, direct: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, before[1]))
    try:
        with HashingWriter(tmp_path / "out", lambda _: None, direct) as file:
            file.append(CONTENT)
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                file.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_only_what_is_small_beside_the_memory_goes_into_the_cache() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert [too_large_to_cache(nbytes) for nbytes in (1, memory)] == [False, True]


def test_a_json_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"b": [1]}')
    assert read_json(tmp_path / "a.json", dict, BadCheckpoint) == {"b": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json is not readable JSON \(.*No such file.*\); fetch it again"),
        (b"{", r"a\.json is not readable JSON \(Expecting .*\); fetch it again"),
        (b"\xff", r"a\.json is not readable JSON \(.*not UTF-8.*\); fetch it again"),
        (b"[1]", r"a\.json holds a list, not a mapping; fetch it again"),
        (b"[" * 100_000, r"a\.json is not readable JSON \(.*recursion.*\); fetch it again"),
    ],
    ids=["missing", "truncated", "not text", "a list", "too deep"],
)
def test_what_is_no_json_mapping_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message):
        read_json(tmp_path / "a.json", dict, BadCheckpoint, "fetch it again")


def test_a_disk_with_less_than_is_needed_is_refused_with_both_numbers(tmp_path: Path) -> None:
    there = tmp_path / "not/yet"
    require(there, 1, "the file", "make room")
    need = 2 * free_bytes(there) + 1
    with pytest.raises(NoSpace, match=rf"the file needs .* \({need} bytes\), and the disk of .*yet has .* free; make"):
        require(there, need, "the file", "make room")


def make(path: Path, kind: str) -> Path:
    """Something that is no regular file; opened like one, a pipe waits for ever."""
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a folder"])
@pytest.mark.parametrize("read", [files.open_regular, files.read_bytes, files.hash_file, read_levels])
def test_only_regular_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, read: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
        read(make(Path("x"), kind))


def test_what_is_read_whole_has_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    assert files.read_bytes(path, 4) == b"1234"
    with pytest.raises(OSError, match="it has 4 bytes, and at most 3 are read"):
        files.read_bytes(path, 3)
    os.truncate(path, files.MOST + 1)  # a hole: it takes no room
    with pytest.raises(BadCheckpoint, match=f"has {files.MOST + 1} bytes, and at most {files.MOST} are read"):
        read_json(path, dict, BadCheckpoint)
    if Path("/proc/self/maps").exists():  # whose size is 0, whatever it holds
        with pytest.raises(OSError, match="it has 11 bytes, and at most 10 are read"):
            files.read_bytes(Path("/proc/self/maps"), 10)


def hub_cache(folder: Path) -> Path:
    """A snapshot in which `shown` is a link to a blob, and `shared` one by way of what repositories share."""
    blobs = folder / "models--a--b" / "blobs"
    snapshot = folder / "models--a--b" / "snapshots" / "1"
    for made in (blobs, snapshot, folder / "blobs"):
        made.mkdir(parents=True)
    (blobs / "ab").write_text("content")
    (folder / "blobs" / "cd").write_text("content")
    (blobs / "cd").symlink_to("../../blobs/cd")
    (blobs / "ef").symlink_to("/etc/hostname")
    for name, blob in {"shown": "ab", "shared": "cd", "forged": "ef"}.items():
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_links_into_the_hubs_cache_are_its_own(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub")
    base = tmp_path / "base"
    base.mkdir()
    (base / "blob").symlink_to(snapshot.parents[1] / "blobs" / "ab")  # as older clients make local folders
    (base / "file").symlink_to(snapshot / "shown")
    (base / "folder").symlink_to(snapshot)
    (tmp_path / "whole").symlink_to(snapshot)
    for root, name in ((snapshot, "shown"), (snapshot, "shared"), (tmp_path / "whole", "shared")):
        assert files.inside(root, name).read_text() == "content"
    for name in ("blob", "file", "folder/shown", "folder/shared"):
        assert files.inside(base, name).read_text() == "content"


@pytest.mark.parametrize("name", ["forged", "models--x/blobs/k", "key", "up", "sub/key", "aside/key"])
def test_no_link_leads_out_of_a_folder(tmp_path: Path, name: str) -> None:
    base = hub_cache(tmp_path / "hub")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "key").write_text("secret")
    (base / "models--x" / "blobs").mkdir(parents=True)
    (base / "models--x" / "blobs" / "k").symlink_to(tmp_path / "blobs" / "key")
    (base / "key").symlink_to(tmp_path / "blobs" / "key")
    (base / "up").symlink_to("models--x/blobs/k")
    (base / "sub").mkdir()
    (base / "sub" / "key").symlink_to(tmp_path / "blobs" / "key")
    (base / "aside").symlink_to(tmp_path / "blobs")
    (base / ".git").mkdir()
    with pytest.raises(OSError, match=r"a link leads to .*(key|hostname), out of .*: copy the file"):
        files.inside(base, name)


def test_what_a_killed_process_prepared_is_removed_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = [f".record.json.{process}.partial" for process in (ended.pid, os.getppid(), 10**30)]
    others = [".record.json.0.partial", ".record.json.partial", f".another.json.{ended.pid}.partial"]
    for name in [*names, *others]:
        (tmp_path / name).write_text("half")
    files.replace_text(tmp_path / "record.json", "{}")
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", names[1], *others}


def test_what_another_user_put_in_the_place_of_the_next_content_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = tmp_path / f".record.json.{os.getpid()}.partial"
    planted.symlink_to(victim)
    files.replace_text(tmp_path / "record.json", "{}")
    assert (victim.read_text(), (tmp_path / "record.json").read_text()) == ("precious", "{}")
    (tmp_path / f".probe-{os.getpid()}").symlink_to(victim)
    files.link_between(tmp_path, tmp_path, read_only=True)
    assert (victim.read_text(), victim.stat().st_mode & 0o200) == ("precious", 0o200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json", "victim"]
