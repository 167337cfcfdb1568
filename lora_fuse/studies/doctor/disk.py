"""Checks of the disks: their room, and the abilities of their filesystems."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from lora_fuse.machine import files, progress
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn


def room(name: str, where: Path, free: int, need: int, parts: str) -> Finding:
    """Check that files have room at `where`: `free` and `need` are bytes, `parts` says what makes up the need."""
    found = f"{progress.human_bytes(free)} free at {where}"
    needed = f"{progress.human_bytes(need)} ({parts})"
    if free >= need:
        return ok(name, found, needed)
    return fail(name, found, needed, f"make room for {progress.human_bytes(need - free)} more, or use a larger disk")


def rebuild(name: str, where: Path, free: int, need: int, held: int, *, same: bool) -> Finding:
    """Check that a merge has room beside the last one, which stays until the new one is whole.

    `held` are bytes that the last merge would give back, were it removed; `same` says that it is of this recipe as it
    is, so that it need not be built again.
    """
    room = f"{progress.human_bytes(free)} free, and {where} holds {progress.human_bytes(held)}"
    found = f"{room} until the new merge is whole"
    needed = f"{progress.human_bytes(need)} beside it"
    if free >= need:
        return ok(name, found, needed)
    remedy = f"make room for {progress.human_bytes(need - free)} more"
    if free + held >= need:
        remedy += f", or remove {where} first: it is made again"
    if same:
        return warn(name, found, f"{needed}, if it is built again", remedy)
    return fail(name, found, needed, remedy)


def writable(name: str, folder: Path) -> Finding:
    """Try to make a file in a folder, or in the nearest one above that is there."""
    there = files.nearest_folder(folder)
    probe = there / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        found = f"{there} cannot be written ({error.strerror})"
        return fail(name, found, "", "give yourself the right, or use another")
    return ok(name, f"{there} can be written")


def locks(folder: Path) -> Finding:
    """Try that flock(2) keeps a second run out; some network filesystems let everybody in."""
    probe = files.nearest_folder(folder) / f".probe-{os.getpid()}.lock"
    try:
        with files.open_lock(probe) as one, files.open_lock(probe) as other:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return ok("locks", "flock keeps a second run out")
        return fail("locks", "flock lets a second run in", "", f"put {folder} on a filesystem with locks")
    except OSError as error:
        remedy = f"put {folder} on a local filesystem"
        return fail("locks", f"flock does not work at {probe.parent} ({error.strerror})", "", remedy)
    finally:
        probe.unlink(missing_ok=True)


def sharing(link: files.Untouched, rest: int, kinds: str, editable: str | None) -> Finding:
    """Check that base and merge can share the files that the LoRAs do not change.

    `link` is the best way that works, `rest` the bytes of those files, `kinds` the types of the filesystems, `editable`
    the base where it is a folder on the same disk: its files may be edited, so that no hard link to them is made.
    """
    if link != "copy" or not rest:
        return ok("sharing", f"{link} works between base and merge ({kinds})")
    if editable is not None:
        return ok("sharing", f"{progress.human_bytes(rest)} are copied, as {editable} may be edited ({kinds})")
    remedy = "put the base's cache (HF_HUB_CACHE) on the disk of artifacts/ to save them"
    found = f"base and merge cannot share files ({kinds}): {progress.human_bytes(rest)} are copied"
    return warn("sharing", found, "", remedy)


def filesystem(path: Path) -> str:
    """Type of the filesystem of a path: ``ext4``."""
    import psutil

    there = files.nearest_folder(path).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in (there, *there.parents) if folder in mounts), "unknown")
