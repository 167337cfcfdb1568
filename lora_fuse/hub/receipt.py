"""The receipt: what was published where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_fuse.errors import NoSpace
from lora_fuse.machine import FileRecord, files
from lora_fuse.recipe import records


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

    def __str__(self) -> str:
        return (
            f"{self.status}: {self.repo_id}@{self.commit}" if self.reason is None else f"{self.status}, {self.reason}"
        )

    def write(self, path: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            NoSpace: it cannot be written, though it is true.
        """
        try:
            files.replace_text(path, records.to_json(self))
        except OSError as error:
            raise NoSpace(
                f"{path} cannot be written ({error.strerror}), {self}; make room and publish again"
            ) from error

    @classmethod
    def skipped(cls, reason: str, manifest_sha256: str) -> Receipt:
        """The receipt of a publication that was not asked for."""
        return cls(records.SCHEMA, "skipped", reason, None, None, None, None, None, None, {}, manifest_sha256)
