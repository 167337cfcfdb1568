"""Every file whose sha256 a release names, hashed before it is named: what is sent, and what that was made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_fuse.errors import PublishRefused, Rerun
from lora_fuse.hub import payload, sources
from lora_fuse.machine import FileRecord, file_state
from lora_fuse.recipe import Artifacts, Lock, Manifest, hf_cache


def hash_named(at: Artifacts, manifest: Manifest, exports: dict[str, FileRecord]) -> payload.Hashed:
    """Hash the merged files, the exports, the base's and the LoRAs, all at once, each content once.

    Raises:
        PublishRefused: one cannot be read or is not what the manifest says, or that is not of the locks; or see
            `payload.refuse_unnamed`.
        BadSource: a file of base or LoRAs is not on this machine.
    """
    payload.refuse_unnamed(at.merged, manifest)
    named = {at.merged / name: FileRecord(file.size, file.sha256) for name, file in manifest.files.items()}
    named |= {at.exported / name: record for name, record in exports.items()}
    made_of = dict(_sources(at, manifest))
    named |= made_of
    distinct = {(file_state.state_of(path), record): path for path, record in named.items()}  # links are one file
    hashed: set[tuple[file_state.FileState | None, FileRecord]] = set()

    def refusal(name: str, difference: str) -> PublishRefused:
        rerun = Rerun("download", force=True) if Path(name) in made_of else None
        return PublishRefused(f"{name} is not what the manifest says: {difference}; fuse and check again", rerun=rerun)

    sources.check_records(
        {str(path): path for path in distinct.values()},
        {str(path): record for path, record in named.items()},
        refusal,
        note=lambda _, state, record: hashed.add((state, record)),
    )
    return hashed


def _sources(at: Artifacts, manifest: Manifest) -> Iterator[tuple[Path, FileRecord]]:
    """The files of base and LoRAs, which are those of the locks."""
    base, loras = at.read_locks()
    fused = {lora.name: {lora.sha256, lora.config_sha256} - {None} for lora in manifest.loras}
    if manifest.base != base or fused != {name: _sums(lock) for name, lock in loras.items()}:
        raise PublishRefused(
            f"{at.manifest} is of other files than {at.base_lock} and {at.lora_lock} name", rerun=Rerun("build")
        )
    for lock in (base, *loras.values()):
        root = hf_cache.locate(lock)
        yield from ((root / name, record) for name, record in lock.files.items())


def _sums(lock: Lock) -> set[str]:
    return {record.sha256 for record in lock.files.values()}
