"""A base that never lies on this machine: its small files and the headers of its weights do, in a folder of its own.

The folder looks like the base: every file has its name and its size, and all but weights are whole and checked. Where
weights should be is a hole behind their header. So a plan is made as of any base, from headers alone; whoever wants the
weights themselves takes them from `StreamedBase.files`, once and in order. The folder is private, and removed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint, BadSource, Refused, WrongContent
from lora_fuse.hub.client import is_offline
from lora_fuse.hub.locks import DEFAULT_TRANSFER
from lora_fuse.hub.repository import open_repository
from lora_fuse.hub.sources import FileSource, VerifiedFiles, choose_pipeline, refuse_missing
from lora_fuse.hub.streaming.arriving_file import ArrivingFile, Lanes
from lora_fuse.hub.streaming.remote_file import RemoteFile, end_waiting
from lora_fuse.machine import FileRecord, direct_io, files, progress, staging, text
from lora_fuse.recipe import Lock, Source, hf_cache, sections

SCHEME = "hf://"
PLACE = re.compile(r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<revision>\S+))?")
COMMIT = re.compile("[0-9a-f]{40}")
FOLDER = "lora-fuse-stream-"
YOUNG = 60.0  # seconds: a folder that was just made is not locked yet
NEAR = 1 << 17  # bytes between two places of a file that take less time than another question
FIRST = 1 << 16  # bytes of a file that are asked for at first: most headers are in them


class HubFiles:
    """The weights of a commit, to be read while they arrive; `direct_io.StreamedFiles` says how."""

    def __init__(self, source: tuple[str, str], records: Mapping[str, FileRecord], lanes: Lanes, stall: float) -> None:
        """`source` are a repository and a commit of it, `stall` seconds that may pass without a byte."""
        self.label = "@".join(source)
        self.records = records
        self._source = source
        self._lanes = lanes
        self._stall = stall
        self._remotes: dict[str, RemoteFile] = {}
        self._all: weakref.WeakSet[RemoteFile] = weakref.WeakSet()
        self._opening = threading.Lock()

    def open(self, name: str, read: bytes = b"") -> ArrivingFile:
        """Read a file, see `direct_io.StreamedFiles.open`."""
        return ArrivingFile(self._remote(name), self._lanes, read)

    def read(self, name: str, wanted: Sequence[tuple[memoryview, int]]) -> None:
        """Read any bytes of a file, see `direct_io.StreamedFiles.read`."""
        remote = self._remotes.get(name) or self._remotes.setdefault(name, self._remote(name))
        list(self._lanes.threads.map(lambda some: _read_together(remote, some), _near(wanted)))

    def write_header(self, name: str, path: Path) -> None:
        """Make a file of the right size that has a file's header and a hole; who opens it says whether it has one."""
        size = self.records[name].size
        start = memoryview(bytearray(min(FIRST, size)))
        remote = self._remote(name)
        remote.read(start, 0)
        end = min(8 + int.from_bytes(start[:8], "little"), size, files.MOST)
        rest = memoryview(bytearray(max(0, end - len(start))))
        remote.read(rest, len(start))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(start[:end])
            file.write(rest)
            file.truncate(size)

    def stop(self) -> None:
        """End all that is being read."""
        with self._opening:
            for remote in self._all:
                remote.close()
        end_waiting()

    def _remote(self, name: str) -> RemoteFile:
        remote = RemoteFile(*self._source, name, self.records[name], self._stall)
        with self._opening:
            self._all.add(remote)
        return remote

    def twice(self, name: str, work: Callable[[], FileRecord]) -> FileRecord:
        """Do work on a file, and once more where that was refused for its bytes.

        Raises:
            BadSource: they were wrong twice.
            BadCheckpoint: so the work says of them, twice.
        """
        try:
            return work()
        except (WrongContent, BadCheckpoint) as error:
            text.say(f"{error}; fetching {name} again", sys.stderr)
        try:
            return work()
        except WrongContent as error:
            raise BadSource(f"{error}; it was fetched twice, so report it to its owner") from error


@dataclass(frozen=True, slots=True)
class StreamedBase:
    """A base on the Hub: `root` looks like its folder, `lock` pins it, and `files` are the weights on their way."""

    root: Path
    lock: Lock
    files: HubFiles


def _near(wanted: Sequence[tuple[memoryview, int]]) -> Iterator[list[tuple[memoryview, int]]]:
    """Group what is wanted of a file: what lies nearly together is asked for together."""
    group: list[tuple[memoryview, int]] = []
    end = 0
    for memory, start in sorted(wanted, key=lambda pair: pair[1]):
        if group and start - end > NEAR:
            yield group
            group = []
        group.append((memory, start))
        end = max(end, start + len(memory))
    if group:
        yield group


def _read_together(remote: RemoteFile, some: Sequence[tuple[memoryview, int]]) -> None:
    """Read all from the first of some places to the last, and take what is wanted of it."""
    if len(some) == 1:
        remote.read(*some[0])
        return
    first = some[0][1]
    whole = memoryview(bytearray(max(start + len(memory) for memory, start in some) - first))
    remote.read(whole, first)
    for memory, start in some:
        direct_io.copy(whole[start - first : start - first + len(memory)], memory)


def parse_place(place: str) -> Source:
    """The repository and revision of ``hf://owner/name@revision``; ``main`` where none is named.

    Raises:
        BadSource: it is no such name.
    """
    match = PLACE.fullmatch(place)
    if match is None:
        raise BadSource(f"{place!r} names no repository; write {SCHEME}owner/name@commit")
    return Source(repo_id=match["repo"], path=None, revision=match["revision"] or "main")


@contextmanager
def open_streamed(
    place: str | Source, *, lock: Lock | None = None, transfer: sections.DownloadParams = DEFAULT_TRANSFER
) -> Iterator[StreamedBase]:
    """Open a diffusers pipeline on the Hub without fetching its weights; it is gone when the `with` ends.

    Args:
        place: ``hf://owner/name@revision``, or a source that is on the Hub.
        lock: what was locked of it before: those files at that commit, with those sha256.
        transfer: ranges at a time, and seconds without a byte after which one is asked for again.

    Raises:
        BadSource: there is no such pipeline, or the Hub may not be asked, or promises other files than `lock` has.
        BadCheckpoint: a file of weights is no safetensors file.
    """
    source = parse_place(place) if isinstance(place, str) else place
    if source.repo_id is None:
        raise BadSource(f"{source.label} is a folder, and only a repository is streamed; name it as it is")
    if is_offline():
        raise BadSource(
            f"{source.label} would be read from the Hub, and HF_HUB_OFFLINE is set; unset it, or fetch the base first"
        )
    with _folder() as folder, ThreadPoolExecutor(transfer.workers, "range") as threads:
        lanes = Lanes(threads, transfer.workers)
        with open_repository(source.repo_id, lock.revision if lock else source.revision, transfer) as repository:
            commit = str(repository.commit)
            if lock is None and not COMMIT.fullmatch(str(source.revision)):
                progress.log(f"{SCHEME}{source.repo_id}@{source.revision} is {commit} now; name that to pin it")
            root = folder / f"{source.repo_id.replace('/', '--')}@{commit}"
            taken = VerifiedFiles(repository)
            weights = _take_small(taken, lock)
            for name in taken.records:
                _copy(taken.root / name, root / name)
        records = dict(sorted({**taken.records, **weights}.items()))
        made = Lock(source.repo_id, None, source.revision, commit, records, repository.license)
        if lock is not None:
            _refuse_other_files(made, lock)
        arriving = HubFiles((source.repo_id, commit), weights, lanes, transfer.stall_seconds)
        try:
            list(threads.map(lambda name: arriving.write_header(name, root / name), weights))
            yield StreamedBase(root, made, arriving)
        except BaseException:
            arriving.stop()
            raise


def lock_streamed(
    source: Source, *, previous: Lock | None, update: bool = False, transfer: sections.DownloadParams = DEFAULT_TRANSFER
) -> Lock:
    """Pin a base that will be streamed: its small files are here and checked, its weights as the Hub promises them.

    The arguments are those of `locks.lock_base`.

    Raises:
        BadSource, BadCheckpoint: see `open_streamed`.
    """
    asked = (source.repo_id, source.revision)
    kept = previous if previous and asked == (previous.repo_id, previous.requested) and not update else None
    with open_streamed(source, lock=kept, transfer=transfer) as base:
        return base.lock


@contextmanager
def open_locked(lock: Lock, transfer: sections.DownloadParams) -> Iterator[StreamedBase | None]:
    """Open a locked base to be streamed, if that is asked for and it is on the Hub, and not on this machine.

    Raises:
        BadSource, BadCheckpoint: see `open_streamed`.
    """
    if not transfer.stream or lock.repo_id is None or _is_here(lock):
        yield None
        return
    source = Source(repo_id=lock.repo_id, path=None, revision=lock.requested)
    with open_streamed(source, lock=lock, transfer=transfer) as base:
        yield base


def _is_here(lock: Lock) -> bool:
    try:
        hf_cache.locate(lock)
    except BadSource:
        return False
    return True


def _take_small(taken: VerifiedFiles, lock: Lock | None) -> dict[str, FileRecord]:
    """Take all files but weights; returns the weights as the Hub promises them."""
    wanted = set(lock.files) if lock else choose_pipeline(taken)
    refuse_missing(wanted, taken.source.files, taken.source.label)
    promised = {name: _promise(taken.source, name) for name in sorted(wanted) if repository_files.is_weights(name)}
    weights = {name: record for name, record in promised.items() if record is not None}
    taken.take(wanted - weights.keys())
    taken.records = {name: record for name, record in taken.records.items() if name in wanted}
    return weights


def _promise(source: FileSource, name: str) -> FileRecord | None:
    """The size and sha256 of a file by the Hub's list; None of one that git itself holds, which is small."""
    file = source.files[name]
    return FileRecord(file.size, file.sha256) if file.size and file.sha256 else None


def _refuse_other_files(made: Lock, lock: Lock) -> None:
    for name, record in lock.files.items():
        if made.files[name] != record:
            raise BadSource(
                f"{name} of {lock.label}: the Hub promises sha256 {made.files[name].sha256}, the lock says "
                f"{record.sha256}; the files of a commit never change, so find out why before you delete the lock"
            )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@contextmanager
def _folder() -> Iterator[Path]:
    """A private folder that is removed in the end, as are those that killed runs have left."""
    for old in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with suppress(OSError, Refused):
            info = old.lstat()
            if info.st_uid == os.geteuid() and time.time() - info.st_mtime > YOUNG and not old.is_symlink():
                with staging.holding(old):
                    staging.remove(old)
    with tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with staging.holding(folder):
            yield folder
