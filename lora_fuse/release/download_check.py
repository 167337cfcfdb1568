"""Check of a published repository after its download: every file against its list, the list against the signature.

`lora_fuse.json` says what every byte should be and which release it is, and `model.sig` who says so. Without a
signature that was checked the list is only as good as where it came from, and so is everything that is read from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadSource, CheckFailed, Refused, require
from lora_fuse.exports import is_export
from lora_fuse.hub import payload, sources
from lora_fuse.machine import file_state, files
from lora_fuse.recipe import records
from lora_fuse.release.contents import BOM, LIST, PROVENANCE
from lora_fuse.release.signing import SIGNATURE, Trusted, check

# Files that a publication makes, beside exports: no other is generated because a list says so.
MADE_BESIDE = frozenset({payload.CARD, PROVENANCE, BOM})
PICTURES = re.compile(r"images/[a-z0-9_-]+(\.input[0-9]*)?\.(png|jpe?g|webp|gif|bmp|tiff?)")
RIGHT = "signature right"
UNSIGNED = "unsigned"
NOT_CHECKED = "signed by a key that was not checked"
MADE_AGAIN = frozenset({repository_files.MODEL_INDEX, repository_files.SCHEDULER_CONFIG})  # by whoever has the base
INDEX_MADE_AGAIN = re.compile(r"[^/]+/[^/]+\.safetensors\.index\.json")  # where dtypes are others than the base's
CONFIG_MADE_AGAIN = re.compile(r"[^/]+/config\.json")  # where the recipe says a dtype


@dataclass(slots=True)
class Published:
    """Result of a check; the folder is as it was published, as far as it was checked, if there are no problems."""

    files: int = 0  # that were compared with the list
    absent: tuple[int, int] = (0, 0)  # files and bytes of a recipe that are not there
    release: str = "no release"  # which one the list says that it is
    signature: str = UNSIGNED  # in words
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # remarks that are no problem
    beside: frozenset[str] = frozenset()  # paths that are not part of the merge
    pipeline: str | None = None  # the class that the recipe gave it, where the provenance says it
    scheduler: Mapping[str, object] = field(default_factory=dict)  # the settings that the recipe gave it
    dtype: str | None = None  # that of all floats of the weights, where the recipe says one

    @property
    def recipe_note(self) -> str | None:
        """A remark on `pipeline` and `scheduler`, where nobody who is trusted has signed what they were read from."""
        if self.pipeline is None or self.signature == RIGHT:
            return None
        return (
            f"the class {self.pipeline} and the scheduler's settings are expected as the download's own {PROVENANCE} "
            f"has them{f', and {self.dtype}' if self.dtype else ''}, {self.signature}; --scheduler JSON expects yours"
        )


def is_published(folder: Path) -> bool:
    """The folder has the list of a published repository."""
    return (folder / LIST).is_file()


def check_published(folder: Path, trusted: Trusted | None, expected: Mapping[str, str] | None = None) -> Published:
    """Check a downloaded repository; links, as in the Hub client's cache, are followed.

    Without a trusted signer the signature is not checked. `expected` are the `repository` and the `tag` that the list
    has to name.

    Raises:
        Refused: there is no list, or the public key cannot be used.
        MissingExtra: a signature is to be checked, and the library for that is not installed.
    """
    if trusted is not None:
        require("model_signing", "a signature")
    if not is_published(folder):
        raise Refused(
            f"{folder} has no {LIST}, which a published repository has; to check a merge, name its base and LoRAs: "
            "verify MERGED BASE --lora F --scale S"
        )
    result = Published()
    try:
        manifest = records.from_json(
            records.ReleaseList, files.read_text(files.inside(folder, LIST)), str(folder / LIST)
        )
    except (BadSource, OSError) as error:
        result.problems.append(f"{LIST} is no list of files: {str(error).partition(';')[0]}")
        return result
    gone = _absent(folder, manifest, result)
    result.files = len(manifest.files) - len(gone)
    exports = sorted(name for name in gone if is_export(name))
    result.notes += [f"{name} is an export, and not there" for name in exports]
    result.absent = (len(gone) - len(exports), sum(manifest.files[name].size for name in gone.difference(exports)))
    result.release = str(manifest)
    for what, wanted in (expected or {}).items():
        if (said := getattr(manifest, what)) != wanted:
            result.problems.append(f"{LIST} names {f'the {what} {said}' if said else f'no {what}'}, expected {wanted}")
    _check_listed(folder, {name: file for name, file in manifest.files.items() if name not in gone}, result)
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(folder).as_posix() for path in found}
    housekeeping = {name for name in names if payload.is_housekeeping(name)}
    extra = sorted(names - housekeeping - {LIST, SIGNATURE} - manifest.files.keys())
    harmless = [name for name in extra if payload.is_read_by_people(name) and (folder / name).is_file()]
    result.problems += [f"{name} is not in {LIST}, so nobody published it" for name in extra if name not in harmless]
    result.notes += [f"{name} is not in {LIST}" for name in harmless]
    try:
        statement = files.read_bytes(folder / PROVENANCE)
        result.pipeline, result.scheduler, result.dtype = read_recipe(statement)
    except OSError as error:
        result.notes.append(
            f"{PROVENANCE} cannot be read ({error.strerror}); what it changes is compared with the base's"
        )
    except BadSource as error:
        result.notes.append(f"{error}; what it changes is compared with the base's")
    result.beside = frozenset([*_made_beside(manifest, result), *extra, *housekeeping, LIST, SIGNATURE])
    made = [name for name in manifest.absent if name not in gone]  # put there since: signed by the list alone
    result.signature = _check_signature(folder, trusted, [*extra, *made], result)
    return result


def _absent(folder: Path, manifest: records.ReleaseList, result: Published) -> frozenset[str]:
    """The files of a recipe that are not there, as it says; it may say that of no others."""
    if (manifest.weights == "recipe") != bool(manifest.absent):
        said = f"{len(manifest.absent)} files as absent"
        result.problems.append(f"{LIST} names {said}, and its weights are {manifest.weights}")
    unknown = sorted(set(manifest.absent) - manifest.files.keys())
    result.problems += [f"{name} is called absent in {LIST}, which has no sha256 of it" for name in unknown]
    listed = (name for name in manifest.absent if name in manifest.files)
    return frozenset(name for name in listed if is_inside(name) and not os.path.lexists(folder / name))


def _check_listed(folder: Path, listed: Mapping[str, records.MergedFile], result: Published) -> None:
    def problem(name: str, advance: file_state.Advance) -> str | None:
        if not is_inside(name):
            return f"{name} in {LIST} leads out of the folder"
        file = listed[name]
        try:
            difference = sources.examine(folder / name, sources.ExpectedFile(file.size, file.sha256), advance, folder)
        except ValueError:  # a NUL, or half of a character
            difference = "no file can have this name"
        return f"{name}: {difference}" if isinstance(difference, str) else None

    sizes = {name: file.size for name, file in listed.items()}
    with sources.hashing(sum(sizes.values())) as advance:
        found = file_state.in_threads(problem, sorted(sizes), advance, lambda name: sizes[name])
    result.problems += [one for one in found if one is not None]


def is_made_beside(name: str) -> bool:
    """True for a file that a publication makes and that is no part of the merge, but for exports."""
    return name in MADE_BESIDE or PICTURES.fullmatch(name) is not None


def is_inside(name: str) -> bool:
    """True for a POSIX path that stays in the folder which it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _made_beside(manifest: records.ReleaseList, result: Published) -> list[str]:
    """Names that were made for the repository; what else is called generated is a problem, and part of the merge."""
    beside = []
    for name in sorted(name for name, file in manifest.files.items() if file.origin == "generated"):
        if is_made_beside(name) or is_export(name):
            beside.append(name)
        elif not _is_made_again(name, result.dtype):
            result.problems.append(f"{name} is called generated in {LIST}, and no publication makes such a file")
    there = (name for name in beside if name not in manifest.absent)
    result.notes += [f"{name} is an export: it is not derived again" for name in there if is_export(name)]
    return beside


def _is_made_again(name: str, dtype: str | None) -> bool:
    """True for a file of the merge that a verification makes anew from base and recipe."""
    config = dtype is not None and CONFIG_MADE_AGAIN.fullmatch(name) is not None
    return name in MADE_AGAIN or INDEX_MADE_AGAIN.fullmatch(name) is not None or config


def read_recipe(statement: bytes) -> tuple[str, Mapping[str, object], str | None]:
    """Read what the recipe changes of the base's own files, so that they can be made again.

    Returns:
        The pipeline's class, the scheduler's settings (none keep the base's), and the dtype of all floats, if any.

    Raises:
        BadSource: the statement does not say them.
    """
    try:
        recipe = files.parse_json(statement)["predicate"]["buildDefinition"]["externalParameters"]
        pipeline = _of_kind(str, recipe["base"]["pipeline"])
        scheduler = _of_kind(dict, recipe["scheduler"] or {})
        dtype = recipe.get("fuse", {}).get("dtype")
        return pipeline, scheduler, None if dtype is None else _of_kind(str, dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadSource(f"{PROVENANCE} does not say the recipe ({error})") from error


def _of_kind(kind: type[Any], value: object) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _check_signature(folder: Path, trusted: Trusted | None, extra: Iterable[str], result: Published) -> str:
    """Check the signature, if somebody is trusted to sign; returns what is to be said of it."""
    is_signed = (folder / SIGNATURE).is_file()
    if trusted is None:
        if is_signed:
            result.notes.append(f"{SIGNATURE} was not checked: give --public-key FILE, or --identity and --issuer")
        return NOT_CHECKED if is_signed else UNSIGNED
    if not is_signed:
        result.problems.append(f"{SIGNATURE} is not there, and a signature is asked for")
        return UNSIGNED
    if result.problems:  # whatever they are, it signs files that are as their list says
        return "signature not checked, as the files are wrong"
    try:
        files.read_bytes(files.inside(folder, SIGNATURE))  # it is of a size and in a place to be read
        check(folder, trusted, unsigned=extra)
    except (OSError, CheckFailed) as error:
        result.problems.append(
            str(error) if isinstance(error, CheckFailed) else f"{SIGNATURE} cannot be read ({error})"
        )
        return "signature wrong"
    return RIGHT
