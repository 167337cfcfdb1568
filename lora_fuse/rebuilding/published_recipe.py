"""A published repository as the recipe of its own weights: its list, who signed that, and the files beside the merge.

A list is foreign text until a signature was checked with a key that came another way, and a careful one is checked
before anything else is fetched. Nothing in it becomes a path before it was looked at.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadSource, CheckFailed, Refused, require
from lora_fuse.exports import is_export
from lora_fuse.hub import locks, sources, streamed_base
from lora_fuse.machine import files, progress
from lora_fuse.recipe import Lock, Source, records
from lora_fuse.release import Trusted, contents, download_check, signing

PLACE = re.compile(r"(hf://)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
SHA256 = re.compile("[0-9a-f]{64}")
LARGEST_LIST = 16 << 20  # bytes: the list of ten thousand files has two million
LARGEST_REST = 1 << 30  # bytes of card, pictures, provenance and bill of materials together


@dataclass(frozen=True, slots=True)
class PublishedRecipe:
    """The statements of a repository on its weights, and the files that it has beside them.

    Attributes:
        label: ``repo@commit``, or the folder.
        listing: its list, every name in which stays in a folder, every repository of which is at a commit.
        signature: in words, as `verify` says it.
        beside: the content of the files that are no part of the merge, list and signature among them, by POSIX path.
        pipeline: the class that the recipe names.
        scheduler: its settings; none keep the base's.
    """

    label: str
    listing: records.ReleaseList
    signature: str
    beside: Mapping[str, bytes]
    pipeline: str | None
    scheduler: Mapping[str, object]

    @property
    def merge(self) -> dict[str, records.MergedFile]:
        """The files that a rebuild makes, by POSIX path."""
        return merge_of(self.listing)

    @property
    def exports(self) -> list[str]:
        """The files in other formats, which a rebuild does not make."""
        return [name for name, file in self.listing.files.items() if _is_beside(name, file) and is_export(name)]


def merge_of(listing: records.ReleaseList) -> dict[str, records.MergedFile]:
    """The files of a release that are made of base and LoRAs, by POSIX path; exports are not among them."""
    return {name: file for name, file in listing.files.items() if not _is_beside(name, file)}


def parse_place(place: str) -> Source:
    """The folder, or else the repository on the Hub, ``owner/name@revision``, ``hf://`` before it or not, of a place.

    Raises:
        BadSource: it is neither.
    """
    if place and Path(place).is_dir():
        return Source(repo_id=None, path=place, revision=None)
    match = PLACE.fullmatch(place)
    if match is None:
        raise BadSource(f"REPO {place!r} is no folder here, and no repository's name; write OWNER/NAME@REVISION")
    return Source(repo_id=match["repo"], path=None, revision=match["revision"] or "main")


def read_recipe(
    place: str, trusted: Trusted | None = None, expected: Mapping[str, str] | None = None
) -> PublishedRecipe:
    """Read a repository, `place` as in `parse_place`: its list and its signature first, then the rest but weights.

    Args:
        place: on the Hub, or a folder.
        trusted: who has to have signed it; None looks at no signature.
        expected: the `repository` and `tag` that the list has to name.

    Raises:
        BadSource: it is no such repository; a name in its list leads out of it; a file is not as listed.
        Refused: it is not signed so, or is another release.
        MissingExtra: a signature is to be checked, and the library for that is not installed.
    """
    if trusted is not None:
        require("model_signing", "a signature")
    source = parse_place(place)
    with locks.opened(source) as taken:
        label = taken.source.label
        if contents.LIST not in taken.source.files:
            raise BadSource(
                f"{label} has no {contents.LIST}, which a published repository has, so nothing says how to make it"
            )
        listing, content = _read_list(taken)
        _refuse_names(listing, label)
        for what, wanted in (expected or {}).items():
            if (said := getattr(listing, what)) != wanted:
                raise Refused(f"{label} names {f'the {what} {said}' if said else f'no {what}'}, expected {wanted}")
        signature = _check_signature(taken, listing, content, trusted)
        beside = {**_take_beside(taken, listing), contents.LIST: content}
    pipeline, scheduler, _ = download_check.read_recipe(beside[contents.PROVENANCE])
    return PublishedRecipe(label, listing, signature, beside, pipeline, scheduler)


def _read_list(taken: sources.VerifiedFiles) -> tuple[records.ReleaseList, bytes]:
    """The list, and its very bytes, which are read once."""
    label = f"{contents.LIST} of {taken.source.label}"
    if (size := taken.source.files[contents.LIST].size or 0) > LARGEST_LIST:
        raise BadSource(f"{label} has {size} bytes, and no list has more than {LARGEST_LIST}; name another repository")
    taken.take([contents.LIST])
    try:
        content = files.read_bytes(files.inside(taken.root, contents.LIST))
        return records.from_json(records.ReleaseList, content, label), content
    except (BadSource, OSError) as error:
        raise BadSource(f"{label} is no list of files: {str(error).partition(';')[0]}; get a good copy") from error


def _names(listing: records.ReleaseList) -> Iterator[str]:
    yield from listing.files
    yield from listing.absent
    yield from listing.base.files if listing.base else ()
    yield from (lora.filename for lora in listing.loras if lora.filename is not None)


def _refuse_names(listing: records.ReleaseList, label: str) -> None:
    """Refuse a list with a name that is no path inside a folder, a pickle, or a source that is no commit.

    Raises:
        BadSource: there is one.
    """
    said = f"{contents.LIST} of {label}"
    for name in _names(listing):
        if not download_check.is_inside(name) or not files.is_text(name) or "\0" in name or not name:
            raise BadSource(f"{said} names {name!r}, which leads out of the folder; it is not rebuilt")
        if repository_files.is_pickle(name):
            raise BadSource(f"{said} names {name!r}, a pickle, which runs code when it is loaded; it is not rebuilt")
    if listing.base is None or not listing.base.files:
        raise BadSource(f"{said} does not say which base it was made of, so it cannot be made again")
    made_of: tuple[Lock | records.MergedLora, ...] = (listing.base, *listing.loras)
    for what in made_of:
        if what.repo_id is None:
            continue
        if not REPOSITORY.fullmatch(what.repo_id) or ".." in what.repo_id:
            raise BadSource(f"{said} names {what.repo_id!r}, which is no repository; it is not rebuilt")
        if not streamed_base.COMMIT.fullmatch(what.revision or ""):
            raise BadSource(f"{said} has {what.repo_id} at {what.revision!r}, which is no commit; it is not rebuilt")
    for name, file in listing.files.items():
        if not SHA256.fullmatch(file.sha256):
            raise BadSource(f"{said} has {file.sha256!r} as the sha256 of {name}; it is not rebuilt")


def _check_signature(
    taken: sources.VerifiedFiles, listing: records.ReleaseList, content: bytes, trusted: Trusted | None
) -> str:
    """Check the signature, if somebody is trusted to sign, and say in words what was found.

    Raises:
        Refused: it is none by them of this list.
    """
    is_signed = signing.SIGNATURE in taken.source.files
    if trusted is None:
        return download_check.NOT_CHECKED if is_signed else download_check.UNSIGNED
    if not is_signed:
        raise Refused(f"{taken.source.label} is not signed, and a signature is asked for")
    taken.take([signing.SIGNATURE])
    digests = {name: file.sha256 for name, file in listing.files.items() if name not in listing.absent}
    digests[contents.LIST] = hashlib.sha256(content).hexdigest()
    try:
        signing.check_listed(taken.root / signing.SIGNATURE, digests, trusted)
    except CheckFailed as error:
        raise Refused(f"{taken.source.label}: {error}; it is not rebuilt") from error
    return download_check.RIGHT


def _is_beside(name: str, file: records.MergedFile) -> bool:
    return file.origin == "generated" and (download_check.is_made_beside(name) or is_export(name))


def _take_beside(taken: sources.VerifiedFiles, listing: records.ReleaseList) -> dict[str, bytes]:
    """The files beside the merge but exports, each as it is listed."""
    wanted = {name for name, file in listing.files.items() if _is_beside(name, file) and not is_export(name)}
    wanted.add(contents.PROVENANCE)
    signed = {signing.SIGNATURE} & taken.source.files.keys()
    size = sum(taken.source.files[name].size or 0 for name in (wanted | signed) & taken.source.files.keys())
    if size > LARGEST_REST:
        raise BadSource(
            f"{taken.source.label} has {progress.human_bytes(size)} of card and pictures, and "
            f"{progress.human_bytes(LARGEST_REST)} are taken; name another repository"
        )
    taken.take(wanted | signed)
    read = {name: files.read_bytes(files.inside(taken.root, name)) for name in sorted(wanted | signed)}
    for name in sorted(wanted):
        listed = listing.files.get(name)
        sha256 = hashlib.sha256(read[name]).hexdigest()
        if listed is None or sha256 != listed.sha256:
            said = listed.sha256 if listed else "nothing of it"
            raise BadSource(
                f"{name} of {taken.source.label} has sha256 {sha256}, and {contents.LIST} says {said}; get a good copy"
            )
    return read
