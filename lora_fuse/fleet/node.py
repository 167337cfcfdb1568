"""The side of a node: its software, its folder, and a job that runs in a fresh folder of it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from lora_fuse.errors import BadConfig, BadSource, Busy, LoraFuseError, naming_extras
from lora_fuse.machine import files, interrupts, progress, staging
from lora_fuse.recipe import checkout, hf_cache, paths

WORK = "LORA_FUSE_WORK"  # the folder that a node works in, said where it is started
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "numba", "pillow")


@dataclass(frozen=True, slots=True)
class Software:
    """Everything by which a node could make other bytes or pictures from the same code."""

    python: str
    machine: str
    lora_fuse: str
    libraries: tuple[tuple[str, str], ...]

    @classmethod
    def here(cls) -> Software:
        """The software of this process."""
        found = tuple((name, _version(name)) for name in LIBRARIES)
        return cls(platform.python_version(), platform.machine(), checkout.this_version(), found)

    def differences(self, node: Software) -> list[str]:
        """The parts that differ, as ``torch 2.13.0 here, 2.12.1 there``."""
        mine, theirs = ({**_plain(each), **dict(each.libraries)} for each in (self, node))
        return [
            f"{name.replace('_', '-')} {mine[name]} here, {theirs.get(name)} there"
            for name in mine
            if mine[name] != theirs.get(name)
        ]

    def refuse_other(self, node: Software, where: str) -> None:
        """Refuse a node that has other software.

        Raises:
            BadConfig: it has; the message names both versions.
        """
        if apart := self.differences(node):
            raise BadConfig(
                f"the node {where} has other software than this machine: {'; '.join(apart)}; the same bytes and "
                "pictures are promised for the same only: install the versions of constraints.txt on both"
            )


def _plain(software: Software) -> dict[str, str]:
    return {field.name: getattr(software, field.name) for field in fields(software) if field.name != "libraries"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The answer of a node: its host, its software, the folders that it lacks, and the bases that it holds."""

    host: str
    software: Software
    lacks: tuple[str, ...]
    holds: frozenset[str]


def look(absolute: Iterable[str], bases: Iterable[str]) -> NodeFacts:
    """Look at this node: local sources by whole path, and Hub repositories by id."""
    lacks = tuple(path for path in absolute if not Path(path).exists())
    cached = (name for name in bases if any(hf_cache.repository_folder(name).glob("snapshots/*/model_index.json")))
    return NodeFacts(platform.node(), Software.here(), lacks, frozenset(cached))


def refuse_lacking(facts: NodeFacts) -> None:
    """Refuse a node without a local source.

    Raises:
        BadSource: something that is named by a whole path is not there.
    """
    if facts.lacks:
        raise BadSource(
            f"{facts.lacks[0]} is not on the node {facts.host}, and a source that is named by a whole path does not "
            "travel: copy or mount it there at the same path, or name a Hub repository"
        )


def work_folder() -> Path:
    """The folder that this node works in: `LORA_FUSE_WORK`, or ``lora-fuse`` in the user's cache, beside the Hub's.

    On the disk of the Hub client's cache a merge shares the files that it does not change.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(WORK) or Path(cache) / "lora-fuse").absolute()


@contextmanager
def job_folder(package: Path) -> Iterator[Path]:
    """Be in a fresh folder with everything that travelled, and remove it with all that was made in it.

    Code and inputs are links; `artifacts` is a copy, as results are written there. What killed jobs left is removed.
    """
    work = work_folder()
    work.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(work)
    folder = work / f"job-{uuid4().hex[:12]}"
    before = Path.cwd()
    with staging.exclusive(folder):  # held before it is there, or another job would take it for a leftover
        try:
            _fill(folder, package, work / paths.SEEN.name)
            os.chdir(folder)
            yield folder
            if paths.SEEN.exists():
                files.replace_bytes(work / paths.SEEN.name, paths.SEEN.read_bytes())
        finally:
            os.chdir(before)
            _remove(folder)


def _fill(folder: Path, package: Path, seen: Path) -> None:
    folder.mkdir()
    for path in package.iterdir():
        if path.name != paths.ROOT.name:
            (folder / path.name).symlink_to(path)
    if (package / paths.ROOT).is_dir():
        shutil.copytree(package / paths.ROOT, folder / paths.ROOT)
    (folder / paths.ROOT).mkdir(exist_ok=True)
    if seen.exists():  # what was hashed on this node stays known
        files.replace_bytes(folder / paths.SEEN, seen.read_bytes())


def _remove_leftovers(work: Path) -> None:
    for folder in work.glob("job-*"):
        with suppress(Busy), staging.exclusive(folder):  # a busy one is at work
            _remove(folder)


def _remove(folder: Path) -> None:
    staging.remove(folder)
    staging.remove(folder.parent / f".{folder.name}.lock")


def do_job(work: Callable[[Any], Any], argument: object, software: Software) -> tuple[str, object | LoraFuseError]:
    """Do one job on this node; returns the host's name with its result, or with the error that refused it."""
    host = platform.node()
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to the job's CPUs, and torch's threads are the recipe's
    try:
        software.refuse_other(Software.here(), host)
        with job_folder(Path.cwd()), naming_extras("a job of the fleet"), progress.silence():
            return host, work(argument)
    except Exception as error:  # noqa: BLE001 - it travels back as what a user is told; an interrupt ends the job
        return host, interrupts.refusal(error, f"on {host}")
