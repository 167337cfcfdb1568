"""Files on a shelf: listed with what is promised of each, fetched, and taken only if they are as promised.

A shelf is a local folder (here) or a Hub repository at a commit (`lora_fuse.hub`). What is taken from it and
how that is checked does not depend on which. No network is used in this module.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadSource
from lora_fuse.machine import FileRecord, progress
from lora_fuse.recipe import License, stated_licence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True, slots=True)
class ExpectedFile:
    """What is known of a file beforehand, if anything: its size in bytes, its sha256, its git blob id."""

    size: int | None = None
    sha256: str | None = None
    blob_id: str | None = None


class FileSource(Protocol):
    """Where files come from."""

    @property
    def label(self) -> str:
        """What a person would call it."""

    @property
    def commit(self) -> str | None:
        """The 40-hex commit that it shows; None if it has none."""

    @property
    def files(self) -> Mapping[str, ExpectedFile]:
        """Everything on it by POSIX path."""

    @property
    def license(self) -> License | None:
        """What it says of its licence; None if nothing."""

    def fetch(self, names: Iterable[str], *, again: bool = False) -> Path:
        """Have files on this machine, anew if `again`; returns the folder that they are in."""


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A local folder as a shelf: it is all here already and promises nothing."""

    root: Path
    files: Mapping[str, ExpectedFile]
    license: License | None = None
    commit: None = None

    @property
    def label(self) -> str:
        """Its path."""
        return str(self.root)

    def fetch(self, names: Iterable[str], *, again: bool = False) -> Path:  # noqa: ARG002
        """Nothing to do: the folder itself."""
        return self.root


def open_folder(root: Path) -> LocalSource:
    """List a local folder; links to files are followed.

    Raises:
        BadSource: it is not a folder.
    """
    if not root.is_dir():
        raise BadSource(f"{root} is not a folder; name the folder that holds the files")
    # Linked folders are entered at the top only: enough for a pipeline, and no loop can catch us.
    below = [path for top in root.iterdir() for path in (top.rglob("*") if top.is_dir() else (top,))]
    files = [path for path in below if not path.is_dir()]
    return LocalSource(
        root,
        {path.relative_to(root).as_posix(): ExpectedFile(_size(path)) for path in files},
        stated_licence.read_license(root),
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a dangling link, which is refused when it is read


@dataclass(slots=True)
class VerifiedFiles:
    """What was taken from a shelf so far, by POSIX path; nothing in it differs from what was promised."""

    shelf: FileSource
    records: dict[str, FileRecord] = field(default_factory=dict)
    _root: Path = Path()

    def take(self, names: Iterable[str]) -> None:
        """Fetch files, hash them and compare with what was promised; a bad one is fetched once more.

        Raises:
            BadSource: a file is not on the shelf, cannot be read, or is bad twice.
        """
        wanted = sorted(set(names) - self.records.keys())
        for name in wanted:
            if name not in self.shelf.files:
                raise BadSource(f"{self.shelf.label} has no {name}; check the name and the revision")
        self._root = self.shelf.fetch(wanted)
        with hashing(sum(self.shelf.files[name].size or 0 for name in wanted)) as advance:
            self.records |= {name: self._checked(name, advance) for name in wanted}

    def json(self, name: str) -> object:
        """The content of a JSON file that was taken.

        Raises:
            BadSource: it is not JSON.
        """
        try:
            return json.loads((self._root / name).read_bytes())
        except ValueError as error:
            raise BadSource(f"{name} of {self.shelf.label} is not JSON: {error}; get a good copy") from error

    def _checked(self, name: str, advance: Callable[[int], None]) -> FileRecord:
        promise = self.shelf.files[name]
        found = examine(self._root / name, promise, advance)
        if isinstance(found, str) and self.shelf.commit:
            print(f"download: {name} of {self.shelf.label}: {found}; fetching it again", file=sys.stderr, flush=True)
            self.shelf.fetch([name], again=True)
            found = examine(self._root / name, promise, lambda _: None)
        if isinstance(found, str):
            advice = "it was fetched twice, so report it to its owner" if self.shelf.commit else "mend the folder"
            raise BadSource(f"{name} of {self.shelf.label}: {found}; {advice}")
        return found


def take_pipeline(basket: VerifiedFiles) -> None:
    """Take the diffusers pipeline on a shelf, by the allow-list.

    Raises:
        BadSource: it is no pipeline, is incomplete, or has no safetensors weights; or as `VerifiedFiles.take`.
    """
    names, label = basket.shelf.files, basket.shelf.label
    basket.take([repository_files.MODEL_INDEX])
    texts = {
        name: repository_files.text_files(name, names, label)
        for name in repository_files.components(basket.json(repository_files.MODEL_INDEX), label)
    }
    basket.take(name for here in texts.values() for name in here)
    weights: list[str] = []
    for component, here in texts.items():
        indexes = [name for name in here if repository_files.is_index(name)]
        for index in indexes:
            weights += repository_files.indexed_weights(index, basket.json(index), names, label)
        weights += [] if indexes else repository_files.single_weights(component, names, label)
    if not weights:
        raise BadSource(f"{label} has no safetensors weights in {', '.join(texts)}; name a base that has some")
    basket.take(weights)


def take_lora(basket: VerifiedFiles, name: str) -> None:
    """Take a LoRA from a shelf: a file, or a PEFT folder's configuration and weights.

    Raises:
        BadLora: it is neither.
        BadSource: as `VerifiedFiles.take`.
    """
    basket.take(repository_files.lora_files(name, basket.shelf.files, basket.shelf.label))


def examine(path: Path, promise: ExpectedFile, advance: Callable[[int], None]) -> FileRecord | str:
    r"""Hash a file: its record, or a few words on how it differs from what was promised.

    The git id of a file is the SHA-1 of ``blob SIZE\0`` and its content (git-scm.com/book, "Git Objects").
    """
    sha256 = hashlib.sha256()
    try:
        size = path.stat().st_size
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                sha256.update(block)
                if promise.blob_id:
                    blob.update(block)
                advance(len(block))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    pairs = (
        ("size", promise.size, size),
        ("sha256", promise.sha256, sha256.hexdigest()),
        ("git blob", promise.blob_id, blob.hexdigest()),
    )
    for what, expected, got in pairs:
        if expected is not None and expected != got:
            return f"{what} {got}, expected {expected}"
    return FileRecord(size, sha256.hexdigest())


@contextmanager
def hashing(total: int) -> Iterator[Callable[[int], None]]:
    """Progress of hashing `total` bytes; yields the function to call with the bytes just hashed."""
    with progress.byte_progress("hash", total, at_least=progress.FEW) as advance:
        yield advance
