"""The choice of the fastest adder for a target, whose LoRA tensors are read here.

torch is imported where it is needed: its import takes longer than the fuse of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from lora_fuse.errors import naming_extras
from lora_fuse.fusion.cpu_adder import Stacked, TooLarge, stackable
from lora_fuse.fusion.pieces import PIECE, row_pieces
from lora_fuse.fusion.plan import Target
from lora_fuse.lora import Decomposed, Delta
from lora_fuse.machine import direct_io

if TYPE_CHECKING:
    import torch


# Overwrites a weight's rows in some memory, from a number on, with the merged ones. Raises `NotFinite` where the base
# holds NaN or infinity, or a sum is too large for its dtype.
Adder = Callable[[memoryview, int], None]

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
            stacked.add(np.frombuffer(data, np.uint16).reshape(-1, _columns(target)), first)
        except TooLarge:  # or nearly so: torch decides
            _torch_sum(target, deltas, "cpu")(data, first)

    return add


def _torch_sum(target: Target, deltas: list[Delta], device: str) -> Adder:
    """The adder for any deltas, on any device."""
    with naming_extras(f"{target.shard.path}: a sum as large as those of {target.tensor.name!r}"):
        sums = _torch_sums()

    def add(data: memoryview, first: int) -> None:
        sums.add_to_rows(sums.as_rows(data, target.tensor.dtype, _columns(target)), deltas, first, device)

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
                delta.measure(rows, first)
    return deltas


def _rows_of(target: Target) -> Iterator[tuple[int, torch.Tensor]]:
    """Read a target's rows from the base, in float64, block by block."""
    sums = _torch_sums()
    at = target.tensor.start
    memory = direct_io.block_memory(PIECE)
    with direct_io.open_shard(target.shard.path) as source:
        for piece in row_pieces(target):
            data = memory[: piece.nbytes]
            direct_io.read_exactly(source, data, at)
            yield piece.first_row, sums.as_rows(data, target.tensor.dtype, _columns(target)).double()
            at += piece.nbytes


def _columns(target: Target) -> int:
    return math.prod(target.tensor.shape[1:])
