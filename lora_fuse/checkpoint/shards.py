"""A base on disk: which files it has, which of them are the shards of the component to fuse.

A base is a diffusers pipeline folder, one component folder (`config.json` and safetensors) or one safetensors file.
Only headers are read here, so opening a 57 GB base takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lora_fuse.checkpoint import file_kind
from lora_fuse.checkpoint.header import PREFIX, Header, TensorInfo, header_length, parse_header
from lora_fuse.checkpoint.repository_files import TEXT_SUFFIXES
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import files

PROVENANCE = "lora_fuse"  # the metadata entry of a fused shard: what was fused, as JSON

# What a merged repository takes over from a base: weights as safetensors and the text that loads them. A pickle, a
# README (the merged repository has a card of its own) or a stray file is left behind.
KEPT_SUFFIXES = TEXT_SUFFIXES | {".safetensors"}

Kind = Literal["pipeline", "component", "file"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the component: `relative` is its POSIX path below the base."""

    path: Path
    relative: str
    header: Header


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base: its shards, and every other file that belongs to it (POSIX paths below `root`)."""

    root: Path
    kind: Kind
    shards: tuple[Shard, ...]
    others: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)  # the component's config.json, if it has one
    label: str | None = None  # ``repo@commit``, where it is known; the headers of fused shards say it

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the component by name."""
        return {name: tensor for shard in self.shards for name, tensor in shard.header.tensors.items()}

    def locate(self, relative: str) -> Path:
        """The file on disk behind a POSIX path of this base."""
        return self.root if self.kind == "file" else self.root / relative


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        BadCheckpoint: the file is missing, cannot be read, or is not a whole safetensors file; what it is instead is
            said where that is known, and its name does not count.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(file_kind.LOOKED_AT)
            with _naming_other_kinds(start, str(path)):
                end = PREFIX + header_length(start[:PREFIX], size, str(path))
                return parse_header(start[:end] + file.read(max(0, end - len(start))), size, str(path))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"no such file: {path}") from error
    except OSError as error:
        raise BadCheckpoint(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def _naming_other_kinds(start: bytes, where: str) -> Iterator[None]:
    """Say of a file that turns out to be no safetensors file what it is, where that is known."""
    try:
        yield
    except BadCheckpoint as error:
        if (kind := file_kind.kind_of(start)) is not None:
            raise BadCheckpoint(f"{where} is {kind.what}, and no safetensors file: {kind.way_out}") from error
        raise


def open_checkpoint(
    root: Path, component: str = "transformer", files: Iterable[str] | None = None, label: str | None = None
) -> Checkpoint:
    """Open a base from its headers; `component` is for a pipeline only.

    Of a folder, `files` are the POSIX paths that belong to the base (a lock's); without them, all of a known kind are.

    Raises:
        BadCheckpoint: there is nothing there, or its index and shards contradict each other.
    """
    if root.is_file():
        return Checkpoint(root, "file", (Shard(root, root.name, read_header(root)),), (), label=label)
    kind: Kind = "pipeline" if (root / "model_index.json").is_file() else "component"
    if kind == "component" and not (root / "config.json").is_file():
        raise BadCheckpoint(
            f"{root} is no base: expected a folder with model_index.json (a pipeline) or config.json (a component), "
            "or one .safetensors file"
        )
    prefix = f"{component}/" if kind == "pipeline" else ""
    names = sorted(files) if files is not None else _kept_files(root)
    shards = _component_shards(root, prefix, names)
    taken = {shard.relative for shard in shards}
    others = tuple(name for name in names if name not in taken)
    config = root / f"{prefix}config.json"
    return Checkpoint(root, kind, shards, others, _read(config) if config.exists() else {}, label)


def _read(path: Path) -> dict[str, Any]:
    return files.read_json(path, dict, BadCheckpoint, "fetch the base again")


def _kept_files(root: Path) -> list[str]:
    names = [path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.suffix in KEPT_SUFFIXES]
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _component_shards(root: Path, prefix: str, names: list[str]) -> tuple[Shard, ...]:
    here = [name for name in names if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    indexes = [name for name in here if name.endswith(".safetensors.index.json")]
    weights = [name for name in here if name.endswith(".safetensors")]
    if len(indexes) == 1:
        return _indexed_shards(root, indexes[0])
    if not indexes and len(weights) == 1:
        return (Shard(root / weights[0], weights[0], read_header(root / weights[0])),)
    raise BadCheckpoint(
        f"{root / prefix} has {len(indexes)} index files and {len(weights)} safetensors files; "
        "expected one index with its shards, or one safetensors file"
    )


def _indexed_shards(root: Path, index: str) -> tuple[Shard, ...]:
    weight_map = _read(root / index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadCheckpoint(f"{root / index} is no shard index: it has no weight_map; fetch the base again")
    folder = PurePosixPath(index).parent
    shards = []
    for filename in sorted(set(weight_map.values())):
        if PurePosixPath(filename).name != filename:
            raise BadCheckpoint(f"{root / index} names {filename!r}: a shard lies beside its index, not elsewhere")
        relative = (folder / filename).as_posix()
        shards.append(Shard(root / relative, relative, read_header(root / relative)))
    _check_index(weight_map, shards, root / index)
    return tuple(shards)


def _check_index(weight_map: dict[str, str], shards: list[Shard], index: Path) -> None:
    present = {(name, shard.path.name) for shard in shards for name in shard.header.tensors}
    listed = set(weight_map.items())
    for name, filename in sorted(listed - present):
        raise BadCheckpoint(
            f"{index} puts {name!r} in {filename}, and that shard does not have it; fetch the base again"
        )
    for name, filename in sorted(present - listed):
        raise BadCheckpoint(f"{filename} holds {name!r}, and {index} has no entry for it there; fetch the base again")
