"""Versions of a LoRA: the one judged, the one in use, the one that was approved; each pinned, with its scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fuse import hub
from lora_fuse.errors import BadConfig, BadSource
from lora_fuse.lora import LoraInput
from lora_fuse.models import pair_warnings
from lora_fuse.recipe import Lock, Recipe, Source, hf_cache, paths
from lora_fuse.regression import goldens

REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@]+))?:(?P<file>.+)")


def parse_lora(text: str) -> dict[str, str | None]:
    """A LoRA as it is given on a command line, in the keys of a recipe.

    It is ``owner/name[@revision]:path/in/it.safetensors``, or the path of a file or of a PEFT folder.

    Raises:
        BadConfig: it is neither.
    """
    path = Path(text)
    if path.is_file():
        return {"repo_id": None, "path": path.parent.as_posix(), "revision": None, "filename": path.name}
    if path.is_dir():
        return {"repo_id": None, "path": path.as_posix(), "revision": None, "filename": "."}
    named = REPOSITORY.fullmatch(text)
    if named is None:
        raise BadConfig(
            f"the LoRA {text!r} is neither a file or folder here nor owner/name[@revision]:file; name one of them"
        )
    revision = named["revision"] or "main"
    return {"repo_id": named["repo"], "path": None, "revision": revision, "filename": named["file"]}


def replaced(recipe: Recipe, lora: str, name: str | None) -> str:
    """The name of the recipe's LoRA that another takes the place of.

    Raises:
        BadConfig: there are several and none is named, or none has that name.
    """
    names = sorted(recipe.loras)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        raise BadConfig(
            f"recipe {recipe.name} has the LoRAs {', '.join(names)}, and {'none is chosen' if name is None else name}; "
            f"say which one {lora} takes the place of: --name {names[0]}"
        )
    return name


def candidate(recipe: Recipe, lora: str | None, name: str | None, scale: float | None) -> Recipe:
    """The recipe with the new LoRA in it."""
    tree: dict[str, Any] = recipe.model_dump()
    if lora is not None:
        tree["loras"][replaced(recipe, lora, name)] = parse_lora(lora)
    if scale is not None:
        tree["fuse"]["scale"] = scale
    return Recipe.parse(tree, "the candidate")


@dataclass(frozen=True, slots=True)
class Version:
    """LoRAs as they are pinned, by their name in the recipe, and the scale of each."""

    locks: Mapping[str, Lock]
    scales: Mapping[str, float]

    @property
    def inputs(self) -> list[LoraInput]:
        """The same as inputs of a fuse."""
        return [
            LoraInput(name, self.path(name), self.scales[name], lock.component)
            for name, lock in sorted(self.locks.items())
        ]

    def path(self, name: str) -> Path:
        """The path of one of them."""
        return hf_cache.locate(self.locks[name]) / self.locks[name].lora_name

    def label(self, name: str) -> str:
        """Its name for a person."""
        lock = self.locks[name]
        return f"{lock.label}{':' if lock.repo_id else '/'}{lock.lora_name}"


def misfits(base: Lock, new: Version, current: Version | None, name: str) -> list[str]:
    """Facts against the pair of base and new LoRA; none where they are against the current pair as well.

    A recipe may pair them on purpose, and its next version is no worse for it.
    """

    def against(lock: Lock | None) -> list[str]:
        return [] if lock is None else pair_warnings(base.repo_id, [(lock.repo_id, lock.lora_name)])

    before = None if current is None else current.locks.get(name)
    return [] if against(before) else against(new.locks[name])


def lock_loras(recipe: Recipe, fresh: str | None = None) -> Version:
    """The recipe's LoRAs, each at the commit of the current build, but for the one that is `fresh`."""
    _, before = paths.HERE.earlier_locks()
    locks = {
        name: hub.lock_lora(
            lora, lora.filename, previous=None if name == fresh else before.get(name), transfer=recipe.download
        )
        for name, lora in sorted(recipe.loras.items())
    }
    return Version(locks, {name: recipe.fuse.scale_of(name) for name in locks})


def approved_version(recipe: Recipe, approved: Mapping[str, list[goldens.Approved]]) -> Version | None:
    """The LoRAs that the goldens were approved with; None if there are none, or a file is not what it was then."""
    first = next((picture.record.provenance for pictures in approved.values() for picture in pictures), None)
    if first is None:
        return None
    locks = {}
    for lora in first.loras:
        try:
            source = Source(repo_id=lora.repo_id, path=lora.path, revision=lora.revision)
            lock = hub.lock_lora(source, str(lora.filename), previous=None, transfer=recipe.download)
        except (BadSource, ValueError):  # it is gone, or the record names no place
            return None
        if lora.sha256 not in {record.sha256 for record in lock.files.values()}:
            return None
        locks[lora.name] = lock
    return Version(locks, {lora.name: lora.scale for lora in first.loras})
