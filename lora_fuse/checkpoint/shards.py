"""A base on disk: which files it has, which of them are the shards of the component to fuse.

A base is a diffusers pipeline folder, one component folder (`config.json` and safetensors), or one file: safetensors or
GGUF.
Only headers are read here, so opening a 57 GB base takes milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lora_fuse.checkpoint import file_kind
from lora_fuse.checkpoint.foreign_code import asked_code
from lora_fuse.checkpoint.header import PREFIX, Header, TensorInfo, header_length, parse_header
from lora_fuse.checkpoint.repository_files import (
    MODEL_INDEX,
    component_names,
    is_weights,
    locate,
    main_component,
    sort_folder,
)
from lora_fuse.checkpoint.stored import (
    Quantised,
    StoredWeights,
    find_stored,
    is_gguf,
    quantised_modules,
    read_gguf_header,
)
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import direct_io, file_state, files

PROVENANCE = "lora_fuse"  # the metadata entry of a fused shard: what was fused, as JSON

# In one file ComfyUI's checkpoints have this before the names of the diffusion model (comfy/sd.py).
FILE_PREFIX = "model.diffusion_model."

SMALL = 1 << 20  # bytes of a configuration; vocabularies are larger, and a fuse does not read them

Kind = Literal["pipeline", "component", "file"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the component's weights: `relative` is its POSIX path below the base.

    Of one that is `streamed`, `path` has the header and nothing else.
    """

    path: Path
    relative: str
    header: Header
    is_gguf: bool = False
    streamed: direct_io.StreamedFiles | None = None

    def open(self) -> AbstractContextManager[direct_io.ByteSource]:
        """Read it; one that is streamed once, in order, and all that is behind its header.

        Raises:
            BadCheckpoint: it cannot be opened.
            Refused: see `direct_io.StreamedFiles.open`.
        """
        if self.streamed is not None:
            return self.streamed.open(self.relative, self.header.raw)
        return direct_io.open_shard(self.path)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base: its shards, and every other file that is taken over with them (POSIX paths below `root`).

    `left` are files that are not, each with the reason; `remarks` are sentences on what is odd and not wrong. `states`
    are those of all its files, by their places on disk, from before they were looked into. `component` is the folder of
    a pipeline that the shards are in, and empty of another kind; `further` are components that were opened with it,
    each as a base that takes over the same files. `streamed` are files of weights that are on their way yet.
    """

    root: Path
    kind: Kind
    shards: tuple[Shard, ...]
    others: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)  # the component's config.json, if it has one
    label: str | None = None  # ``repo@commit``, where it is known; the headers of fused shards say it
    left: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    states: Mapping[Path, file_state.FileState] = field(default_factory=dict)
    component: str = ""
    further: tuple[Checkpoint, ...] = ()
    streamed: direct_io.StreamedFiles | None = None

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the component by name."""
        return {name: tensor for shard in self.shards for name, tensor in shard.header.tensors.items()}

    def parameters(self) -> dict[str, TensorInfo]:
        """Every tensor by the name that a LoRA has for it: without the `FILE_PREFIX` of a single file."""
        tensors = self.tensors()
        if self.kind != "file":
            return tensors
        return {name.removeprefix(FILE_PREFIX): tensor for name, tensor in tensors.items()} | {
            name: tensor for name, tensor in tensors.items() if f"{FILE_PREFIX}{name}" not in tensors
        }

    def stored(self) -> StoredWeights:
        """The weights of the component that are stored as codes; scales and descriptions are read.

        Raises:
            BadCheckpoint: a file cannot be read; or there are such weights, and they are streamed: what their codes
                mean is said in data.
        """
        found = find_stored(((shard.path, shard.header) for shard in self.shards), str(self.root))
        if self.streamed is not None and (quantised := [*found.matrices, *found.refused, *found.markers]):
            raise BadCheckpoint(
                f"{self.streamed.label} is quantised, as {quantised[0]!r} says, and only plain weights are fused while "
                "they arrive; fetch it first (`hf download`), and name the folder"
            )
        return found

    def quantised(self) -> dict[str, Quantised]:
        """The modules of the component that are quantised, by name."""
        metadata = {key: value for shard in self.shards for key, value in shard.header.metadata.items()}
        return quantised_modules(self.tensors(), metadata)

    def locate(self, relative: str) -> Path:
        """The file on disk behind a POSIX path of this base."""
        return self.root if self.kind == "file" else self.root / relative


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        BadCheckpoint: the file is missing, cannot be read, or is not a whole safetensors file; what it is instead is
            said where that is known, and its name does not count.
    """
    with _reading(path), files.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(file_kind.LOOKED_AT)
        with _naming_other_kinds(start, str(path)):
            end = PREFIX + header_length(start[:PREFIX], size, str(path))
            return parse_header(start[:end] + file.read(max(0, end - len(start))), size, str(path))


def _open_file(path: Path) -> Shard:
    """Read and check the header of a base that is one file, safetensors or GGUF, whatever its name.

    Raises:
        BadCheckpoint: see `read_header` and `read_gguf_header`.
    """
    with _reading(path), files.open_regular(path) as file:
        if is_gguf(file.read(file_kind.LOOKED_AT)):
            file.seek(0)
            header = read_gguf_header(file, os.fstat(file.fileno()).st_size, str(path))
            return Shard(path, path.name, header, is_gguf=True)
    return Shard(path, path.name, read_header(path))


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
    root: Path,
    component: str | None = None,
    files: Iterable[str] | None = None,
    label: str | None = None,
    more: Sequence[str] = (),
    streamed: direct_io.StreamedFiles | None = None,
) -> Checkpoint:
    """Open a base from its headers; `component` is for a pipeline only, whose main one is opened by default.

    `more` are further components of a pipeline to open, see `Checkpoint.further`; `streamed` is that of `Checkpoint`.

    Of a folder, `files` are the POSIX paths that belong to the base (a lock's); without them, all files in it. They are
    sorted by `repository_files.sort_files`.

    Raises:
        BadCheckpoint: there is nothing there, its index and shards contradict each other, or see `sort_files`.
    """
    if root.is_file():
        states = _states([root])
        shard = _open_file(root)
        return Checkpoint(root, "file", (shard,), (), label=label, states=states)
    kind: Kind = "pipeline" if (root / MODEL_INDEX).is_file() else "component"
    if kind == "component" and not (root / "config.json").is_file():
        weights = sorted(path.name for path in root.glob("*") if path.suffix in (".safetensors", ".gguf"))
        way_out = f"; of what it holds, name {weights[0]} itself" if weights else ""
        raise BadCheckpoint(
            f"{root} is {'no base' if root.exists() else 'not there'}: expected a folder with model_index.json (a "
            f"pipeline) or config.json (a component), or one .safetensors or .gguf file{way_out}"
        )
    main = "" if kind == "component" else component or main_component(component_names(root))
    found = sort_folder(root, main, files, more)
    states = _states(locate(root, name) for name in (*found.all_shards, *found.others))
    coming = frozenset(streamed.records) if streamed else frozenset()
    every = [
        Shard(root / name, name, read_header(root / name), streamed=streamed if name in coming else None)
        for name in found.all_shards
    ]
    if found.missing:
        raise BadCheckpoint(
            f"{root} has no {', '.join(found.missing)}, which its {MODEL_INDEX} names; get a complete copy, or "
            f"fuse into {root / main} alone"
        )
    remarks = found.remarks + _asks_for_code(root, found.others)
    sets = [(found.shards, found.index), *found.more.values()]
    parts = [tuple(shard for shard in every if shard.relative in names) for names, _ in sets]
    for shards, (_, index) in zip(parts, sets, strict=True):
        if index is not None:
            remarks += _check_index(_read(root / index)["weight_map"], shards, root / index)
    for name in found.others:
        _refuse_unreadable(root / name)
    common = (label, found.left, tuple(remarks), states)
    opened = [
        Checkpoint(
            root, kind, shards, found.others, _settings(root, folder), *common, component=folder, streamed=streamed
        )
        for folder, shards in zip((main, *found.more), parts, strict=True)
    ]
    return replace(opened[0], further=tuple(opened[1:]))


def _settings(root: Path, folder: str) -> dict[str, Any]:
    """The configuration of a component; empty without one."""
    config = locate(root, PurePosixPath(folder, "config.json").as_posix())
    return _read(config) if config.exists() else {}


def _read(path: Path) -> dict[str, Any]:
    return files.read_json(path, dict, BadCheckpoint, "fetch the base again")


def _asks_for_code(root: Path, names: Iterable[str]) -> list[str]:
    """A remark where configurations ask for code: a fuse may go on, as it runs none; see `fitness.refuse_code`."""
    asked: list[str] = []
    for path, name in ((locate(root, name), name) for name in names if name.endswith(".json")):
        with suppress(OSError, ValueError):
            if path.stat().st_size <= SMALL:
                asked += asked_code(name, files.parse_json(files.read_bytes(path)))
    more = f" (and {len(asked) - 1} more)" if len(asked) > 1 else ""
    return [f"{asked[0]}{more}: a fuse runs no code, download and pictures refuse the base"] if asked else []


def _states(paths: Iterable[Path]) -> dict[Path, file_state.FileState]:
    """The states of files; who opens one that is not there says so."""
    found = ((path, file_state.state_of(path)) for path in paths)
    return {path: state for path, state in found if state is not None}


def _refuse_unreadable(path: Path) -> None:
    """Refuse a file that is taken over and could not be loaded: weights that are none, a link to nothing, a pointer."""
    if not path.is_file():
        raise BadCheckpoint(f"{path} is a link to nothing or no plain file; get a complete copy of the base")
    if is_weights(path.name):
        read_header(path)
        return
    with _reading(path), files.open_regular(path) as file:
        kind = file_kind.kind_of(file.read(file_kind.LOOKED_AT))
    if kind is file_kind.POINTER:
        raise BadCheckpoint(f"{path} is {kind.what}: {kind.way_out}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Refuse a file that is not there or cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadCheckpoint(f"no such file: {path}") from error
    except OSError as error:
        raise BadCheckpoint(f"cannot read {path}: {error.strerror}") from error


def _check_index(weight_map: Mapping[str, str], shards: Iterable[Shard], index: Path) -> list[str]:
    """Remarks on an index; entries that no shard has are ignored, as libraries do: of tied weights there are such."""
    present = {(name, shard.path.name) for shard in shards for name in shard.header.tensors}
    listed = set(weight_map.items())
    for name, filename in sorted(present - listed):
        raise BadCheckpoint(f"{filename} holds {name!r}, and {index} has no entry for it there; fetch the base again")
    absent = sorted(name for name, _ in listed - present)
    return (
        [f"{index.name} has entries for tensors that no shard holds, as of tied weights: {', '.join(absent)}"]
        if (absent)
        else []
    )
