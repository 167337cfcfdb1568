"""Locks made, kept and moved. Every record in a lock was read back from this machine and hashed."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadLora, BadSource, Rerun
from lora_fuse.hub.client import is_offline
from lora_fuse.hub.repository import open_repository
from lora_fuse.hub.sources import (
    FileSource,
    VerifiedFiles,
    check_records,
    ignored,
    open_folder,
    take_pipeline,
)
from lora_fuse.machine import FileRecord, file_state, progress
from lora_fuse.recipe import Lock, Source, hf_cache, sections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


DEFAULT_TRANSFER = sections.DownloadParams(workers=8, stall_seconds=60.0)


def lock_base(
    source: Source,
    *,
    previous: Lock | None,
    offline: bool = False,
    update: bool = False,
    transfer: sections.DownloadParams = DEFAULT_TRANSFER,
    note: file_state.Note = ignored,
) -> Lock:
    """Pin a diffusers pipeline, and have its files on this machine.

    Taken are the files that a fuse takes, see `repository_files.sort_files`: variants (fp16, …), pickles and what no
    library loads stay behind.

    Args:
        source: the base.
        previous: the lock of the last run; the same repository and revision keep its commit.
        offline: use no network, as with `HF_HUB_OFFLINE`: a repository must be locked and here already.
        update: take the commit that the revision means now, whatever is locked.
        transfer: parallel files and the time limit of a fetch.
        note: told of every file that was hashed, and of its state then.

    Raises:
        BadSource: the source cannot be had, is no such pipeline, asks for code, has weights only as pickles, or sends
            other bytes than its Hub promises, twice.
        NoSpace: the disk has no room for it.
    """
    return _lock(source, previous, take_pipeline, offline or is_offline(), update, transfer, note)


def lock_lora(
    source: Source,
    filename: str,
    *,
    previous: Lock | None,
    offline: bool = False,
    update: bool = False,
    transfer: sections.DownloadParams = DEFAULT_TRANSFER,
    note: file_state.Note = ignored,
) -> Lock:
    """Pin one LoRA, and have it on this machine: a file, or a PEFT folder's weights and configuration.

    `filename` is its POSIX path in the source: a `.safetensors` file, or a folder with `adapter_config.json` (``.`` is
    the source itself). The other arguments are as for `lock_base`.

    Raises:
        BadLora: `filename` is neither.
        BadSource: as in `lock_base`.
        NoSpace: as in `lock_base`.
    """
    path = PurePosixPath(filename)
    if path.is_absolute() or ".." in path.parts:
        raise BadSource(f"{filename!r} leads out of {source.label}; name a file below it")
    if repository_files.is_pickle(filename):
        raise BadLora(
            f"{filename!r} of {source.label} is a pickle, which can run code when it is loaded; "
            "name a .safetensors file, or convert it"
        )
    name = path.as_posix()
    if previous is not None and not previous.is_of(name):
        previous = replace(previous, files={})  # another file of the same repository: its commit stays

    def take(taken: VerifiedFiles) -> None:
        taken.take(repository_files.lora_files(name, taken.source.files, taken.source.label))

    return _lock(source, previous, take, offline or is_offline(), update, transfer, note)


@contextmanager
def opened(source: Source, *, transfer: sections.DownloadParams = DEFAULT_TRANSFER) -> Iterator[VerifiedFiles]:
    """Open a repository or a folder, to take single files from it.

    Raises:
        BadSource: it cannot be had, or the Hub may not be asked.
    """
    if source.repo_id is None:
        yield VerifiedFiles(open_folder(Path(str(source.path))))
        return
    if is_offline():
        raise BadSource(
            f"{source.label} is asked for of the Hub, and HF_HUB_OFFLINE is set; unset it, or name a folder"
        )
    with open_repository(source.repo_id, source.revision, transfer) as repository:
        yield VerifiedFiles(repository)


def verify_files(root: Path, files: Mapping[str, FileRecord], note: file_state.Note = ignored) -> None:
    """Hash every file again; `note` is told of each.

    Raises:
        BadSource: a file cannot be read, or has another size or sha256 than its record.
    """

    def refusal(name: str, difference: str) -> BadSource:
        words = f"{name} in {root} is not what was locked: {difference}; run the download stage"
        return BadSource(words, rerun=Rerun("download", force=True))

    check_records({name: root / name for name in files}, files, refusal, root, note)


def will_lock(sources: Sequence[Source], previous: Sequence[Lock], *, streams: bool = False) -> str:
    """A sentence on the work that making the locks will be; `streams` is said of the weights of a base on the Hub."""
    earlier = {(lock.repo_id, lock.path): lock for lock in previous}
    kept = [lock for source in sources if (lock := earlier.get((source.repo_id, source.path))) is not None]
    size = sum(lock.size for lock in kept)
    known = f", {progress.human_bytes(size)} locked before" if kept else ""
    names = ", ".join(dict.fromkeys(source.label for source in sources))
    if streams:
        return f"{names}{known}: what is not here is fetched, and hashed, but for the base's weights"
    return f"{names}{known}: what is not here is fetched, and all of it hashed{progress.estimate('hash', size)}"


def checked(locks: Sequence[Lock], *, streamed: bool = False) -> str:
    """A sentence on locks that were just made: labels, number of files, bytes, and what was checked."""
    names = ", ".join(dict.fromkeys(lock.label for lock in locks))
    files = sum(len(lock.files) for lock in locks)
    size = sum(lock.size for lock in locks)
    how = "every sha256 checked" if not streamed else "weights by the Hub's list, the other sha256 checked"
    return f"{names}: {files} files, {progress.human_bytes(size)}, {how}"


def changes(before: Lock, after: Lock) -> list[str]:
    """Changes by an update, a sentence each; the first is about the commit."""
    asked = f"{after.repo_id} {after.requested or 'main'}"
    if before.revision == after.revision:
        return [f"{asked}: still {after.revision}"]
    old = before.files
    new = after.files
    kinds = {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
    }
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
    first = f"{asked}: {before.revision} -> {after.revision}: {counts}"
    return [first, *(f"  {kind} {name}" for kind, names in kinds.items() for name in names)]


def moved(pairs: Iterable[tuple[Lock | None, Lock]]) -> list[str]:
    """`changes` of all that were locked before at the same revision of the same repository."""
    return [
        line
        for before, after in pairs
        if before and after.repo_id and (before.repo_id, before.requested) == (after.repo_id, after.requested)
        for line in changes(before, after)
    ]


def _lock(
    source: Source,
    previous: Lock | None,
    take: Callable[[VerifiedFiles], None],
    offline: bool,
    update: bool,
    transfer: sections.DownloadParams,
    note: file_state.Note,
) -> Lock:
    asked = (source.repo_id, source.path, source.revision)
    kept = previous if previous and asked == (previous.repo_id, previous.path, previous.requested) else None
    opening: AbstractContextManager[FileSource]
    if source.repo_id is None:
        opening = nullcontext(open_folder(Path(str(source.path))))
    elif kept and kept.files and not update and _is_whole(kept, note, complain=offline):
        return kept
    elif offline and update:
        raise BadSource(f"an update asks the Hub what {source.label} has now; unset HF_HUB_OFFLINE for it")
    elif offline:
        raise BadSource(
            f"{source.label} is not locked yet, which needs the network; run once without offline, HF_HUB_OFFLINE unset"
        )
    else:
        pinned = kept.revision if kept and not update else source.revision
        opening = open_repository(source.repo_id, pinned, transfer)
    with opening as files:
        taken = VerifiedFiles(files, note)
        if kept and kept.files and kept.repo_id and kept.revision == files.commit and not update:
            taken.take(kept.files)  # what is locked stays locked, whatever would be chosen of that commit by now
        else:
            take(taken)
    records = dict(sorted(taken.records.items()))
    if kept and kept.repo_id and kept.revision == files.commit:
        _refuse_other_bytes(records, kept)
    return Lock(source.repo_id, source.path, source.revision, files.commit, records, files.license)


def _is_whole(lock: Lock, note: file_state.Note, *, complain: bool) -> bool:
    try:
        verify_files(hf_cache.locate(lock), lock.files, note)
    except BadSource:
        if complain:
            raise
        return False
    return True


def _refuse_other_bytes(records: Mapping[str, FileRecord], kept: Lock) -> None:
    for name in sorted(records.keys() & kept.files.keys()):
        got = records[name].sha256
        locked = kept.files[name].sha256
        if got != locked:
            raise BadSource(
                f"{name} of {kept.label}: the Hub sends sha256 {got}, the lock says {locked}; "
                "the files of a commit never change, so find out why before you delete the lock"
            )
