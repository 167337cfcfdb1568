"""Where stages leave their results, and how they read each other's; in `artifacts/` the paths are dvc.yaml's.

Of a variant they are those of variants/dvc.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lora_fuse.errors import BadSource, Rerun
from lora_fuse.lora import LoraInput
from lora_fuse.machine import files
from lora_fuse.recipe.hf_cache import locate
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import SCHEMA, BaseLock, Lock, LoraLock, from_json, to_json

ROOT = Path("artifacts")
GOLDEN = ROOT / "golden"  # approved pictures, by recipe: every build of a recipe is compared with the same


@dataclass(frozen=True, slots=True)
class Artifacts:
    """The results of one build, all below `root`.

    Attributes:
        root: a folder.
        variant: whose results they are; None for the main build.
        shared_base: the base's lock, where variants of the same base share it.
        published: whether the variant goes to a Hub, and so has a stage in publish/dvc.yaml.
    """

    root: Path = ROOT
    variant: str | None = None
    shared_base: Path | None = None
    published: bool = False

    @classmethod
    def of_variant(cls, name: str, params: Recipe) -> Artifacts:
        """The results of a variant."""
        shared_base = ROOT / "bases" / f"{params.base.key}.lock.json"
        return cls(ROOT / "variants" / name, name, shared_base, params.publish.enabled)

    @property
    def base_lock(self) -> Path:
        """The base's commit and files."""
        return self.shared_base or self.root / "base.lock.json"

    @property
    def base_sources(self) -> Path:
        """Of a base that variants share, that it was fetched to this machine, see `sources`."""
        return self.base_lock.with_name(self.base_lock.name.replace(".lock.", ".sources."))

    @property
    def lora_lock(self) -> Path:
        """The LoRAs' commits and files."""
        return self.root / "lora.lock.json"

    @property
    def sources(self) -> Path:
        """What was fetched to this machine; unlike the locks, it does not travel."""
        return self.root / "sources.json"

    @property
    def merged(self) -> Path:
        """The merged repository."""
        return self.root / "merged"

    @property
    def manifest(self) -> Path:
        """Its files and what it was made of."""
        return self.root / "merged.manifest.json"

    @property
    def verify(self) -> Path:
        """What the second derivation found."""
        return self.root / "verify.json"

    @property
    def goldens(self) -> Path:
        """Which goldens its recipe has."""
        return self.root / "goldens.json"

    @property
    def regression(self) -> Path:
        """The folder of all that `regress` writes."""
        return self.root / "regression"

    @property
    def images(self) -> Path:
        """The run's pictures."""
        return self.regression / "images"

    @property
    def candidates(self) -> Path:
        """The records of the pictures, for an approval."""
        return self.regression / "candidates.json"

    @property
    def metrics(self) -> Path:
        """Flat numbers and verdicts."""
        return self.regression / "metrics.json"

    @property
    def cases(self) -> Path:
        """The same, a row for each case."""
        return self.regression / "cases.json"

    @property
    def blocks(self) -> Path:
        """How much the LoRAs change each block."""
        return self.regression / "blocks.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.regression / "report.html"

    @property
    def exported(self) -> Path:
        """The folder of the other formats."""
        return self.root / "export"

    @property
    def exports(self) -> Path:
        """What is in it."""
        return self.root / "export.json"

    @property
    def release(self) -> Path:
        """The files that are published beside the checkpoint."""
        return self.root / "release"

    @property
    def receipt(self) -> Path:
        """What was published, and where."""
        return self.root / "publish.json"

    def read_locks(self) -> tuple[Lock, dict[str, Lock]]:
        """What the download stage pinned: the base, and the LoRAs by name."""
        base = from_json(BaseLock, read_text(self.base_lock, "download"), str(self.base_lock))
        loras = from_json(LoraLock, read_text(self.lora_lock, "download"), str(self.lora_lock))
        return base.base, loras.loras

    def write_locks(self, base: Lock, loras: Mapping[str, Lock]) -> None:
        """Pin what was locked elsewhere, for a build that downloads nothing itself."""
        files.replace_text(self.base_lock, to_json(BaseLock(SCHEMA, base)))
        files.replace_text(self.lora_lock, to_json(LoraLock(SCHEMA, dict(loras))))

    def earlier_locks(self) -> tuple[Lock | None, dict[str, Lock]]:
        """The pins of the last run, as far as there are any: a branch that moved since does not move a build."""
        base, loras = self.base_lock, self.lora_lock
        return (
            from_json(BaseLock, base.read_text(encoding="utf-8"), str(base)).base if base.exists() else None,
            from_json(LoraLock, loras.read_text(encoding="utf-8"), str(loras)).loras if loras.exists() else {},
        )


HERE = Artifacts()

# Fuses and verifies files that are pinned already, beside the main build; what was found is for the caller to read.
Merge: TypeAlias = Callable[[Recipe, Artifacts, Lock, Mapping[str, Lock]], None]


def read_text(path: Path, stage: str) -> str:
    """The text of another stage's result.

    Raises:
        BadSource: it is not there; the message names the stage that makes it.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadSource(f"{path} is not there", rerun=Rerun(stage)) from error


def read_object(path: Path, stage: str) -> dict[str, Any]:
    """A stage's flat JSON result."""
    content: dict[str, Any] = _read_json(path, stage, dict, "mapping")
    return content


def read_rows(path: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's JSON list of rows."""
    content: list[dict[str, Any]] = _read_json(path, stage, list, "list")
    return content


def _read_json(path: Path, stage: str, kind: type, called: str) -> Any:
    again = Rerun(stage, force=True)
    try:
        content = json.loads(read_text(path, stage))
    except ValueError as error:
        raise BadSource(f"{path} is not JSON ({error})", rerun=again) from error
    if not isinstance(content, kind):
        raise BadSource(f"{path} holds a {type(content).__name__}, not a {called}", rerun=again)
    return content


def lora_inputs(loras: Mapping[str, Lock], params: Recipe) -> list[LoraInput]:
    """The pinned LoRAs (files and PEFT folders) with the scales of the recipe."""
    return [
        LoraInput(name, locate(lock) / lock.lora_name, params.fuse.scale_of(name))
        for name, lock in sorted(loras.items())
    ]
