"""A shard's data cut into runs of bytes that go through one buffer each. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_fuse.checkpoint import Shard
from lora_fuse.fusion.plan import Target

BUFFER = 8 << 20  # bytes; one buffer


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes of a shard: whole rows of one target, or nothing to change."""

    nbytes: int
    target: Target | None = None
    first_row: int = 0


def pieces(shard: Shard, targets: dict[str, Target]) -> Iterator[Piece]:
    """Cut a shard's data, in file order, into pieces of at most one buffer."""
    untouched = 0
    for name, tensor in shard.header.tensors.items():
        if name not in targets:
            untouched += tensor.nbytes
            continue
        yield from _copies(untouched)
        untouched = 0
        yield from row_pieces(targets[name])
    yield from _copies(untouched)


def _copies(nbytes: int) -> Iterator[Piece]:
    for start in range(0, nbytes, BUFFER):
        yield Piece(min(BUFFER, nbytes - start))


def row_pieces(target: Target) -> Iterator[Piece]:
    """The pieces of one target, in order."""
    rows = target.tensor.shape[0]
    row_bytes = target.tensor.nbytes // rows
    block = max(1, BUFFER // row_bytes)
    for first in range(0, rows, block):
        yield Piece(min(block, rows - first) * row_bytes, target, first)
