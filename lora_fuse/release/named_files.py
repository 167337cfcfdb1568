"""Every file whose sha256 a release names, hashed before it is named: what is sent, and what that was made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import PublishRefused, Rerun
from lora_fuse.hub import payload, sources
from lora_fuse.machine import FileRecord, file_state
from lora_fuse.recipe import Artifacts, Lock, Manifest, hf_cache, records


def hash_named(at: Artifacts, manifest: Manifest, exports: dict[str, FileRecord]) -> payload.Hashed:
    """Hash the merged files, the exports, the base's and the LoRAs, all at once, each content once.

    Raises:
        PublishRefused: one cannot be read or is not what the manifest says; or see `payload.refuse_unnamed`.
        BadSource: a file of the base is not on this machine.
    """
    payload.refuse_unnamed(at.merged, manifest)
    named = {at.merged / name: FileRecord(file.size, file.sha256) for name, file in manifest.files.items()}
    named |= {at.exported / name: record for name, record in exports.items()}
    made_of = dict(_sources(manifest))
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


def _sources(manifest: Manifest) -> Iterator[tuple[Path, FileRecord]]:
    if manifest.base is not None:
        root = hf_cache.locate(manifest.base)
        yield from ((root / name, record) for name, record in manifest.base.files.items())
    for lora in manifest.loras:
        for path, sha256 in _lora_files(lora):
            state = file_state.state_of(path)
            yield path, FileRecord(0 if state is None else state.size, sha256)


def _lora_files(lora: records.MergedLora) -> Iterator[tuple[Path, str]]:
    if lora.filename is None:
        raise PublishRefused(
            f"the manifest does not say where the LoRA {lora.name} lies, so its sha256 {lora.sha256} cannot be checked",
            rerun=Rerun("fuse", force=True),
        )
    folder = hf_cache.locate(Lock(lora.repo_id, lora.path, None, lora.revision, {}))
    weights = folder / lora.filename
    if weights.is_dir():
        weights /= repository_files.ADAPTER_WEIGHTS
    yield weights, lora.sha256
    if lora.config_sha256 is not None:
        yield weights.with_name(repository_files.ADAPTER_CONFIG), lora.config_sha256
