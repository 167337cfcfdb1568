"""A LoRA on disk: a safetensors file, or a PEFT folder. Opening reads the header and the alphas, not the factors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Header, TensorInfo, dtypes, read_header, repository_files
from lora_fuse.errors import BadCheckpoint, BadLora, require
from lora_fuse.lora.adapter_config import parse_adapter_config
from lora_fuse.lora.deltas import Delta, is_by_column, make_delta, rows_of
from lora_fuse.lora.header_entries import read_entries
from lora_fuse.lora.key_formats import PEFT_PREFIX, Algorithm, component_of, read_key
from lora_fuse.lora.key_parser import LoraDelta, parse_lora
from lora_fuse.lora.matcher import PlacedDelta, modules_in
from lora_fuse.lora.peft_fields import DEFAULT_ALPHA
from lora_fuse.lora.scaling import NOWHERE
from lora_fuse.machine import file_state, files

LARGEST = 1 << 38  # bytes of a file; a difference of every weight of Qwen-Image has 2**36 in float32
PLACES = 100  # that state a strength, a component of a configuration being one
BLOCK = 1 << 26  # bytes that are looked at at once
ROWS = 512  # of a weight that are compared at once
INTEGERS = {name for name, dtype in dtypes.DTYPES.items() if not dtype.is_float and name != "BOOL"}


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An opened LoRA: its header, the deltas that it holds, and the sha256 of the whole file.

    Of a PEFT folder that is its weights' file, which was in `state` when it was hashed and has to stay so. `digests`
    are the sha256 of its tensors, if they are to be compared when they are read. `config_sha256` is of the
    `adapter_config.json` that counts, `remarks` are the names of header entries of which nothing is known,
    `expressions` the places outside the tensors whose patterns are more than names. `left_out` are keys that somebody
    leaves out on purpose: no delta is made of them.
    """

    path: Path
    header: Header
    deltas: tuple[LoraDelta, ...]
    sha256: str
    state: file_state.FileState
    config_sha256: str | None = None
    remarks: tuple[str, ...] = ()
    expressions: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    digests: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def missing_alphas(self) -> dict[int, float]:
        """By rank, the usual alpha of modules of which no place says one, although their keys are of a kind that has.

        PEFT keeps it in a configuration, of which a file says nothing.
        """
        unsaid = [delta for delta in self.deltas if delta.said_by == NOWHERE]
        usual = {
            delta.rank: DEFAULT_ALPHA if delta.module.startswith(PEFT_PREFIX) else delta.format.usual_alpha
            for delta in unsaid
        }
        return {rank: alpha for rank, alpha in sorted(usual.items()) if rank is not None and alpha is not None}

    def of_component(self, component: str, main: str) -> LoraFile:
        """The part of the file that is for a component; `main` is the one of keys that name none."""
        deltas = tuple(delta for delta in self.deltas if (delta.component or main) == component)
        left_out = tuple(key for key in self.left_out if (component_of(key) or main) == component)
        return replace(self, deltas=deltas, left_out=left_out)

    def left_out_in(self, weights: Mapping[str, TensorInfo]) -> set[str]:
        """The keys that are left out although a base, whose parameters are given, has their modules."""
        modules = {key: read[0] for key in self.left_out if (read := read_key(key)) is not None}
        there = modules_in(set(modules.values()), weights, str(self.path))
        return {key for key, module in modules.items() if module in there}

    def make(self, placed: PlacedDelta, scale: float) -> Delta:
        """Read the tensors of a delta, which is to be added at a scale, in the rows of the base's parameter.

        Raises:
            BadLora: see `read`.
        """
        delta = placed.delta
        tensors = self.read(delta)
        if delta.format.algorithm in (Algorithm.FULL, Algorithm.SET):
            tensors["diff"] = tensors["diff"].reshape(-1, placed.shape[1])
        made = make_delta(delta.format.algorithm, tensors, delta.factor, scale)
        return made if placed.runs is None else rows_of(made, placed.runs, placed.shape[0])

    def adds_the_same(self, one: PlacedDelta, other: PlacedDelta) -> bool:
        """True where two deltas add the same to the rows of a parameter that they have in common, to a part in 2^30."""
        if any(each.delta.has_dora or each.delta.is_replacement for each in (one, other)):
            return False
        require(
            "torch", f"{self.path}: a comparison of {one.delta.module!r} and {other.delta.module!r}, which are one,"
        )
        import torch

        made = [self.make(each, 1.0) for each in (one, other)]
        common = sorted(one.rows & other.rows)
        for first in range(common[0], common[-1] + 1, ROWS):
            rows = torch.tensor([row - first for row in common if first <= row < first + ROWS], dtype=torch.int64)
            values = torch.zeros(2, min(ROWS, one.shape[0] - first), one.shape[1], dtype=torch.float64)
            for total, delta in zip(values, made, strict=True):
                delta.add_to(total, total, first, 0)
            ours, theirs = values[:, rows]
            if not torch.allclose(ours, theirs, rtol=0.0, atol=2.0**-30 * float(values.abs().max())):
                return False
        return True

    def has_lengths_of_columns(self, delta: LoraDelta) -> bool:
        """True for DoRA with a length for each column of the result, which depends on all of its rows."""
        scale = self.header.tensors.get(delta.keys.get("dora_scale", ""))
        return scale is not None and is_by_column(scale.shape)

    def read(self, delta: LoraDelta) -> dict[str, npt.NDArray[np.float64]]:
        """The tensors of a delta by role, widened to float64 (exact for every dtype that a LoRA may have).

        Raises:
            BadLora: the file cannot be read, or is not any more what was hashed.
        """
        tensors = {role: self.header.tensors[key] for role, key in delta.keys.items()}
        with _opened(self.path, self.state) as file:
            found = {
                role: _read(self.path, file, tensor, self.digests.get(tensor.name)) for role, tensor in tensors.items()
            }
        return {role: values.astype(np.float64) for role, values in found.items()}


@contextmanager
def _opened(path: Path, state: file_state.FileState) -> Iterator[BufferedReader]:
    """The file, which is in a state and has to be in it still when it was read."""
    try:
        with files.open_regular(path) as file:
            yield file
            if file_state.FileState.of(os.fstat(file.fileno())) != state:
                raise BadLora(f"{path} changed while it was read; run again when nothing writes to it")
    except OSError as error:
        raise BadLora(f"{path} cannot be read ({error.strerror}); check the disk or fetch it again") from error


def _read(
    path: Path,
    file: BufferedReader,
    tensor: TensorInfo,
    digest: bytes | None = None,
    allowed: Collection[str] = dtypes.ROUNDABLE,
) -> npt.NDArray[Any]:
    """The values of a tensor, which have the sha256 `digest` if that is given."""
    if tensor.dtype not in allowed:
        raise BadLora(f"{path}: {tensor.name!r} is {tensor.dtype}; a LoRA holds {', '.join(dtypes.ROUNDABLE)}")
    file.seek(tensor.start)
    data = file.read(tensor.nbytes)
    if len(data) < tensor.nbytes:
        raise BadLora(f"{path} ended {tensor.nbytes - len(data)} bytes early: it changed while it was read")
    if digest is not None and hashlib.sha256(data).digest() != digest:
        raise BadLora(f"{path}: {tensor.name!r} is read as other bytes than before; check the disk, fetch it again")
    return np.frombuffer(data, dtype=dtypes.DTYPES[tensor.dtype].numpy).reshape(tensor.shape)


def _hash(file: BufferedReader, header: Header, *, digests: bool) -> tuple[str, dict[str, bytes]]:
    """The sha256 of the whole file, with the header that was parsed, and if asked for of the bytes of each tensor."""
    whole = hashlib.sha256(header.raw)
    parts = {}
    file.seek(len(header.raw))
    for tensor in header.tensors.values():  # they leave no hole
        part = hashlib.sha256()
        for start in range(0, tensor.nbytes, BLOCK):
            block = file.read(min(BLOCK, tensor.nbytes - start))
            for digest in (whole, part) if digests else (whole,):
                digest.update(block)
        parts[tensor.name] = part.digest()
    return whole.hexdigest(), parts if digests else {}


def open_lora(path: Path, *, digests: bool = False, leave_out: Callable[[str], bool] = lambda _: False) -> LoraFile:
    """Open a LoRA file, or a PEFT folder with `adapter_config.json` and `adapter_model.safetensors`.

    An `adapter_config.json` beside a file counts too, see `lora_fuse.checkpoint.repository_files.config_beside`.
    `digests` are those of `LoraFile`, `leave_out` tells the keys that are left out.

    Raises:
        BadLora: it is missing, is not safetensors, is truncated, holds NaN, its keys do not add up, or something that
            is said of its strength is not understood or said in two ways.
    """
    file, config_file = _files(path)
    try:
        state = file_state.state_of(file)
        header = read_header(file)
    except BadCheckpoint as error:
        raise BadLora(f"LoRA: {error}") from error
    if state is None:  # it was not there yet a moment ago
        raise BadLora(f"LoRA: no such file: {file}")
    size = max((tensor.end for tensor in header.tensors.values()), default=0)
    if size > LARGEST:
        raise BadLora(f"{file} has {size} bytes, and at most {LARGEST} are read of a LoRA; name the LoRA's own file")
    left_out = tuple(sorted(filter(leave_out, header.tensors)))
    tensors = {name: tensor for name, tensor in header.tensors.items() if name not in left_out}
    if left_out and not tensors:
        raise BadLora(f"{file}: all of its {len(left_out)} keys are left out; leave out the LoRA itself")
    entries = read_entries(header.metadata, tensors, str(file))
    stated = list(entries.stated)
    config = b""
    if config_file is not None:
        config = _read_config(config_file)
        stated += parse_adapter_config(config.decode(), str(config_file), config_file.name)
    if len(stated) > PLACES:
        raise BadLora(f"{file}: {len(stated)} places or components state a strength, and at most {PLACES} are compared")
    with _opened(file, state) as content:
        alphas = {name: _scalar(file, content, one) for name, one in tensors.items() if name.endswith(".alpha")}
        deltas = parse_lora(tensors, alphas, stated, str(file))
        for key in (key for delta in deltas for key in delta.keys.values()):
            if not _is_finite(file, content, header.tensors[key]):
                raise BadLora(f"{file}: {key!r} holds NaN or infinity; the file is broken, fetch or train it again")
        sha256, parts = _hash(content, header, digests=digests)
    config_sha256 = hashlib.sha256(config).hexdigest() if config_file is not None else None
    expressions = tuple(place.where for place in stated if place.has_expressions)
    return LoraFile(file, header, deltas, sha256, state, config_sha256, entries.remarks, expressions, left_out, parts)


def _is_finite(path: Path, file: BufferedReader, tensor: TensorInfo) -> bool:
    """True without NaN and infinity; in blocks, as it is not known yet whether so large a tensor is of any use."""
    size = max(1, dtypes.DTYPES[tensor.dtype].bits // 8)
    for start in range(tensor.start, max(tensor.end, tensor.start + 1), BLOCK):
        end = min(start + BLOCK, tensor.end)
        part = replace(tensor, shape=((end - start) // size,), start=start, end=end)
        if not np.isfinite(_read(path, file, part)).all():
            return False
    return True


def _files(path: Path) -> tuple[Path, Path | None]:
    """The file of weights, and the configuration that speaks of it.

    Raises:
        BadLora: a folder is no PEFT folder, a link leads out of it, or a file of one has lost its configuration.
    """
    folder = path if path.is_dir() else path.parent
    names = {
        name
        for name in (repository_files.ADAPTER_CONFIG, repository_files.ADAPTER_WEIGHTS)
        if os.path.lexists(folder / name)  # what cannot be read is refused, and not left out
    }
    if path.is_dir():
        for needed in (repository_files.ADAPTER_CONFIG, repository_files.ADAPTER_WEIGHTS):
            if needed not in names:
                raise BadLora(f"{folder} is no PEFT folder: it has no {needed}; give the .safetensors file itself")
            try:
                files.inside(folder, needed)
            except OSError as error:
                raise BadLora(f"{folder / needed} cannot be read: {error.strerror}") from error
        path = folder / repository_files.ADAPTER_WEIGHTS
    elif path.name in names and len(names) == 1:
        raise BadLora(
            f"{path} is the file of a PEFT folder, and {repository_files.ADAPTER_CONFIG}, which says its alpha, is not "
            "beside it; fetch it from the same place"
        )
    config = repository_files.config_beside(path.name, names)
    return path, folder / config if config else None


def _read_config(path: Path) -> bytes:
    try:
        content = files.read_bytes(path)
        content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadLora(f"{path} cannot be read: {error}; fetch it again") from error
    return content


def _scalar(path: Path, file: BufferedReader, tensor: TensorInfo) -> float:
    values = _read(path, file, tensor, allowed=INTEGERS | set(dtypes.ROUNDABLE))
    if values.size != 1:
        raise BadLora(f"{path}: {tensor.name!r} has the shape {list(tensor.shape)}; an alpha is one number")
    return float(values.reshape(-1)[0])
