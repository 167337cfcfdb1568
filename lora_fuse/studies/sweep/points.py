"""The folder that a sweep keeps of each point, named after everything that its pictures depend on, and its record.

A record is written last, so that it is there only if all else is; it is right if every file that it names still has its
sha256. A point whose record is right is never built again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

from lora_fuse.errors import BadSource, Busy
from lora_fuse.machine import FileRecord, files, staging
from lora_fuse.recipe import records

SCHEMA = 1
POINTS = "points"
BASELINES = "baseline"  # of the base alone
RECORD = "point.json"
METRICS = "metrics.json"
IMAGES = "images"
MERGED = "merged"
POLL = 0.2  # seconds between two tries to hold what another process holds


def key_of(inputs: Mapping[str, Any]) -> str:
    """The sha256 of JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, allow_nan=False).encode()).hexdigest()


def folder_of(key: str) -> str:
    """The name of the folder of a point, or of a base's pictures, with that key."""
    return key[:16]


@dataclass(frozen=True, slots=True)
class PointRecord:
    """A point that was tried: its inputs and its files, or the reason why it was refused.

    `key` is the hash of `inputs`; `kept` says that the merged checkpoint was to stay.
    """

    schema: int
    key: str
    inputs: dict[str, Any]
    files: dict[str, FileRecord]
    refused: str | None = None
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One point: its label (its own overrides), and the folder of all that is kept of it."""

    label: str
    key: str
    folder: Path

    def record(self) -> PointRecord | None:
        """Its record, None if there is none or if it is not of these inputs."""
        record = read_record(self.folder)
        return record if record is not None and (record.schema, record.key) == (SCHEMA, self.key) else None

    def is_done(self, *, keep: bool = False) -> bool:
        """True if it was built and all that was kept is as it was, with `keep` the merged checkpoint too."""
        record = self.record()
        if record is None or record.refused is not None or not record.files:
            return False
        if keep and not (record.kept and (self.folder / MERGED).is_dir()):
            return False
        return all(_is_same(self.folder / name, file) for name, file in record.files.items())

    def metrics(self) -> dict[str, Any]:
        """The content of its `metrics.json`; it is done."""
        content: dict[str, Any] = json.loads((self.folder / METRICS).read_text(encoding="utf-8"))
        return content

    def finish(self, inputs: Mapping[str, Any], *, kept: bool) -> None:
        """Write the record, as the last of all."""
        names = [METRICS, *(f"{IMAGES}/{path.name}" for path in sorted((self.folder / IMAGES).glob("*.png")))]
        written = {name: files.hash_file(self.folder / name) for name in names}
        self._write(PointRecord(SCHEMA, self.key, dict(inputs), written, kept=kept))

    def refuse(self, inputs: Mapping[str, Any], sentence: str) -> None:
        """Record that it cannot be built, and why."""
        self._write(PointRecord(SCHEMA, self.key, dict(inputs), {}, sentence))

    def _write(self, record: PointRecord) -> None:
        files.replace_text(self.folder / RECORD, records.to_json(record))


def read_record(folder: Path) -> PointRecord | None:
    """The record of whatever point a folder is of; None if there is none, or it cannot be read."""
    path = folder / RECORD
    try:
        return records.read(PointRecord, path)
    except (OSError, BadSource):
        return None


def _is_same(path: Path, file: FileRecord) -> bool:
    try:
        return files.hash_file(path) == file
    except OSError:
        return False


def clear_leftovers(points: Path, mine: Iterable[Point]) -> None:
    """Remove merged checkpoints in `points` that a killed process left, but for what one of mine would go on with."""
    unfinished = {point.folder for point in mine}
    for folder in sorted(points.glob("*")):
        record = read_record(folder)
        left = [folder / MERGED, *([] if folder in unfinished else folder.glob(f".{MERGED}.partial-*"))]
        if (record is not None and record.kept) or not any(path.exists() for path in left):
            continue
        try:
            with staging.exclusive(folder):
                for path in left:
                    staging.remove(path)
        except Busy:  # it is being built
            continue


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold `path` alone as soon as nobody else does; a killed process holds nothing."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(staging.exclusive(path))
                break
            except Busy:
                sleep(POLL)
        yield
