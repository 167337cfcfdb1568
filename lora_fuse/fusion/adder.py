"""The choice of the fastest adder for a target, whose LoRA tensors are read here; and whole sums, for who rounds them.

torch is imported where it is needed: its import takes longer than the fuse of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Shard, TensorInfo, dtypes
from lora_fuse.checkpoint.stored import StoredMatrix, decode_rows
from lora_fuse.errors import BadCheckpoint, naming_extras
from lora_fuse.fusion.cpu_adder import Stacked, TooLarge, stackable
from lora_fuse.fusion.pieces import PIECE, row_pieces
from lora_fuse.fusion.plan import Plan, Target
from lora_fuse.lora import Decomposed, Delta, NotFinite
from lora_fuse.machine import direct_io

if TYPE_CHECKING:
    import torch


# Overwrites a weight's rows in some memory, from a number on, with the merged ones. Raises `NotFinite` where the base
# holds NaN or infinity, or a sum is too large for its dtype.
Adder = Callable[[memoryview, int], None]
ReadSum = Callable[[Target, str], Adder]  # reads a target's deltas and chooses their adder, on a device

BYTE = 8  # bits; what has fewer is packed
SURELY_EXACT = 16  # bits of a number, at most, that float32 is known to have

_IMPORTING = Lock()


def read_sum(target: Target, device: str) -> Adder:
    """Read the deltas of a target and choose their adder; `device` is ``cpu`` or ``cuda``."""
    deltas = read_deltas(target)
    products = stackable(deltas, target.tensor.dtype) if device == "cpu" else None
    if not products:
        return _torch_sum(target, deltas, device)
    stacked = Stacked(products, target.tensor.dtype)

    def add(data: memoryview, first: int) -> None:
        try:
            stacked.add(np.frombuffer(data, np.uint16).reshape(-1, columns_of(target)), first)
        except TooLarge:  # or nearly so: torch decides
            _torch_sum(target, deltas, "cpu")(data, first)

    return add


def _torch_sum(target: Target, deltas: list[Delta], device: str) -> Adder:
    """The adder for any deltas, on any device."""
    with naming_extras(f"{target.shard.path}: a sum as large as those of {target.tensor.name!r}"):
        sums = _torch_sums()

    def add(data: memoryview, first: int) -> None:
        sums.add_to_rows(sums.as_rows(data, target.tensor.dtype, columns_of(target)), deltas, first, device)

    return add


def _torch_sums() -> ModuleType:
    """Import what needs torch, one thread at a time: a second one would take half of a module whose import fails."""
    with _IMPORTING:
        from lora_fuse.fusion import torch_sums

    return torch_sums


def read_deltas(target: Target) -> list[Delta]:
    """Read the deltas of a target; DoRA by column has measured the whole weight then.

    Raises:
        BadCheckpoint: the base shard ended early.
    """
    deltas = [scaled.read() for scaled in target.deltas]
    for delta in deltas:
        if isinstance(delta, Decomposed) and delta.by_column:
            for first, rows in _rows_of(target):
                delta.measure(rows.double(), first)
    return deltas


def _rows_of(target: Target) -> Iterator[tuple[int, torch.Tensor]]:
    """Read a target's rows from the base, in its own dtype or decoded, block by block: in memory that is used again."""
    at = target.tensor.start
    memory = direct_io.block_memory(PIECE)
    with target.shard.open() as source:
        for piece in row_pieces(target):
            data = memory[: piece.nbytes]
            source.fill(data, at)
            yield piece.first_row, base_rows(target, data, piece.first_row)
            at += piece.nbytes


def base_rows(target: Target, data: memoryview, first: int) -> torch.Tensor:
    """Rows of a target, (n, columns), by their bytes: as they are, or of codes their values in float32."""
    sums: ModuleType = _torch_sums()
    if target.stored is None:
        rows: torch.Tensor = sums.as_rows(data, target.tensor.dtype, columns_of(target))
    else:
        values = decode_rows(target.stored, np.frombuffer(data, np.uint8), first)
        rows = sums.as_rows(values.reshape(-1).data, "F32", columns_of(target))
    return rows


def columns_of(target: Target) -> int:
    """Values of a row: all dimensions but the first."""
    return math.prod(target.tensor.shape[1:])


class ExactSums:
    """The tensors of a merge in float32, one at a time, before they are rounded to the dtype that is written.

    A target is the exact sum of base and deltas, rounded once to float32 (but see `torch_sums.round_sums`), any other
    tensor its stored values; the same bits on every machine. May be used by many threads at once.
    """

    def __init__(self, plan: Plan) -> None:
        """Read nothing yet."""
        self._targets = plan.targets
        self._codes = plan.stored.matrices if plan.stored else {}
        self._places = {
            name: (shard, info) for shard in plan.checkpoint.shards for name, info in shard.header.tensors.items()
        }

    def matrix(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor in its own shape, all of it in memory; beside it a target's deltas and few MB are, for a while.

        Raises:
            KeyError: the base has no tensor of that name.
            BadCheckpoint: the base cannot be read, holds NaN or infinity in a target, or a sum is too large for
                float32; or the tensor has values that float32 has not.
            BadLora: see `LoraFile.read`.
        """
        shard, info = self._places[name]
        if name not in self._targets:
            codes = self._codes.get(name)
            return _stored(shard, info) if codes is None else _decoded(shard, codes)
        import torch

        torch.set_num_threads(1)  # of this thread, as in `torch_sums`
        target = self._targets[name]
        deltas = read_deltas(target)
        merged = np.empty((info.shape[0], columns_of(target)), np.float32)
        try:
            for first, rows in _rows_of(target):
                into = torch.from_numpy(merged[first : first + len(rows)])
                _torch_sums().round_sums(rows, into, deltas, first)
        except NotFinite as error:
            raise BadCheckpoint(f"{shard.path}: {name!r}: {error}") from error
        return merged.reshape(info.shape)


def exact_sums(plan: Plan) -> ExactSums:
    """Give the tensors that a plan makes, each before it is rounded to the dtype that is written."""
    return ExactSums(plan)


def _decoded(shard: Shard, codes: StoredMatrix) -> npt.NDArray[np.float32]:
    """The values of a weight that is codes."""
    whole = Target(codes.codes.tensor, shard, (), codes)
    return np.concatenate([rows.numpy().copy() for _, rows in _rows_of(whole)]).reshape(codes.shape)


def _stored(shard: Shard, tensor: TensorInfo) -> npt.NDArray[np.float32]:
    """The values of a tensor of the base.

    Raises:
        BadCheckpoint: it cannot be read, or float32 has not all of its values.
    """
    dtype = dtypes.DTYPES[tensor.dtype]
    memory = direct_io.block_memory(tensor.nbytes)[: tensor.nbytes]
    with shard.open() as source:
        source.fill(memory, tensor.start)
    if dtype.bits < BYTE or dtype.name == "C64":
        raise BadCheckpoint(f"{shard.path}: {tensor.name!r} is {dtype.name}, and no array of numbers; use another base")
    stored = np.frombuffer(memory, dtype.numpy).reshape(tensor.shape)
    values = stored.astype(np.float32)
    if dtype.bits > SURELY_EXACT and not np.array_equal(values.astype(dtype.numpy), stored, equal_nan=dtype.is_float):
        raise BadCheckpoint(f"{shard.path}: {tensor.name!r} is {dtype.name}, and float32 has not all of its values")
    return values
