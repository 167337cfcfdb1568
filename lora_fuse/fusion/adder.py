"""What is added to a target: its LoRAs' tensors are read, and the quickest way to add them is chosen.

torch is imported where it is needed: its import takes longer than the fuse of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_fuse.checkpoint import dtypes
from lora_fuse.errors import naming_extras
from lora_fuse.fusion.cpu_adder import Stacked, TooLarge, stackable
from lora_fuse.fusion.pieces import BUFFER, row_pieces
from lora_fuse.fusion.plan import Target
from lora_fuse.lora import deltas
from lora_fuse.machine import direct_io

if TYPE_CHECKING:
    import torch


class Adder(Protocol):
    """Adds the differences of one target to rows of it."""

    def add(self, data: memoryview, first: int) -> None:
        """Overwrite the weight's rows in `data`, from number `first` on, with the merged ones.

        Raises:
            NotFinite: the base holds NaN or infinity there, or a sum is too large for its dtype.
        """


class CpuAdder:
    """The way of `lowrank`; where a sum may be too large for the dtype, torch finds out whether it is."""

    def __init__(self, target: Target, differences: list[deltas.Difference], stacked: Stacked) -> None:
        self._target, self._differences, self._stacked = target, differences, stacked

    def add(self, data: memoryview, first: int) -> None:
        """See `Adder`."""
        try:
            self._stacked.add(np.frombuffer(data, np.uint16).reshape(-1, _columns(self._target)), first)
        except TooLarge:
            torch_sum(self._target, self._differences, "cpu").add(data, first)


def read_sum(target: Target, device: str) -> Adder:
    """What is added to a target, which is read once; `device` is ``cpu`` or ``cuda``."""
    differences = read_differences(target)
    products = stackable(differences, target.tensor.dtype) if device == "cpu" else None
    if products:
        return CpuAdder(target, differences, Stacked(products, target.tensor.dtype))
    return torch_sum(target, differences, device)


def torch_sum(target: Target, differences: list[deltas.Difference], device: str) -> Adder:
    """Any differences, by torch."""
    with naming_extras(f"{target.shard.path}: a sum as large as those of {target.tensor.name!r}"):
        from lora_fuse.fusion.torch_adder import TorchSum

    return TorchSum(differences, target.tensor.dtype, _columns(target), device)


def read_differences(target: Target) -> list[deltas.Difference]:
    """The differences of all terms; those that need to know the whole weight have seen it.

    Raises:
        BadCheckpoint: the base shard ended early.
    """
    found = [
        deltas.difference(term.update.format.algorithm, term.lora.read(term.update), term.update.factor, term.scale)
        for term in target.terms
    ]
    for one in found:
        if isinstance(one, deltas.Decomposed) and one.by_column:
            for first, rows in _rows_of(target):
                one.measure(rows, first)
    return found


def _rows_of(target: Target) -> Iterator[tuple[int, torch.Tensor]]:
    """A target's rows as the base has them, in float64, block by block."""
    from lora_fuse.fusion.torch_adder import as_rows

    at, memory = target.tensor.start, direct_io.block_memory(BUFFER)
    with direct_io.open_shard(target.shard.path) as source:
        for piece in row_pieces(target):
            data = direct_io.read_exactly(source, memory, at, piece.nbytes)
            yield piece.first_row, as_rows(data, dtypes.DTYPES[target.tensor.dtype].torch, _columns(target)).double()
            at += piece.nbytes


def _columns(target: Target) -> int:
    return math.prod(target.tensor.shape[1:])
