"""The files of a merged repository that are made here and not taken over from the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lora_fuse.checkpoint.repository_files import MODEL_INDEX, SCHEDULER_CONFIG
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import files


def diffusers_files(base: Path, *, pipeline: str | None, scheduler: Mapping[str, object]) -> dict[str, bytes]:
    """The generated files of a diffusers repository, by POSIX path; without a class or settings, the base's are kept.

    A step-distilled LoRA needs its own scheduler: the base's shifts the sigmas elsewhere and breaks the picture. One of
    another class, `_class_name`, is named in the pipeline's index too: the index decides what is loaded.

    Raises:
        BadCheckpoint: the base's own files cannot be read as JSON.
    """
    generated = {}
    index = _read(base / MODEL_INDEX)
    changed: dict[str, object] = {} if pipeline is None else {"_class_name": pipeline}
    if kind := scheduler.get("_class_name"):
        changed["scheduler"] = ["diffusers", str(kind)]
    if any(index.get(key) != value for key, value in changed.items()):
        generated[MODEL_INDEX] = _dump({**index, **changed})
    if scheduler:
        own = {key: value for key, value in _read(base / SCHEDULER_CONFIG).items() if key.startswith("_")}
        generated[SCHEDULER_CONFIG] = _dump({**own, **scheduler})
    return generated


def _read(path: Path) -> dict[str, object]:
    return files.read_json(path, dict, BadCheckpoint, "fetch the base again")


def _dump(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
