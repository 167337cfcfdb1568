"""A merged checkpoint, whole or not at all: everything is written beside `out` and then renamed over it.

Under ``out`` there is either the previous result or the new one. While a merge runs it holds a lock on ``out``, so
a second one says so instead of mixing its files in.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lora_fuse.checkpoint import Checkpoint, Kind
from lora_fuse.engine import Fuser, Progress, fuse_shard
from lora_fuse.errors import BadCheckpoint, Busy, NoSpace, Refused
from lora_fuse.files import hash_file
from lora_fuse.plan import Plan
from lora_fuse.records import FileRecord, MergedFile

SPARE = 64 << 20  # bytes to leave free: directories, the manifest, other programs


def write_merged(
    plan: Plan,
    out: Path,
    *,
    device: str,
    generated: Mapping[str, bytes],
    known: Mapping[str, FileRecord],
    progress: Progress,
) -> dict[str, MergedFile]:
    """Write the merged checkpoint of the same kind as the base to `out`, replacing what was there.

    Args:
        plan: what to fuse.
        out: the folder or file to make.
        device: ``cpu`` or ``cuda``; the bytes do not depend on it.
        generated: files of a pipeline whose content is given here instead of the base's, by POSIX path.
        known: the base's files whose sha256 is known already (a lock's), so that they are not hashed again.
        progress: is told how many more bytes are done.

    Returns:
        Every file of the result by POSIX path.

    Raises:
        NoSpace: the disk has less room than the result needs; nothing was written.
        Busy: another process is writing the same result.
        Refused: the base or a LoRA turned out to be broken; `out` is as it was.
    """
    _check_places(plan.checkpoint, out)
    _check_space(plan, out)
    partial = out.parent / f".{out.name}.partial"
    try:
        with _exclusive(out):
            _recover(out)
            _remove(partial)
            try:
                files = _write_files(plan, partial, Fuser(device), generated, known, progress)
                if plan.checkpoint.kind is Kind.FILE:
                    ((name, record),) = files.items()
                    partial, files = partial / name, {out.name: record}
                _swap(partial, out)
            finally:
                _remove(partial)
    except OSError as error:
        raise Refused(f"cannot write {out}: {error.strerror} ({error.filename or partial}); it is as it was") from error
    return {name: files[name] for name in sorted(files)}


def bytes_to_write(plan: Plan) -> int:
    """Bytes that go through the engine: the fused shards, whole."""
    return sum(shard.path.stat().st_size for shard in plan.fused_shards)


def _write_files(
    plan: Plan,
    partial: Path,
    fuser: Fuser,
    generated: Mapping[str, bytes],
    known: Mapping[str, FileRecord],
    progress: Progress,
) -> dict[str, MergedFile]:
    partial.mkdir(parents=True)
    files: dict[str, MergedFile] = {}
    for shard in plan.fused_shards:
        target = partial / shard.relative
        target.parent.mkdir(parents=True, exist_ok=True)
        record = fuse_shard(shard, plan.targets, target, fuser, progress)
        files[shard.relative] = MergedFile(record.size, record.sha256, "fused")
    untouched = [shard.relative for shard in plan.checkpoint.shards if shard.relative not in files]
    for name in [*untouched, *plan.checkpoint.others]:
        if name not in generated:
            record = known.get(name) or hash_file(plan.checkpoint.locate(name))
            _place(plan.checkpoint.locate(name), partial / name)
            files[name] = MergedFile(record.size, record.sha256, "base")
    for name, content in generated.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
        files[name] = MergedFile(len(content), hashlib.sha256(content).hexdigest(), "generated")
    return files


def _place(source: Path, target: Path) -> None:
    """Link weights, copy text: weights are large and only ever replaced, text is what people edit in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    if real.suffix == ".safetensors" or source.suffix == ".safetensors":
        try:
            os.link(real, target)
        except OSError:  # another filesystem, or one without links
            pass
        else:
            return
    shutil.copyfile(real, target)


def _check_places(checkpoint: Checkpoint, out: Path) -> None:
    base, place = checkpoint.root.resolve(), out.resolve()
    if place == base or base in place.parents or place in base.parents:
        raise Refused(f"OUT {out} and BASE {checkpoint.root} overlap; write the merged checkpoint somewhere else")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not (out / "model_index.json").exists()
        and not (out / "config.json").exists()
    ):
        raise Refused(f"OUT {out} is a folder with other things in it; it would be replaced, name another place")


def _check_space(plan: Plan, out: Path) -> None:
    there = next(parent for parent in [out, *out.absolute().parents] if parent.is_dir())
    device = there.stat().st_dev
    need = bytes_to_write(plan)
    fused = {shard.relative for shard in plan.fused_shards}
    for name in [*(shard.relative for shard in plan.checkpoint.shards), *plan.checkpoint.others]:
        info = _stat(plan.checkpoint.locate(name))
        if name not in fused and info.st_dev != device:
            need += info.st_size
    free = shutil.disk_usage(there).free
    if free < need + SPARE:
        raise NoSpace(
            f"{there} has {free / 1e9:.2f} GB free and the merged checkpoint needs {(need + SPARE) / 1e9:.2f} GB; "
            "make room or write OUT on another disk"
        )


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise BadCheckpoint(f"the base lacks {path}: {error.strerror}; fetch it again") from error


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another run is writing {out}; wait for it to end") from error
        yield


def _previous(out: Path) -> Path:
    return out.parent / f".{out.name}.previous"


def _swap(new: Path, out: Path) -> None:
    """Put `new` in place of `out`; a folder cannot be renamed over another, so the old one steps aside first."""
    if out.is_dir():
        out.rename(_previous(out))
    new.replace(out)
    _remove(_previous(out))


def _recover(out: Path) -> None:
    """Finish or undo a swap that was killed half-way."""
    if _previous(out).exists():
        if out.exists():
            _remove(_previous(out))
        else:
            _previous(out).rename(out)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
