"""Room on the disks, and what their filesystems can do."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from lora_fuse.machine import files, progress
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn


def room(name: str, where: Path, free: int, need: int, parts: str) -> Finding:
    """Whether what will be written has room.

    Args:
        name: of the finding.
        where: the folder it will be in.
        free: bytes.
        need: bytes.
        parts: what they are, in words.
    """
    needed = f"{progress.human_bytes(need)} ({parts})"
    if free >= need:
        return ok(name, f"{progress.human_bytes(free)} free at {where}", needed)
    short = f"make room for {progress.human_bytes(need - free)} more, or use a larger disk"
    return fail(name, f"{progress.human_bytes(free)} free at {where}", needed, short)


def rebuild(name: str, where: Path, free: int, need: int, held: int, *, same: bool) -> Finding:
    """Whether a merge has room beside the last one, which stays until the new one is whole.

    Args:
        name: of the finding.
        where: the last merge.
        free: bytes, with the last merge where it is.
        need: bytes of the new one.
        held: bytes that the last one would give back, were it removed.
        same: whether the last one is of this recipe as it is, so that it need not be built again.
    """
    has, holds = progress.human_bytes(free), progress.human_bytes(held)
    found = f"{has} free, and {where} holds {holds} until the new merge is whole"
    if free >= need:
        return ok(name, found, f"{progress.human_bytes(need)} beside it")
    remedy = f"make room for {progress.human_bytes(need - free)} more"
    if free + held >= need:
        remedy += f", or remove {where} first: it is made again"
    if same:
        return warn(name, found, f"{progress.human_bytes(need)} beside it, if it is built again", remedy)
    return fail(name, found, f"{progress.human_bytes(need)} beside it", remedy)


def writable(name: str, folder: Path) -> Finding:
    """Whether files can be made in a folder, or in the nearest one above that is there; tried with one."""
    there = files.nearest_folder(folder)
    probe = there / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return fail(
            name, f"{there} cannot be written ({error.strerror})", "", "give yourself the right, or use another"
        )
    return ok(name, f"{there} can be written")


def locks(folder: Path) -> Finding:
    """Whether flock(2) keeps a second run out; some network filesystems let everybody in."""
    probe = files.nearest_folder(folder) / f".probe-{os.getpid()}.lock"
    try:
        with probe.open("w") as one, probe.open("w") as other:
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


def sharing(link: files.Untouched, rest: int, kinds: str) -> Finding:
    """How files that the LoRAs do not change get from the base into the merge.

    Args:
        link: the best that works.
        rest: bytes of those files.
        kinds: the filesystems' types.
    """
    if link != "copy" or not rest:
        return ok("sharing", f"{link} works between base and merge ({kinds})")
    remedy = "put the base's cache (HF_HUB_CACHE) on the disk of artifacts/ to save them"
    return warn(
        "sharing", f"base and merge cannot share files ({kinds}): {progress.human_bytes(rest)} are copied", "", remedy
    )


def filesystem(path: Path) -> str:
    """Type of the filesystem of a path: ``ext4``."""
    import psutil

    there = files.nearest_folder(path).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in (there, *there.parents) if folder in mounts), "unknown")
