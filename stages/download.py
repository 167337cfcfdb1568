"""Stage `download`: pin base and LoRAs, fetch them, check every sha256; later stages need no network.

What is locked stays locked. ``--update`` moves the locks to what branches and tags mean now, and says what changes.
"""

from __future__ import annotations

from lora_fuse import hub
from lora_fuse.files import replace_text
from lora_fuse.progress import human_bytes
from lora_fuse.records import SCHEMA, BaseLock, Lock, LoraLock, from_json, to_json
from stages.artifacts import BASE_LOCK, LORA_LOCK
from stages.config import run_stage
from stages.params import Params


def download(params: Params, *, update: bool = False) -> int:
    """Write `base.lock.json` and `lora.lock.json`."""
    base_before, loras_before = _previous()
    transfer = params.download.transfer
    loras = {  # first, as they are small: what is wrong with them is found before the base is fetched
        name: hub.lock_lora(
            lora.source, lora.filename, previous=loras_before.get(name), update=update, transfer=transfer
        )
        for name, lora in sorted(params.loras.items())
    }
    base = hub.lock_base(params.base.source, previous=base_before, update=update, transfer=transfer)
    replace_text(BASE_LOCK, to_json(BaseLock(SCHEMA, base)))
    replace_text(LORA_LOCK, to_json(LoraLock(SCHEMA, loras)))
    for lock in (base, *loras.values()):
        size = sum(file.size for file in lock.files.values())
        print(f"download: {lock.label}: {len(lock.files)} files, {human_bytes(size)}, every sha256 checked")
    if update:
        _tell([(base_before, base), *((loras_before.get(name), lora) for name, lora in loras.items())])
    return 0


def _tell(pairs: list[tuple[Lock | None, Lock]]) -> None:
    for before, after in pairs:
        same = before and after.repo_id and (before.repo_id, before.requested) == (after.repo_id, after.requested)
        for line in hub.changes(before, after) if before and same else []:
            print(f"update: {line}")


def _previous() -> tuple[Lock | None, dict[str, Lock]]:
    """The pins of the last run: a branch that moved since does not move a build."""
    base = from_json(BaseLock, BASE_LOCK.read_text(), str(BASE_LOCK)).base if BASE_LOCK.exists() else None
    loras = from_json(LoraLock, LORA_LOCK.read_text(), str(LORA_LOCK)).loras if LORA_LOCK.exists() else {}
    return base, loras


if __name__ == "__main__":
    run_stage(download, "update")
