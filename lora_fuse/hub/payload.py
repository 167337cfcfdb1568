"""The files of a publication: the manifest's, hashed and compared, the card, and those beside them.

Anything else in the merged folder is refused.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import PublishRefused
from lora_fuse.hub.sources import ExpectedFile, check_records, examine
from lora_fuse.machine import FileRecord, file_state, files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_fuse.recipe import Manifest

CARD = "README.md"
# What the Hub, git and the Hub's client put beside a repository's own: files, and folders with all that is in them.
HOUSEKEEPING = frozenset({".git", ".gitattributes", ".gitignore"})
HOUSEKEEPING_IN = frozenset({".cache", ".git", ".huggingface"})
# Files that people may add to a repository: no library loads them.
READ_BY_PEOPLE = re.compile(r".+\.(md|png|jpe?g|webp|gif|svg|pdf)|(licen[cs]e|notice|copying)(\.txt|\.rst)?", re.I)
Addition = tuple[Path, FileRecord]  # a file beside the manifest's: its path here, and the record it must match
Hashed = AbstractSet[
    tuple[file_state.FileState | None, FileRecord]
]  # of files that were hashed: their state then, and record


@dataclass(frozen=True, slots=True)
class Payload:
    """Files to publish, by POSIX path: the path of each on this machine, and its size and sha256."""

    paths: Mapping[str, Path]
    files: Mapping[str, FileRecord]

    def differences(self, remote: Mapping[str, ExpectedFile]) -> dict[str, str]:
        """Files that a repository does not have as they are here, each with a few words on how it differs."""
        differences = {name: self._difference(name, remote.get(name)) for name in self.files}
        return {name: words for name, words in differences.items() if words}

    def _difference(self, name: str, remote: ExpectedFile | None) -> str | None:
        record = self.files[name]
        if remote is None:
            return "is not there"
        if remote.sha256:
            same = (remote.size, remote.sha256) == (record.size, record.sha256)
            return None if same else f"has sha256 {remote.sha256} there, {record.sha256} here"
        result = examine(self.paths[name], remote, lambda _: None)  # git knows it by another hash
        return f"differs: {result} there" if isinstance(result, str) else None

    def strangers(self, remote: Mapping[str, ExpectedFile]) -> dict[str, ExpectedFile]:
        """The files of a repository that are not the payload's."""
        return {name: file for name, file in remote.items() if name not in self.files}


def is_read_by_people(name: str) -> bool:
    """True for a file, by its POSIX path, that no library loads."""
    return READ_BY_PEOPLE.fullmatch(PurePosixPath(name).name) is not None


def is_housekeeping(name: str) -> bool:
    """True for a file, by its POSIX path, that the Hub, git or the Hub's client puts beside a repository's own."""
    top, inside, _ = name.partition("/")
    return top in (HOUSEKEEPING_IN if inside else HOUSEKEEPING)


def is_let_be(name: str) -> bool:
    """True for a file that may lie in a repository beside what was published there."""
    return is_housekeeping(name) or is_read_by_people(name)


@contextmanager
def open_payload(
    merged: Path,
    manifest: Manifest,
    card: str,
    beside: Mapping[str, Addition] | None = None,
    hashed: Hashed = frozenset(),
    absent: AbstractSet[str] = frozenset(),
) -> Iterator[Payload]:
    """Check and hash the files to publish; they can be sent until the block ends.

    The manifest's files that are `absent` from what is published are not among them. Those that were `hashed` a moment
    ago, and are in the same state, are not hashed again.

    Raises:
        PublishRefused: the folder holds something that the manifest does not name, or a link; a file is a pickle,
            is missing, or is not what the manifest says.
    """
    with TemporaryDirectory() as folder:
        refuse_unnamed(merged, manifest)
        paths = _named(merged, manifest)
        paths = {name: path for name, path in paths.items() if name not in absent}
        expected = {name: FileRecord(manifest.files[name].size, manifest.files[name].sha256) for name in paths}
        paths[CARD] = Path(folder, CARD)
        paths[CARD].write_text(card, encoding="utf-8")
        expected[CARD] = files.hash_file(paths[CARD])
        for name, (path, record) in (beside or {}).items():
            _refuse_pickle(name)
            if name in paths:
                raise PublishRefused(f"{name} is both in the manifest and beside it; fuse again")
            paths[name] = path
            expected[name] = record
        states = {name: file_state.state_of(path) for name, path in paths.items()}
        check_records(
            {name: path for name, path in paths.items() if (states[name], expected[name]) not in hashed},
            expected,
            lambda name, difference: PublishRefused(
                f"{paths[name]} is not what the manifest says: {difference}; fuse and check again"
            ),
        )
        yield Payload(paths, dict(sorted(expected.items())))


def refuse_unnamed(merged: Path, manifest: Manifest) -> None:
    """Refuse a folder that holds more than the manifest names, or anything that is not a plain file.

    Raises:
        PublishRefused: there is such a file; the message names the first.
    """
    for path in sorted(merged.rglob("*")):
        name = path.relative_to(merged).as_posix()
        if path.is_symlink():
            raise PublishRefused(
                f"{name} in {merged} is a symlink to {path.readlink()}; only plain files are published, fuse again"
            )
        if path.is_dir():
            continue
        if name not in manifest.files:
            raise PublishRefused(
                f"{name} is in {merged} and not in the manifest; take it away, or fuse again (nothing was sent)"
            )
        if not path.is_file():
            raise PublishRefused(f"{name} in {merged} is no plain file; fuse again")


def _named(merged: Path, manifest: Manifest) -> dict[str, Path]:
    """The manifest's files by their POSIX path, each inside `merged`."""
    root = merged.resolve()
    paths = {}
    for name in sorted(manifest.files):
        path = merged / name
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(root):
            raise PublishRefused(f"{name} leads out of {merged}; only files in there are published, fuse again")
        _refuse_pickle(name)
        if name == CARD:
            raise PublishRefused(f"the manifest names {CARD}, which is where the card goes; fuse again")
        paths[name] = path
    return paths


def _refuse_pickle(name: str) -> None:
    if repository_files.is_pickle(name):
        raise PublishRefused(f"{name} is a pickle, which runs code when it is loaded; it is not published")
