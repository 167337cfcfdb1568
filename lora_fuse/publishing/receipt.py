"""The receipt: what was published where. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_fuse.records import SCHEMA, FileRecord


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was published where, or why nothing was; `private` is what the Hub says, `files` has the card.

    `pull_request` is the number of the one that brought the bytes, None if they came another way.
    """

    schema: int
    status: Literal["published", "skipped"]
    reason: str | None
    repo_id: str | None
    commit: str | None
    tag: str | None
    pull_request: int | None
    url: str | None
    private: bool | None
    files: dict[str, FileRecord]
    manifest_sha256: str


def skipped(reason: str, manifest_sha256: str) -> Receipt:
    """The receipt of a publication that was not asked for."""
    return Receipt(SCHEMA, "skipped", reason, None, None, None, None, None, None, {}, manifest_sha256)
