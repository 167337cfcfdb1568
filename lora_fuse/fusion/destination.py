"""The place of a merge: what may be replaced there, and what may not. Checked before anything is written.

Replaced is what this program made, as the entry in the header of a fused shard and the manifest beside it say, and a
place with nothing in it; what else is there only if that is asked for, and an input never.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.checkpoint import PROVENANCE, read_header, repository_files
from lora_fuse.errors import BadCheckpoint, BadSource, Refused
from lora_fuse.fusion.manifest import build_path, manifest_path, read_manifest
from lora_fuse.fusion.plan import Plan
from lora_fuse.fusion.undone.merge_marks import UNMERGED
from lora_fuse.machine import files
from lora_fuse.recipe import records

ADDED = len(".") + len(".partial-") + 16  # characters of the longest name that is made of OUT's
CONTAINERS = {".safetensors", ".gguf"}  # endings of names
_Identity = tuple[int, int]  # of a file: device and inode


@dataclass(frozen=True, slots=True)
class Destination:
    """OUT as it is named, and `place`, the folder or file that is written: links are gone through, and stay."""

    out: Path
    place: Path
    replace: bool  # also what this program did not make
    folder: bool  # of any base, a file too

    @classmethod
    def at(cls, out: Path, *, replace: bool = False, folder: bool = False) -> Destination:
        """Find the place.

        Raises:
            Refused: links lead in a circle.
        """
        try:
            place = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
        except (OSError, RuntimeError) as error:
            raise Refused(f"OUT {out} cannot be found ({error}); name another place") from error
        return cls(place if out.name in ("", "..") else out, place, replace, folder)

    def check(self, plan: Plan, generated: Mapping[str, bytes]) -> None:
        """Refuse a place that must not be replaced, or cannot be written.

        Raises:
            Refused: it is, holds, or lies in something that the merge reads; it is of another kind than the base; it
                has things that this program did not make, and `replace` is false; or nothing can be written there.
        """
        try:
            self._refuse_inputs(plan)
            self._refuse_kind(plan)
            self._refuse_unwritable()
            if not self.replace:
                self._refuse_foreign(plan, generated)
        except OSError as error:
            raise Refused(f"OUT {self.out}: {error.filename} cannot be read ({error.strerror}); mend it") from error

    def _refuse_foreign(self, plan: Plan, generated: Mapping[str, bytes]) -> None:
        for path, kind in ((manifest_path(self.out), records.Manifest), (self.build, records.BuildRecord)):
            if path.exists() and not _holds(kind, path):
                raise self._foreign(path, f"is no {kind.__name__} of a merge, and would be overwritten")
        if self.place.is_dir() and any(self.place.iterdir()):
            self._refuse_foreign_files(plan, generated)
        elif self.place.is_file() and self.place.stat().st_size and not _is_fused(self.place):
            raise self._foreign(self.place, "is a file that lora-fuse did not make")

    @property
    def build(self) -> Path:
        """The path of the build's record."""
        return build_path(manifest_path(self.out))

    def _refuse_inputs(self, plan: Plan) -> None:
        above_out = _above(self.place)
        mine = _identity(self.place)
        for path in _inputs(plan):
            if (mine is not None and mine in _above(path)) or _identity(path) in above_out:
                raise Refused(
                    f"OUT {self.out} and {path}, which the merge reads, overlap; write the merged checkpoint somewhere "
                    "else"
                )

    def _refuse_kind(self, plan: Plan) -> None:
        base = plan.checkpoint
        is_file = base.kind == "file" and not self.folder
        inside = self.place / (base.root.name if is_file else "merged")
        if is_file and self.place.is_dir():
            raise Refused(f"BASE {base.root} is a file, and OUT {self.out} a folder; name the file to write, {inside}")
        if not is_file and self.place.exists() and not self.place.is_dir():
            what = f"BASE {base.root} is a folder" if base.kind != "file" else "a base with LoRAs beside it is a folder"
            raise Refused(f"{what}, and OUT {self.out} is none; name a folder to write")
        if is_file and self.out.suffix in CONTAINERS - {_container(plan)}:
            ending = _container(plan)
            raise Refused(f"OUT {self.out} would be a {ending} file; name it {self.out.with_suffix(ending).name}")
        if self.place.exists() and not (self.place.is_dir() or self.place.is_file()):
            raise Refused(f"OUT {self.out} is neither a file nor a folder; name another place")
        if _identity(self.place) == _identity(Path()) or os.path.ismount(self.place):
            what = "where a disk is mounted" if os.path.ismount(self.place) else "the working folder"
            raise Refused(f"OUT {self.out} is {what}, which cannot be replaced; name a folder in it, {inside}")
        if is_file and not files.is_text(self.out.name):
            raise Refused(f"the name of OUT {self.out} is not UTF-8, and the manifest holds it; name it otherwise")

    def _refuse_unwritable(self) -> None:
        above = [next(path for path in way.parents if path.exists()) for way in (self.place, self.out.absolute())]
        for folder in (
            *above,
            *([self.place] if self.place.is_dir() else []),
        ):  # it moves, too
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                what = "is not writable" if folder.is_dir() else "is a file"
                raise Refused(f"OUT {self.out} cannot be written: {folder} {what}; name another place")
        longest = os.pathconf(above[0], "PC_NAME_MAX") - ADDED
        if len(os.fsencode(self.place.name)) > longest:
            raise Refused(f"the name of OUT {self.out} is longer than {longest} bytes; name it shorter")
        for path in (manifest_path(self.out), self.build):
            if path.is_dir():
                raise Refused(f"{path}, where the merge's record is written, is a folder; move it, or name another OUT")

    def _refuse_foreign_files(self, plan: Plan, generated: Mapping[str, bytes]) -> None:
        """Refuse a folder without a fused file, or with one that is neither of the last merge nor of this one."""
        known = self._known_sizes(plan, generated)
        fused = {name for name in known if _is_fused(self.place / name)}
        if not fused:
            raise self._foreign(self.place, "is a folder that lora-fuse did not make")
        for path in self.place.rglob("*"):
            name = path.relative_to(self.place).as_posix()
            if path.is_symlink() or not (path.is_dir() or name in fused or path.stat().st_size in known.get(name, ())):
                raise self._foreign(path, "is in it and not as lora-fuse made it")

    def _known_sizes(self, plan: Plan, generated: Mapping[str, bytes]) -> Mapping[str, set[int]]:
        """The sizes that each file may have: those of the last merge's manifest, and those that are to be written."""
        known: defaultdict[str, set[int]] = defaultdict(set)
        base = plan.checkpoint
        for name in (*(shard.relative for shard in plan.shards), *base.others):
            known[name].add(base.locate(name).stat().st_size)
        for name, content in generated.items():
            known[name].add(len(content))
        if manifest_path(self.out).exists():
            for name, file in read_manifest(manifest_path(self.out))[0].files.items():
                known[name].add(file.size)
        return known

    def _foreign(self, path: Path, what: str) -> Refused:
        named = "" if path in (self.out, self.place) else f": {path}"
        return Refused(f"OUT {self.out}{named} {what}; name another OUT, or replace it all the same with --replace")


def _container(plan: Plan) -> str:
    """The ending of a merged file's name: what is decoded is written as safetensors, whatever it was."""
    (shard,) = plan.checkpoint.shards
    return ".gguf" if shard.is_gguf and (plan.requantise or plan.stored is None) else ".safetensors"


def _inputs(plan: Plan) -> Iterator[Path]:
    """Everything that a merge reads: the base and its files, the LoRAs and their files."""
    base = plan.checkpoint
    yield base.root
    yield from (base.locate(name) for name in (*(shard.relative for shard in plan.shards), *base.others))
    yield from (given.path for given in plan.inputs)
    for lora in plan.loras:
        yield lora.path
        yield lora.path.with_name(repository_files.ADAPTER_CONFIG)


def _above(path: Path) -> set[_Identity]:
    """A path and the folders that it lies in, as it is named and through links."""
    ways = {path.absolute(), path.resolve()}
    found = (_identity(one) for way in ways for one in (way, *way.parents))
    return {identity for identity in found if identity is not None}


def _identity(path: Path) -> _Identity | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _is_fused(path: Path) -> bool:
    """True for a safetensors file whose header says that it was fused here."""
    try:
        return not {PROVENANCE, UNMERGED}.isdisjoint(read_header(path).metadata)
    except BadCheckpoint:
        return False


def _holds(kind: type[object], path: Path) -> bool:
    try:
        records.read(kind, path)
    except (BadSource, OSError, ValueError):
        return False
    return True
