"""Recipes before they are sent to nodes: at the commits that branches mean now, and with what a job of each takes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from lora_fuse.errors import BadConfig, Refused
from lora_fuse.fleet.needs import Needs
from lora_fuse.hub import sizes
from lora_fuse.recipe import Lock, Recipe, Source


class Demands:
    """Sizes and commits of sources, each asked for once; what was locked keeps its commit. Nothing is fetched."""

    def __init__(self, known: Iterable[Lock]) -> None:
        self._known = list(known)
        self._sizes: dict[object, sizes.SourceSize] = {}

    def of(self, recipe: Recipe) -> tuple[Recipe, Needs]:
        """The recipe with each branch or tag of a Hub replaced by its commit, the same for all nodes; its needs.

        Raises:
            BadConfig: a placement says no number of GPUs, or a CPU's threads, on which pictures depend, are not said.
            BadSource: the base is not to be had.
        """
        base = self._size(recipe, recipe.base)
        tree: dict[str, Any] = recipe.model_dump()
        if recipe.base.repo_id is not None:
            tree["base"]["revision"] = base.root.name  # of a folder of the client's cache, snapshots/COMMIT
        for name, lora in recipe.loras.items():
            if lora.repo_id is not None:
                with suppress(Refused):  # the job says it, of its own LoRA
                    tree["loras"][name]["revision"] = self._size(recipe, lora, lora.filename).root.name
        return Recipe.parse(tree, "the recipe at its commits"), needs_of(recipe, base)

    def _size(self, recipe: Recipe, source: Source, filename: str | None = None) -> sizes.SourceSize:
        key = (source.place, filename)
        if key not in self._sizes:
            same = [lock for lock in self._known if (lock.repo_id, lock.path, lock.requested) == source.place]
            timeout = recipe.download.stall_seconds
            if filename is None:
                known = next((lock for lock in same if "model_index.json" in lock.files), None)
                self._sizes[key] = sizes.base_size(source, known, timeout=timeout)
            else:
                known = max(same, key=lambda lock: lock.lora_name == filename, default=None)
                self._sizes[key] = sizes.lora_size(source, filename, known, timeout=timeout)
        return self._sizes[key]


def needs_of(recipe: Recipe, base: sizes.SourceSize) -> Needs:
    """The threads, GPUs, memory and disk of one job: it merges, verifies and renders.

    A merged checkpoint is on the disk beside the base. Weights are in the machine's memory but where they go straight
    from their files to a GPU.

    Raises:
        BadConfig: a placement says no number of GPUs, or a CPU's threads, on which pictures depend, are not said.
    """
    regress = recipe.regress
    if regress.placement == "balanced":
        raise BadConfig(
            "regress.placement is balanced, which takes as many GPUs as it sees, and a job asks for a number: set "
            "it to cuda, model_offload or group_offload"
        )
    if regress.placement == "cpu" and regress.threads is None:
        raise BadConfig("regress.threads is null, and pictures made on a CPU depend on it: set it to a number")
    gpus = 0 if regress.placement == "cpu" else 1
    grown = (recipe.fuse.growth - 1) * base.fused(recipe.components)
    merged = grown + (base.total if recipe.fuse.untouched == "copy" else base.fused(recipe.components))
    memory = 0 if regress.placement == "cuda" else base.total
    return Needs(1 if gpus else regress.threads or 1, gpus, memory, merged)
