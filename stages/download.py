"""Stage `download`: pin base and LoRAs, fetch them, check every sha256; later stages need no network.

What is locked stays locked. ``--update`` moves the locks to what branches and tags mean now, and says what changes.
"""

from __future__ import annotations

from lora_fuse import hub
from lora_fuse.files import replace_text
from lora_fuse.progress import human_bytes
from lora_fuse.records import SCHEMA, BaseLock, Lock, LoraLock, from_json, to_json
from stages.artifacts import HERE, Artifacts
from stages.config import run_stage
from stages.console import PLAIN, Console
from stages.params import Params


def download(params: Params, at: Artifacts = HERE, console: Console = PLAIN, *, update: bool = False) -> int:
    """Write `base.lock.json` and `lora.lock.json`, and `sources.json` to say that what they name is here."""
    base_before, loras_before = _previous(at)
    transfer = params.download.transfer
    loras = {  # first, as they are small: what is wrong with them is found before the base is fetched
        name: hub.lock_lora(
            lora.source, lora.filename, previous=loras_before.get(name), update=update, transfer=transfer
        )
        for name, lora in sorted(params.loras.items())
    }
    base = hub.lock_base(params.base.source, previous=base_before, update=update, transfer=transfer)
    replace_text(at.base_lock, to_json(BaseLock(SCHEMA, base)))
    replace_text(at.lora_lock, to_json(LoraLock(SCHEMA, loras)))
    sizes = {lock.label: sum(file.size for file in lock.files.values()) for lock in (base, *loras.values())}
    replace_text(at.sources, to_json(sizes))
    lines = [
        f"{lock.label}: {len(lock.files)} files, {human_bytes(sizes[lock.label])}, every sha256 checked"
        for lock in (base, *loras.values())
    ]
    moved = _moved([(base_before, base), *((loras_before.get(name), lora) for name, lora in loras.items())])
    console.done("download", *lines, facts={"bytes": sizes, "moved": moved})
    if update and moved and not console.as_json:
        console.done("update", *moved, facts={})
    return 0


def _moved(pairs: list[tuple[Lock | None, Lock]]) -> list[str]:
    lines: list[str] = []
    for before, after in pairs:
        same = before and after.repo_id and (before.repo_id, before.requested) == (after.repo_id, after.requested)
        lines += hub.changes(before, after) if before and same else []
    return lines


def _previous(at: Artifacts) -> tuple[Lock | None, dict[str, Lock]]:
    """The pins of the last run: a branch that moved since does not move a build."""
    base = from_json(BaseLock, at.base_lock.read_text(), str(at.base_lock)).base if at.base_lock.exists() else None
    loras = from_json(LoraLock, at.lora_lock.read_text(), str(at.lora_lock)).loras if at.lora_lock.exists() else {}
    return base, loras


if __name__ == "__main__":
    run_stage(download, "update")
