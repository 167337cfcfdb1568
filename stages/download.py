"""Stage `download`: pin base and LoRAs, fetch them, check every sha256; later stages need no network.

What is locked stays locked. ``--update`` moves the locks to what branches and tags mean now, and says what changes.
"""

from __future__ import annotations

from lora_fuse import hub
from lora_fuse.files import replace_text
from lora_fuse.progress import Clock, human_rate
from lora_fuse.records import SCHEMA, BaseLock, Lock, LoraLock, to_json
from stages.artifacts import HERE, Artifacts
from stages.config import run_stage
from stages.console import PLAIN, Console
from stages.params import Params

KEPT = "whole files stay in the Hub client's cache, the locks are as they were; `dvc repro` goes on with the rest"


def download(params: Params, at: Artifacts = HERE, console: Console = PLAIN, *, update: bool = False) -> int:
    """Write `base.lock.json` and `lora.lock.json`."""
    (base_before, loras_before), clock = at.previous_locks(), Clock()
    sources = [params.base.source, *(lora.source for _, lora in sorted(params.loras.items()))]
    console.will("download", hub.will_lock(sources, [*([base_before] if base_before else []), *loras_before.values()]))
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
    locks = [base, *loras.values()]
    moved = _moved([(base_before, base), *((loras_before.get(name), lora) for name, lora in loras.items())])
    facts = {"bytes": {lock.label: lock.size for lock in locks}, "moved": moved, "seconds": clock.seconds}
    rate = human_rate(sum(lock.size for lock in locks), clock.seconds)
    lines = hub.checked([base]), hub.checked(locks[1:]), rate
    console.done("download", *lines, facts=facts, then="dvc repro fuse")
    if update and moved and not console.as_json:
        console.done("update", *moved, facts={})
    return 0


def _moved(pairs: list[tuple[Lock | None, Lock]]) -> list[str]:
    lines: list[str] = []
    for before, after in pairs:
        same = before and after.repo_id and (before.repo_id, before.requested) == (after.repo_id, after.requested)
        lines += hub.changes(before, after) if before and same else []
    return lines


if __name__ == "__main__":
    run_stage(download, "update", kept=KEPT)
