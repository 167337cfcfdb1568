"""Whole files: hashed as they are, replaced whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lora_fuse.records import FileRecord


def hash_file(path: Path) -> FileRecord:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def replace_text(path: Path, text: str) -> None:
    """Give `path` a new content: a reader, or a kill at any moment, finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
