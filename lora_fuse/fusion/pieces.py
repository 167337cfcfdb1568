"""A shard's data cut into windows of memory, and those into runs of bytes that one thread changes each. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_fuse.checkpoint import Shard
from lora_fuse.fusion.plan import Target

PIECE = 4 << 20  # bytes; four fill a window


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes of a shard: whole rows of one target, or nothing to change."""

    nbytes: int
    target: Target | None = None
    first_row: int = 0


def windows(shard: Shard, targets: Mapping[str, Target], nbytes: int) -> Iterator[list[Piece]]:
    """Cut a shard's data, in file order, into runs of pieces that have at most `nbytes` together."""
    window: list[Piece] = []
    room = nbytes
    for piece in _pieces(shard, targets):
        if piece.nbytes > room:
            yield window
            window = []
            room = nbytes
        window.append(piece)
        room -= piece.nbytes
    yield window


def _pieces(shard: Shard, targets: Mapping[str, Target]) -> Iterator[Piece]:
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
    for start in range(0, nbytes, PIECE):
        yield Piece(min(PIECE, nbytes - start))


def row_pieces(target: Target) -> Iterator[Piece]:
    """The pieces of one target, in order."""
    rows = target.tensor.shape[0]
    row_bytes = target.tensor.nbytes // rows
    block = max(1, PIECE // row_bytes)
    for first in range(0, rows, block):
        yield Piece(min(block, rows - first) * row_bytes, target, first)
