"""Sources of files: listed with the expected hash of each file, fetched, and verified.

A source is a local folder (here) or a Hub repository at a commit (`lora_fuse.hub.repository`); both are taken from and
verified in the same way. No network is used in this module.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import fitness, repository_files
from lora_fuse.errors import BadSource
from lora_fuse.machine import FileRecord, file_state, files, progress, text
from lora_fuse.recipe import License, stated_licence

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

Arrived = Callable[[Path, str], None]


@dataclass(frozen=True, slots=True)
class ExpectedFile:
    """Size in bytes, sha256 and git blob id of a file, as far as they are known beforehand."""

    size: int | None = None
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True, slots=True)
class FileSource:
    """A place that files come from.

    `fetch` brings files to this machine, even those in the cache if its second argument is true, and returns the folder
    that they are in. It may call its third argument with that folder and the name of a file that is whole there, once,
    while others are still on their way.
    """

    label: str
    commit: str | None  # 40 hex digits; None for a local folder
    files: Mapping[str, ExpectedFile]  # all of them, by POSIX path
    license: License | None  # that it states
    fetch: Callable[[Iterable[str], bool, Arrived], Path]


def open_folder(root: Path) -> FileSource:
    """List a local folder, and what links to folders show.

    Raises:
        BadSource: `root` is not a folder, or one below it cannot be read.
    """
    if not root.is_dir():
        raise BadSource(f"{root} is not a folder; name the folder that holds the files")
    # A dangling link counts as empty here; it is refused when it is read.
    paths = {name: root / name for name in repository_files.list_files(root)}
    sizes = {name: ExpectedFile(path.stat().st_size if path.exists() else 0) for name, path in paths.items()}
    return FileSource(str(root), None, sizes, stated_licence.read_license(root), lambda *_: root)


def ignored(*_: object) -> None:
    """Take no note of a file that arrived, or was hashed."""


@dataclass(slots=True)
class VerifiedFiles:
    """Files taken from a source so far, by POSIX path; each is as the source lists it, and `note` is told of it.

    They are in `root`.
    """

    source: FileSource
    note: file_state.Note = ignored
    records: dict[str, FileRecord] = field(default_factory=dict)
    root: Path = Path()

    def take(self, names: Iterable[str]) -> None:
        """Fetch files, hash each as soon as it is here, and compare with the source's list; a bad one is fetched anew.

        Raises:
            BadSource: the source has no such file, or it cannot be read, or is bad twice.
        """
        wanted = sorted(set(names) - self.records.keys())
        refuse_missing(wanted, self.source.files, self.source.label)
        sizes = {name: self.source.files[name].size or 0 for name in wanted}
        hashed = progress.Tally()
        running: dict[str, Future[FileRecord | str]] = {}
        with file_state.HashingThreads(hashed.add) as threads:

            def begin(root: Path, name: str) -> None:
                running[name] = threads.submit(partial(self._examined, root), name)

            self.root = self.source.fetch(wanted, False, begin)
            for name in sorted(sizes.keys() - running.keys(), key=lambda name: sizes[name], reverse=True):
                begin(self.root, name)
            with hashed.shown("hash", sum(sizes.values()), at_least=progress.FEW):
                self.records |= {name: self._mended(name, running[name].result()) for name in wanted}

    def json(self, name: str) -> object:
        """The content of a JSON file that was taken.

        Raises:
            BadSource: the file is not JSON.
        """
        try:
            return files.parse_json(files.read_bytes(self.root / name))
        except (OSError, ValueError) as error:
            raise BadSource(f"{name} of {self.source.label} is not JSON: {error}; get a good copy") from error

    def _examined(self, root: Path, name: str, advance: file_state.Advance) -> FileRecord | str:
        return examine(root / name, self.source.files[name], advance, root, self.note)

    def _mended(self, name: str, result: FileRecord | str) -> FileRecord:
        """The record of a file that was examined; a bad one is fetched again, where it can be."""
        if isinstance(result, str) and self.source.commit:
            text.say(f"download: {name} of {self.source.label}: {result}; fetching it again", sys.stderr)
            self.source.fetch([name], True, ignored)
            result = self._examined(self.root, name, lambda _: None)
        if isinstance(result, str):
            advice = "it was fetched twice, so report it to its owner" if self.source.commit else "mend the folder"
            raise BadSource(f"{name} of {self.source.label}: {result}; {advice}")
        return result


def take_pipeline(taken: VerifiedFiles) -> None:
    """Take the files of a source's diffusers pipeline that `repository_files.sort_files` takes, and say what it leaves.

    Raises:
        BadSource: see `choose_pipeline` and `VerifiedFiles.take`.
    """
    wanted = choose_pipeline(taken)
    taken.take(wanted)
    taken.records = {name: record for name, record in taken.records.items() if name in wanted}


def choose_pipeline(taken: VerifiedFiles) -> set[str]:
    """Choose the files of a source's pipeline; its configurations are taken, as they decide.

    Raises:
        BadSource: the source is no pipeline, is incomplete, or asks for code; or as `sort_files` and
            `VerifiedFiles.take`.
    """
    label = taken.source.label

    def read(name: str) -> object:
        taken.take([name])
        return taken.json(name)

    if not (named := repository_files.named_components(read(repository_files.MODEL_INDEX))):
        raise BadSource(f"{repository_files.MODEL_INDEX} of {label} names no component; name a diffusers pipeline")
    main = repository_files.main_component(named)
    found = repository_files.sort_files(taken.source.files, main, label=label, read=read, fail=BadSource)
    if found.missing:
        raise BadSource(
            f"{label} has no folder {found.missing[0]}/, which its {repository_files.MODEL_INDEX} names among "
            f"{', '.join(named)}; get a complete copy"
        )
    if found.variants:
        component, variant = next(iter(found.variants.items()))
        raise BadSource(
            f"{component}/ of {label} has weights only as a variant ({variant}), and pictures are made without "
            "asking for one; name a revision with plain safetensors"
        )
    for line in [*found.remarks, *repository_files.left_behind(found.left)]:
        progress.log(f"download: {label}: {line}")
    wanted = {*found.shards, *found.others}
    configurations = sorted(name for name in wanted if name.endswith(".json"))
    taken.take(configurations)
    fitness.refuse_code(((name, taken.json(name)) for name in configurations), label, BadSource)
    return wanted


def refuse_missing(names: Iterable[str], files: Mapping[str, ExpectedFile], label: str) -> None:
    """Raise `BadSource` if a source does not list one of these files."""
    for name in names:
        if name not in files:
            raise BadSource(f"{label} has no {name}; check the name and the revision")


def examine(
    path: Path,
    expected: ExpectedFile,
    advance: file_state.Advance,
    root: Path | None = None,
    note: file_state.Note = ignored,
) -> FileRecord | str:
    r"""Hash a file: its record, or a few words on how it differs from what was expected.

    It is a regular file, and no link leads it out of `root`, where that is given (`files.inside`); `note` is told of
    one that is as expected. The git id of a file is the SHA-1 of ``blob SIZE\0`` and its content
    (git-scm.com/book, "Git Objects").
    """
    try:
        if root is not None:
            files.inside(root, path.relative_to(root).as_posix())
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        record, state = file_state.hash_steady(path, advance, *([blob] if expected.blob_id else []))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    pairs = (
        ("size", expected.size, record.size),
        ("sha256", expected.sha256, record.sha256),
        ("git blob", expected.blob_id, blob.hexdigest()),
    )
    for what, wanted, got in pairs:
        if wanted is not None and wanted != got:
            return f"{what} {got}, expected {wanted}"
    note(path, state, record)
    return record


def check_records(
    paths: Mapping[str, Path],
    records: Mapping[str, FileRecord],
    refusal: Callable[[str, str], Exception],
    root: Path | None = None,
    note: file_state.Note = ignored,
) -> None:
    """Hash files, several at a time, and raise the `refusal` for the first by name that differs from its record.

    `refusal` makes the error of the file's name and a few words on how it differs; `root` and `note` are those of
    `examine`.
    """

    def check(name: str, advance: file_state.Advance) -> None:
        expected = ExpectedFile(records[name].size, records[name].sha256)
        result = examine(paths[name], expected, advance, root, note)
        if isinstance(result, str):
            raise refusal(name, result)

    with hashing(sum(records[name].size for name in paths)) as advance:
        file_state.in_threads(check, sorted(paths), advance, lambda name: records[name].size)


def hashing(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress of hashing `total` bytes; yields the function to call with the bytes just hashed."""
    return progress.byte_progress("hash", total, at_least=progress.FEW)
