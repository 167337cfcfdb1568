"""The files that stages leave and read from each other; below `artifacts/` these paths are dvc.yaml's.

A variant's are those of variants/dvc.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_fuse.errors import BadSource, Rerun
from lora_fuse.lora import LoraInput
from lora_fuse.machine import file_state, files
from lora_fuse.recipe import records
from lora_fuse.recipe.held_inputs import HeldInputs
from lora_fuse.recipe.hf_cache import locate
from lora_fuse.recipe.records import SCHEMA, BaseLock, Lock, LoraLock

if TYPE_CHECKING:  # parameters are models of pydantic, and a plain fuse has none
    from lora_fuse.recipe.recipe import Recipe

ROOT = Path("artifacts")
SEEN = ROOT / "sources.seen.json"  # the states of files that were hashed on this machine, for all builds here
GOLDEN = ROOT / "golden"  # approved pictures, by recipe: every build of a recipe is compared with the same


@dataclass(frozen=True, slots=True)
class _Below:
    """An attribute of `Artifacts`: a path below the root."""

    name: str

    def __get__(self, build: Artifacts, _: type[Artifacts] | None = None) -> Path:
        return build.root / self.name


@dataclass(frozen=True, slots=True)
class Artifacts:
    """The results of one build, all below `root`."""

    root: Path = ROOT  # a folder
    variant: str | None = None  # the name of the variant that was built; None for the main build
    shared_base: Path | None = None  # the base's lock, where variants of the same base share it
    published: bool = False  # True if the variant goes to a Hub, and so has a stage in publish/dvc.yaml

    lora_lock = _Below("lora.lock.json")  # the LoRAs' commits and files
    sources = _Below("sources.json")  # what was fetched to this machine; unlike the locks, it does not travel
    merged = _Below("merged")  # the merged repository
    manifest = _Below("merged.manifest.json")  # its files and what it was made of
    verify = _Below("verify.json")  # the result of the second derivation
    verify_run = _Below("verify.run.json")  # the seed of its random rows, by whom and when: no out of the stage
    goldens = _Below("goldens.json")  # the list of the recipe's goldens
    regression = _Below("regression")  # the folder of all that `regress` writes
    images = _Below("regression/images")  # the run's pictures
    candidates = _Below("regression/candidates.json")  # the records of the pictures, for an approval
    metrics = _Below("regression/metrics.json")  # flat numbers and verdicts
    run = _Below("regression/run.json")  # by whom, where and when they were rendered: no out of the stage
    cases = _Below("regression/cases.json")  # the same, a row for each case
    blocks = _Below("regression/blocks.json")  # how much the LoRAs change each block
    report = _Below("regression/report.html")  # the page to look at
    exported = _Below("export")  # the folder of the other formats
    exports = _Below("export.json")  # the list of its files
    release = _Below("release")  # the files that are published beside the checkpoint
    receipt = _Below("publish.json")  # what was published, and where

    @classmethod
    def of_variant(cls, name: str, recipe: Recipe) -> Artifacts:
        """The results of a variant."""
        shared_base = ROOT / "bases" / f"{recipe.base.key}.lock.json"
        return cls(ROOT / "variants" / name, name, shared_base, recipe.publish.enabled)

    @property
    def base_lock(self) -> Path:
        """The base's commit and files."""
        return self.shared_base or self.root / "base.lock.json"

    @property
    def base_sources(self) -> Path:
        """The note that a base which variants share was fetched to this machine, see `sources`."""
        return self.base_lock.with_name(self.base_lock.name.replace(".lock.", ".sources."))

    def read_locks(self) -> tuple[Lock, dict[str, Lock]]:
        """The pins of the download stage: the base, and the LoRAs by name.

        Raises:
            BadSource: a lock is not there, or is no lock.
        """
        base = records.from_json(BaseLock, read_text(self.base_lock, "download"), str(self.base_lock))
        loras = records.from_json(LoraLock, read_text(self.lora_lock, "download"), str(self.lora_lock))
        return base.base, loras.loras

    def locks_of(self, recipe: Recipe) -> tuple[Lock, dict[str, Lock]]:
        """`read_locks`, as long as they are of what the recipe names.

        Raises:
            BadSource: a lock is not there, or is no lock; or of other sources, as where a stage is run by itself with
                settings that download did not have.
        """
        base, loras = self.read_locks()
        named = {"base": _place(*recipe.base.place)}
        pinned = {"base": _place(base.repo_id, base.path, base.requested)}
        for name, source in recipe.loras.items():
            named[f"LoRA {name}"] = f"{_place(*source.place)}: {PurePosixPath(source.filename)}"
        for name, lock in loras.items():
            asked = str(PurePosixPath(recipe.loras[name].filename)) if name in recipe.loras else ""
            file = asked if lock.is_of(asked) else lock.lora_name
            pinned[f"LoRA {name}"] = f"{_place(lock.repo_id, lock.path, lock.requested)}: {file}"
        for what in sorted(pinned.keys() | named.keys()):
            if pinned.get(what) != named.get(what):
                raise BadSource(
                    f"{what}: download pinned {pinned.get(what, 'none')}, and the recipe names "
                    f"{named.get(what, 'none')}; run download with the same settings before"
                )
        return base, loras

    def write_locks(self, base: Lock | None, loras: Mapping[str, Lock] | None) -> None:
        """Pin base and LoRAs; None leaves a lock as it is."""
        if base is not None:
            files.replace_text(self.base_lock, records.to_json(BaseLock(SCHEMA, base)))
        if loras is not None:
            files.replace_text(self.lora_lock, records.to_json(LoraLock(SCHEMA, dict(loras))))

    def earlier_locks(self) -> tuple[Lock | None, dict[str, Lock]]:
        """The pins of the last run, as far as there are any: a branch that moved since does not move a build."""
        base = records.read(BaseLock, self.base_lock).base if self.base_lock.exists() else None
        loras = records.read(LoraLock, self.lora_lock).loras if self.lora_lock.exists() else {}
        return base, loras


HERE = Artifacts()


def _place(repo_id: str | None, path: str | None, revision: str | None) -> str:
    """A repository at a revision, or a folder."""
    return f"{repo_id}@{revision}" if repo_id else str(path)


# Fuses and verifies files that are pinned already, beside the main build; what was found is for the caller to read.
Merge: TypeAlias = "Callable[[Recipe, Artifacts, Lock, Mapping[str, Lock]], None]"


def read_text(path: Path, stage: str, *, force: bool = False) -> str:
    """The text of another stage's result.

    Raises:
        BadSource: it is not there, or cannot be read; the stage that makes it has to run, by `force` although nothing
            changed.
    """
    try:
        return records.read_text(path)
    except FileNotFoundError as error:
        raise BadSource(f"{path} is not there", rerun=Rerun(stage, force=force)) from error


def read_object(path: Path, stage: str) -> dict[str, Any]:
    """A stage's flat JSON result.

    Raises:
        BadSource: it is not there, or no JSON object.
    """
    return _read_json(path, stage, dict)


def read_rows(path: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's JSON list of rows.

    Raises:
        BadSource: it is not there, or no JSON list.
    """
    return _read_json(path, stage, list)


def _read_json(path: Path, stage: str, kind: type[files.Content]) -> files.Content:
    if not path.exists():
        raise BadSource(f"{path} is not there", rerun=Rerun(stage))
    return files.read_json(path, kind, partial(BadSource, rerun=Rerun(stage, force=True)))


def lora_inputs(loras: Mapping[str, Lock], recipe: Recipe) -> list[LoraInput]:
    """The pinned LoRAs (files and PEFT folders) with the scales of the recipe."""
    return [
        LoraInput(name, locate(lock) / lock.lora_name, recipe.fuse.scale_of(name), recipe.component_of(name))
        for name, lock in sorted(loras.items())
    ]


def hold(locks: Iterable[Lock], others: Iterable[Path] = ()) -> HeldInputs:
    """Look at pinned files before they are read, see `HeldInputs`; `others` are pictures that are read with them.

    Raises:
        BadSource: a file is not here, or not what its lock says.
    """
    return HeldInputs(file_state.SeenFiles(SEEN), locks, others)


@contextmanager
def held(locks: Iterable[Lock], others: Iterable[Path] = ()) -> Iterator[None]:
    """As `hold`, and look at all of it again after what is done within: it reads, and its caller writes then.

    Raises:
        BadSource: also if a file changed meanwhile.
    """
    inputs = hold(locks, others)
    yield
    inputs.check()
    inputs.keep()
