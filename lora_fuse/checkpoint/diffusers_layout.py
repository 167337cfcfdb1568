"""The files of a merged repository that are made here and not taken over from the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lora_fuse.errors import BadCheckpoint

MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


def diffusers_files(base: Path, *, pipeline: str | None, scheduler: Mapping[str, object]) -> dict[str, bytes]:
    """The generated files of a diffusers repository, by POSIX path.

    A step-distilled LoRA needs its own scheduler: the base's shifts the sigmas elsewhere and breaks the picture.

    Args:
        base: the base's pipeline folder.
        pipeline: the pipeline class that the recipe runs; None keeps the base's.
        scheduler: the scheduler settings that the recipe wants; empty keeps the base's file.

    Raises:
        BadCheckpoint: the base's own files cannot be read as JSON.
    """
    files = {}
    index = _read(base / MODEL_INDEX)
    if pipeline is not None and index.get("_class_name") != pipeline:
        files[MODEL_INDEX] = _dump({**index, "_class_name": pipeline})
    if scheduler:
        own = {key: value for key, value in _read(base / SCHEDULER_CONFIG).items() if key.startswith("_")}
        files[SCHEDULER_CONFIG] = _dump({**own, **scheduler})
    return files


def _read(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is not readable JSON ({error}); fetch the base again") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} holds a {type(content).__name__}, not a mapping; fetch the base again")
    return content


def _dump(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
