"""A merge of files that are pinned already, beside the main build: for a validation, for a point of a sweep."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fuse.machine import Console
from lora_fuse.recipe import Artifacts, Lock, Recipe
from stages.fuse import fuse
from stages.verify import verify


def merge(params: Recipe, at: Artifacts, base: Lock, loras: Mapping[str, Lock]) -> None:
    """Fuse and verify by the stages' own functions, in silence; what `verify` found is for the caller to read."""
    at.write_locks(base, loras)
    for stage in (fuse, verify):
        stage(params, at, Console(quiet=True))
