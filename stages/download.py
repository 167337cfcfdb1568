"""Stage `download`: pin base and LoRAs, fetch them, check every sha256; later stages need no network."""

from __future__ import annotations

from lora_fuse import hub
from lora_fuse.files import replace_text
from lora_fuse.progress import human_bytes
from lora_fuse.records import SCHEMA, BaseLock, Lock, LoraLock, from_json, to_json
from stages.artifacts import BASE_LOCK, LORA_LOCK
from stages.config import run_stage
from stages.params import Params


def download(params: Params) -> int:
    """Write `base.lock.json` and `lora.lock.json`."""
    base_before, loras_before = _previous()
    base = hub.lock_base(params.base.source, previous=base_before)
    loras = {
        name: hub.lock_lora(lora.source, lora.filename, previous=loras_before.get(name))
        for name, lora in sorted(params.loras.items())
    }
    replace_text(BASE_LOCK, to_json(BaseLock(SCHEMA, base)))
    replace_text(LORA_LOCK, to_json(LoraLock(SCHEMA, loras)))
    for lock in (base, *loras.values()):
        size = sum(file.size for file in lock.files.values())
        print(f"download: {lock.label}: {len(lock.files)} files, {human_bytes(size)}, every sha256 checked")
    return 0


def _previous() -> tuple[Lock | None, dict[str, Lock]]:
    """The pins of the last run: a branch that moved since does not move a build."""
    base = from_json(BaseLock, BASE_LOCK.read_text(), str(BASE_LOCK)).base if BASE_LOCK.exists() else None
    loras = from_json(LoraLock, LORA_LOCK.read_text(), str(LORA_LOCK)).loras if LORA_LOCK.exists() else {}
    return base, loras


if __name__ == "__main__":
    run_stage(download)
