"""Ways in which the base's files that do not change get into a merge: shared with the base, or copied.

Text is copied, as it is edited in place. Weights are large, and only ever replaced. Where blocks cannot be shared
(`files.Untouched`), a hard link is as good as that until somebody opens one of its two names and writes: it is made of
read-only files only. Those of the Hub client's cache are made so, as the client makes those that repositories share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion.plan import Plan
from lora_fuse.machine import file_state, files
from lora_fuse.recipe import hf_cache

Ways = Mapping[str, files.Untouched]


def ways_of(plan: Plan, place: Path, untouched: files.Untouched) -> Ways:
    """The way of each file of the base that does not change to `place`, by POSIX path, without ``auto``."""
    fused = {shard.relative for shard in plan.fused_shards}
    folder = files.nearest_folder(place)
    others = [*(shard.relative for shard in plan.checkpoint.shards), *plan.checkpoint.others]
    shares: dict[int, bool] = {}  # blocks, by device
    ways: dict[str, files.Untouched] = {}
    for name in others:
        if name in fused:
            continue
        given = plan.checkpoint.locate(name)
        source = given.resolve()
        is_weight = repository_files.is_weights(given.name) or repository_files.is_weights(source.name)
        device = _device(source)
        ways[name] = "copy"
        if not is_weight or untouched == "copy" or device != folder.stat().st_dev:
            continue
        if untouched != "hardlink" and device not in shares:
            shares[device] = files.can_reflink(source, folder)
        if untouched != "hardlink" and shares[device]:
            ways[name] = "reflink"
        elif untouched == "hardlink" or (untouched == "auto" and (files.is_read_only(source) or _is_cached(given))):
            ways[name] = "hardlink"
    return ways


def take_over(given: Path, target: Path, way: files.Untouched, states: file_state.FileStates) -> None:
    """Make `target` a file with the content of a base's, through links; a hard link to the cache is read-only.

    The `states` of the base's files are told of the link.
    """
    source = given.resolve()
    if way == "hardlink":
        with states.linking([given]), suppress(OSError):  # another filesystem, or another user's file
            if _is_cached(given):
                files.make_read_only(source)
            os.link(source, target)
            return
        way = "copy"
    files.take_over(source, target, way)


def _is_cached(given: Path) -> bool:
    """True for a file of a snapshot in the Hub client's cache, wherever its content lies there."""
    repo_id, _ = hf_cache.cached_from(given.parent.resolve() / given.name)
    return repo_id is not None


def _device(source: Path) -> int:
    try:
        return source.stat().st_dev
    except OSError as error:
        raise BadCheckpoint(f"{source} is not there any more ({error.strerror}); fetch it again") from error
