"""Stage `download`: pin base and LoRAs, fetch them, check every sha256; later stages need no network.

What is locked stays locked. ``--update`` moves the locks to what branches and tags mean now, and says what changes.
Variants of one base share its lock: `stages.base` makes it, and ``--loras-only`` the rest, so that a base is read once.
"""

from __future__ import annotations

from dataclasses import replace

from lora_fuse import hub
from lora_fuse.hub import locks, streamed_base
from lora_fuse.machine import Console, file_state, files, progress
from lora_fuse.recipe import Artifacts, Lock, Recipe, Source, paths, records
from stages.run import PLAIN, run_stage

KEPT = "whole files stay in the Hub client's cache, the locks are as they were; `dvc repro` goes on with the rest"


def download(
    recipe: Recipe,
    at: Artifacts = paths.HERE,
    console: Console = PLAIN,
    *,
    update: bool = False,
    base_only: bool = False,
    loras_only: bool = False,
) -> int:
    """Write `base.lock.json` and `lora.lock.json`, or one of them, and that what they name is here."""
    clock = progress.Stopwatch()
    base_before, loras_before = at.earlier_locks()
    wanted = {} if base_only else dict(sorted(recipe.loras.items()))
    sources: list[Source] = [*([] if loras_only else [recipe.base]), *wanted.values()]
    before = [*([base_before] if base_before else []), *loras_before.values()]
    console.will("download", locks.will_lock(sources, before, streams=recipe.streams and not loras_only))
    seen = file_state.SeenFiles(paths.SEEN)
    # LoRAs first, as they are small: what is wrong with them is found before the base is fetched.
    loras = {
        name: replace(
            hub.lock_lora(
                lora,
                lora.filename,
                previous=loras_before.get(name),
                update=update,
                transfer=recipe.download,
                note=seen.note,
            ),
            component=lora.component,
        )
        for name, lora in wanted.items()
    }
    pairs = [(loras_before.get(name), lora) for name, lora in loras.items()]
    base: Lock | None = None
    if not loras_only:
        base = _lock_base(recipe, base_before, seen.note, console, update=update)
        pairs.insert(0, (base_before, base))
    at.write_locks(base, None if base_only else loras)
    seen.write()
    moved = locks.moved(pairs)
    sizes = {lock.label: lock.size for _, lock in pairs}
    files.replace_text(at.base_sources if base_only else at.sources, records.to_json(sizes))
    lines = [
        locks.checked([lock for _, lock in some], streamed=recipe.streams and some[0][1] is base)
        for some in (pairs[:1], pairs[1:])
        if some
    ]
    lines.append(progress.human_rate(sum(sizes.values()), clock.seconds))
    facts = {"bytes": sizes, "moved": moved, "seconds": clock.seconds}
    console.done("download", *lines, facts=facts, then="dvc repro fuse")
    if update and moved and not console.as_json:
        console.done("update", *moved, facts={})
    return 0


def _lock_base(recipe: Recipe, before: Lock | None, note: file_state.Note, console: Console, *, update: bool) -> Lock:
    """Pin the base, and have it here, but of one that is streamed the small files alone."""
    if not recipe.streams:
        return hub.lock_base(recipe.base, previous=before, update=update, transfer=recipe.download, note=note)
    base = streamed_base.lock_streamed(recipe.base, previous=before, update=update, transfer=recipe.download)
    console.warn(
        f"{base.label} is not fetched (download.stream): `fuse` and `verify` read its weights from the Hub; pictures "
        "and quantised exports need them here, and are refused until download.stream is false"
    )
    return base


if __name__ == "__main__":
    run_stage(download, "update", "loras-only", kept=KEPT)
