"""Where stages leave their results, and how they read each other's; the same paths as in dvc.yaml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fuse import hub
from lora_fuse.errors import BadSource
from lora_fuse.lora import LoraInput
from lora_fuse.records import BaseLock, Lock, LoraLock, from_json
from stages.params import Params

ROOT = Path("artifacts")
BASE_LOCK = ROOT / "base.lock.json"
LORA_LOCK = ROOT / "lora.lock.json"
MERGED = ROOT / "merged"
MANIFEST = ROOT / "merged.manifest.json"
VERIFY = ROOT / "verify.json"
REGRESSION = ROOT / "regression"
IMAGES = REGRESSION / "images"
CANDIDATES = REGRESSION / "candidates.json"
METRICS = REGRESSION / "metrics.json"
CASES = REGRESSION / "cases.json"
BLOCKS = REGRESSION / "blocks.json"
REPORT = REGRESSION / "report.html"
GOLDEN = ROOT / "golden"
EXPORTED = ROOT / "export"
EXPORTS = ROOT / "export.json"
RELEASE = ROOT / "release"
RECEIPT = ROOT / "publish.json"


def read_text(path: Path, stage: str) -> str:
    """The text of another stage's result.

    Raises:
        BadSource: it is not there; the message names the stage that makes it.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadSource(f"{path} is not there; run the stage that makes it: dvc repro {stage}") from error


def read_locks() -> tuple[Lock, dict[str, Lock]]:
    """What the download stage pinned: the base, and the LoRAs by name."""
    base = from_json(BaseLock, read_text(BASE_LOCK, "download"), str(BASE_LOCK))
    loras = from_json(LoraLock, read_text(LORA_LOCK, "download"), str(LORA_LOCK))
    return base.base, loras.loras


def read_object(path: Path, stage: str) -> dict[str, Any]:
    """A stage's flat JSON result."""
    content: dict[str, Any] = _read_json(path, stage, dict, "mapping")
    return content


def read_rows(path: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's JSON list of rows."""
    content: list[dict[str, Any]] = _read_json(path, stage, list, "list")
    return content


def _read_json(path: Path, stage: str, kind: type, called: str) -> Any:
    try:
        content = json.loads(read_text(path, stage))
    except ValueError as error:
        raise BadSource(f"{path} is not JSON ({error}); run its stage again: dvc repro -f {stage}") from error
    if not isinstance(content, kind):
        raise BadSource(f"{path} holds a {type(content).__name__}, not a {called}; run again: dvc repro -f {stage}")
    return content


def lora_inputs(loras: Mapping[str, Lock], params: Params) -> list[LoraInput]:
    """The pinned LoRAs (files and PEFT folders) with the scales of the recipe."""
    return [
        LoraInput(name, hub.locate(lock) / lock.lora_name, params.fuse.scale_of(name))
        for name, lock in sorted(loras.items())
    ]
