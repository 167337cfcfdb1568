"""A variant in the catalog: its lineage, verdict, size, pictures and place on the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_fuse.pictures import encode

State = Literal["built", "stale", "incomplete", "not built", "unreadable"]


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the lineage; `commit` is None of a local folder and of what is not built yet."""

    name: str  # in the recipe; ``base``, or the LoRA's
    place: str  # repository or folder
    asked: str | None = None  # the branch, tag or commit in the configuration
    commit: str | None = None  # that it was built from, 40 hex digits
    file: str | None = None  # of a LoRA, its path there
    sha256: str | None = None  # of a LoRA, its file's
    scale: float | None = None  # of a LoRA, that it was added with

    @property
    def label(self) -> str:
        """``place@commit``, or what was asked for."""
        at = self.commit or self.asked
        return f"{self.place}@{at}" if at else self.place


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the merged repository.

    `from_base` are of files that are the base's; `hard_linked` of those that are the very files of the base on this
    disk, None if the base is not on this machine. A filesystem that shares blocks (reflinks) does not say so.
    """

    total: int
    from_base: int
    hard_linked: int | None


@dataclass(frozen=True, slots=True)
class CasePicture:
    """A case's merged picture: its path, and a thumbnail of it, None if there is no picture."""

    case: str
    prompt: str
    verdict: str | None
    path: Path
    thumbnail: encode.Encoded | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication; `notes` say how it differs from what is built or asked for now."""

    repo_id: str
    commit: str
    tag: str | None
    url: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A variant as it is found.

    `notes` say what is missing or stale; `judged` is the time of the verdict (UTC, ISO 8601); `command` comes next, if
    anything does. `targets` is the number of changed weights, `weights` True if they were verified.
    """

    name: str
    recipe: str
    state: State
    notes: tuple[str, ...]
    command: str | None
    pipeline: str
    base: Step
    loras: tuple[Step, ...]
    repo_id: str | None
    tag: str | None
    weights: bool | None = None
    targets: int | None = None
    size: Size | None = None
    verdict: str | None = None
    passed: bool | None = None
    environment: str | None = None
    judged: str | None = None
    report: Path | None = None
    manifest_sha256: str | None = None
    pictures: tuple[CasePicture, ...] = ()
    publication: Publication | None = None
