"""The JSON records that pass between stages: locks, the manifest.

Invariant: a record holds no absolute path, no host name and no clock time, so the same build gives the same text
everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadSource
from lora_fuse.lora import Selection
from lora_fuse.machine import FileRecord, files

SCHEMA = 1
PLAIN_KEY = re.compile(r"[\w-]+|\[key\]", re.ASCII)  # pydantic says the latter of a key itself

Origin = Literal["fused", "base", "generated"]
Record = TypeVar("Record")
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)  # to make one takes as long as to read ten records


@dataclass(frozen=True, slots=True)
class MergedFile:
    """One file of a merged checkpoint and where its bytes come from (`from` in JSON)."""

    size: int
    sha256: str
    origin: Annotated[Origin, Field(alias="from")]


@dataclass(frozen=True, slots=True)
class License:
    """The licence of a source as it says itself, or as somebody states it.

    `id` is the Hub's (huggingface.co/docs/hub/repositories-licenses), in lower case; ``other`` goes with `name` and
    `link`. `origin` is where it was read.
    """

    id: str
    name: str | None = None
    link: str | None = None
    origin: Literal["hub", "front matter", "licence file", "by hand"] = "hub"

    @property
    def label(self) -> str:
        """The licence's name for a person."""
        return f"{self.name or self.link or 'unnamed'} (other)" if self.id == "other" else self.id


@dataclass(frozen=True, slots=True)
class Lock:
    """A source pinned: what was asked for, the commit it meant, and the sha256 of every file used.

    `requested` is the branch, tag or commit that the recipe names, `revision` the 40-hex commit it stood for at
    download. A local folder has neither: its file hashes are the pin. `files` is keyed by POSIX path. `license` is what
    the source says of itself at that commit, None if it says nothing. `component` is the one of a pipeline that the
    recipe names for a LoRA: what comes after download is made again where it is another.
    """

    repo_id: str | None
    path: str | None
    requested: str | None
    revision: str | None
    files: dict[str, FileRecord]
    license: License | None = None
    component: Annotated[str | None, Field(exclude_if=lambda component: component is None)] = None

    @property
    def label(self) -> str:
        """The name for a person: ``repo@commit`` or the path."""
        return f"{self.repo_id}@{self.revision}" if self.repo_id else str(self.path)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def lora_name(self) -> str:
        """Of a LoRA's lock, the POSIX path that is the LoRA: its file, or its folder if that is PEFT's."""
        weights = next((name for name in self.files if not name.endswith(".json")), "")
        path = PurePosixPath(weights)
        return (
            path.parent.as_posix() if len(self.files) > 1 and path.name == repository_files.ADAPTER_WEIGHTS else weights
        )

    def is_of(self, lora: str) -> bool:
        """True for the lock of the LoRA at a POSIX path, which may be a PEFT folder or the file of weights in it."""
        return lora in (self.lora_name, *self.files)


@dataclass(frozen=True, slots=True)
class LoraLock:
    """All the LoRAs of a recipe, pinned, keyed by their name in it.

    Each lock holds one safetensors file, and the `adapter_config.json` beside it if there is one.
    """

    schema: int
    loras: dict[str, Lock]


@dataclass(frozen=True, slots=True)
class BaseLock:
    """The base of a recipe, pinned."""

    schema: int
    base: Lock


@dataclass(frozen=True, slots=True)
class MergedLora:
    """A LoRA as it went into a merge: `scale` is the product that was applied, `sha256` is of the whole file.

    Of a PEFT folder, `filename` is the folder, `sha256` is of its weights and `config_sha256` of the
    `adapter_config.json` that scales them; the two stand for what was added. `left_out` are the keys that were left out
    on purpose, `components` those of a pipeline that it was fused into; none are named where that is the transformer
    alone, or the base is no pipeline.
    """

    name: str
    scale: float
    sha256: str
    filename: str | None = None
    repo_id: str | None = None
    path: str | None = None
    revision: str | None = None
    license: License | None = None
    config_sha256: str | None = None
    left_out: Annotated[tuple[str, ...], Field(exclude_if=lambda keys: not keys)] = ()
    components: Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """The builder: package version, git commit of the checkout (if it is one), and True if that was modified."""

    version: str
    git: str | None = None
    dirty: bool | None = None


@dataclass(frozen=True, slots=True)
class Requantised:
    """The cost of quantising targets again, over all of them: the cosine of the kept and the meant change.

    `noise_over_change` is the energy of what is off, over that of the change that was meant.
    """

    cosine: float
    noise_over_change: float


@dataclass(frozen=True, slots=True)
class Unmerged:
    """Weights that LoRAs were taken out of, by number of elements.

    `certain` ones have one value whose merge is the checkpoint's, `uncertain` ones several, the largest error of which
    is `largest_error`, and `impossible` ones none: of a merge that is rounded once there are no such, and of a
    checkpoint without the LoRAs about `telling`.
    """

    elements: int
    certain: int
    uncertain: int
    impossible: int
    telling: float
    largest_error: float


@dataclass(frozen=True, slots=True)
class Exports:
    """The files of an export by POSIX path, and the manifest of the checkpoint that was exported."""

    schema: int
    manifest_sha256: str
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a merged checkpoint is made of; `files` lists every file of it by POSIX path.

    `selection` is None where every module of every LoRA was fused. `source` are the formats of a base whose weights are
    codes, each with the number of weights, `requantised` the cost where targets were quantised again, `dtype` that of
    all floats where it is another than the base's; `components` are those of a pipeline that were fused, each with its
    number of targets, where that is more or another than the transformer; not there for others. With `unmerged` the
    files are those of a base again: the LoRAs were taken out of a merge.
    """

    schema: int
    recipe: str | None
    base: Lock | None
    loras: tuple[MergedLora, ...]
    scale: float
    targets: int
    files: dict[str, MergedFile]
    selection: Selection | None = None
    source: Annotated[dict[str, int] | None, Field(exclude_if=lambda source: source is None)] = None
    requantised: Annotated[Requantised | None, Field(exclude_if=lambda cost: cost is None)] = None
    dtype: Annotated[str | None, Field(exclude_if=lambda dtype: dtype is None)] = None
    components: Annotated[dict[str, int] | None, Field(exclude_if=lambda components: components is None)] = None
    unmerged: Annotated[Unmerged | None, Field(exclude_if=lambda unmerged: unmerged is None)] = None

    @property
    def pair(self) -> tuple[str | None, list[tuple[str | None, str | None]]]:
        """Base and LoRAs as `models.pair_warnings` takes them."""
        base = self.base.repo_id if self.base else None
        return base, [(lora.repo_id, lora.filename) for lora in self.loras]


@dataclass(frozen=True, slots=True)
class Builder(Tool):
    """The builder of a release, and the address of the repository that it was run from, where that is known."""

    repository: str | None = None


@dataclass(frozen=True, slots=True)
class ReleaseList(Manifest):
    """The list of a published repository: the manifest with every file of it, and the name of the release.

    `repository` is ``owner/name`` on the Hub and `tag` the name of the commit there; each is None where a release has
    none, and `builder` only in a list that was made before lists had names. With `weights` ``recipe`` the files
    `absent`, which are in `files`, are not in the repository: who has the base makes them again. Neither is there for
    ``full``.
    """

    repository: str | None = None
    tag: str | None = None
    builder: Builder | None = None
    weights: Annotated[Literal["full", "recipe"], Field(exclude_if=lambda weights: weights == "full")] = "full"
    absent: Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)] = ()

    def __str__(self) -> str:
        if self.builder is None:
            return "its list is an older one and names no repository, tag or builder"
        named = [self.repository or "no repository", f"tag {self.tag}" if self.tag else "no tag"]
        commit = f"{self.builder.git or 'no commit'}{', modified' if self.builder.dirty else ''}"
        named += [f"built by lora-fuse {self.builder.version} ({self.builder.repository or 'no address'}@{commit})"]
        return ", ".join([*named, f"of the base {self.base.label if self.base else 'unknown'}"])


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """The builder of a merge, the time when it was finished (UTC, ISO 8601), the device and the seconds.

    It lies beside the manifest of those bytes and is no part of it: the same merge is written elsewhere, by others.
    """

    schema: int
    manifest_sha256: str
    tool: Tool
    finished: str
    device: str
    bytes_written: int
    seconds: float


@dataclass(frozen=True, slots=True)
class VerifyRecord:
    """The rows that a verification drew at random, beside those that `verify.json` is of: their seed and number.

    `seed` is None where all rows were looked at. It lies beside `verify.json`, which is the same for every right build.
    """

    schema: int
    manifest_sha256: str
    seed: int | None
    rows: int
    tool: Tool
    finished: str


def rounded(value: float, digits: int = 9) -> float:
    """A measured number as records have it, to so many significant digits.

    Processors whose libraries add in another order end in other bits; the record of what they measured is the same.
    """
    return float(f"{value:.{digits}g}")


def to_json(record: object) -> str:
    """A record as indented JSON with a final newline."""
    return _adapter(type(record)).dump_json(record, indent=2, by_alias=True).decode() + "\n"


def from_json(kind: type[Record], text: str | bytes, where: str) -> Record:
    """Parse one record, from `where`; a missing or ill-typed key is refused, an unknown one ignored.

    Raises:
        BadSource: the text is not such a record.
    """
    try:
        record: Record = _adapter(kind).validate_json(text)
        return record
    except ValidationError as error:
        first = error.errors()[0]
        at = key_path(first["loc"])
        raise BadSource(f"{where} is not a {kind.__name__}: at {at}: {first['msg']}; run its stage again") from error


def key_path(parts: Iterable[int | str]) -> str:
    """The place of a value in a tree, ``loras.NAME.path``; a key that is no plain name is quoted."""
    return ".".join(str(part) if PLAIN_KEY.fullmatch(str(part)) else repr(part)[:80] for part in parts) or "the top"


def read(kind: type[Record], path: Path) -> Record:
    """Read one record from a file.

    Raises:
        BadSource: the file cannot be read, or holds no such record.
        FileNotFoundError: it is not there.
    """
    return from_json(kind, read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a record.

    Raises:
        BadSource: the file cannot be read.
        FileNotFoundError: it is not there.
    """
    try:
        return files.read_text(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadSource(f"{path} cannot be read ({error.strerror}); run its stage again") from error
