"""Two checkpoints of one model side by side: every weight of both, whatever it is called there, some rows at a time.

Names are the base's. The other checkpoint may have those, or the other spelling of the family (`lora_fuse.models`),
where a weight may be rows of several. Memory does not grow with the model: headers are read first, and then pieces of
at most `PIECE` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Checkpoint, Shard, TensorInfo, dtypes, open_checkpoint, repository_files
from lora_fuse.checkpoint.stored import StoredMatrix, decode_rows
from lora_fuse.errors import BadCheckpoint
from lora_fuse.machine import direct_io, text
from lora_fuse.models import name_maps
from lora_fuse.recipe import hf_cache

if TYPE_CHECKING:
    from lora_fuse.hub import streamed_base

Values = npt.NDArray[np.floating]
Rows = npt.NDArray[np.int64]

PIECE = 8 << 20  # bytes of float32 that a piece of one side is at most, unless one row is more


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A weight as it lies in one checkpoint, as a matrix: what is behind the first dimension is flattened.

    `codes` says how to read one that is codes. `dtype` is None for those, and else the header's name.
    """

    shard: Shard
    tensor: TensorInfo
    codes: StoredMatrix | None = None

    @property
    def dtype(self) -> str | None:
        """The dtype of plain floats or integers."""
        return None if self.codes else self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight itself, of codes too."""
        return self.codes.shape if self.codes else self.tensor.shape

    @property
    def rows(self) -> int:
        """Rows of the matrix; 1 of a single number."""
        return self.shape[0] if self.shape else 1

    def read(self, runs: Sequence[tuple[int, int]]) -> list[Values]:
        """Read runs of rows, each a first one and a number, (number, columns) each; exact for floats.

        They are float32, or float64 where they are stored so.

        Raises:
            BadCheckpoint: the file cannot be read, or has ended.
            BadSource: the Hub that it is on cannot be had.
        """
        place = self.codes.codes.tensor if self.codes else self.tensor
        row_bytes = place.nbytes // self.rows
        memories = [direct_io.block_memory(count * row_bytes)[: count * row_bytes] for _, count in runs]
        starts = [place.start + first * row_bytes for first, _ in runs]
        if self.shard.streamed is not None:
            self.shard.streamed.read(self.shard.relative, list(zip(memories, starts, strict=True)))
        else:
            with direct_io.open_shard(self.path) as file:
                for memory, start in zip(memories, starts, strict=True):
                    file.fill(memory, start)
        return [self._values(memory, *run) for memory, run in zip(memories, runs, strict=True)]

    def _values(self, memory: memoryview, first: int, count: int) -> Values:
        if self.codes is not None:
            return decode_rows(self.codes, np.frombuffer(memory, np.uint8), first).reshape(count, -1)
        values = np.frombuffer(memory, dtypes.DTYPES[self.tensor.dtype].numpy).reshape(count, -1)
        return values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in its file."""
        return (self.codes.codes.tensor if self.codes else self.tensor).nbytes

    def is_in_place_of(self, other: StoredRows) -> bool:
        """True for the same bytes of one file."""
        return self.tensor == other.tensor and self.codes is None and self.path.samefile(other.path)

    @property
    def path(self) -> Path:
        """The file that it lies in."""
        return self.codes.codes.path if self.codes else self.shard.path


@dataclass(frozen=True, slots=True)
class RowShare:
    """Rows of a weight of the base, from `first` on, that are as many rows of one of the other checkpoint."""

    first: int
    rows: int
    stored: StoredRows
    source: int


@dataclass(frozen=True, slots=True)
class RowPiece:
    """Some rows of a weight in both checkpoints, (n, columns) each; `first` is the number of the first."""

    first: int
    base: Values
    other: Values

    def in_parts(self, values: int) -> Iterator[RowPiece]:
        """Cut it into pieces of so many values at most, unless one row is more."""
        count = max(1, values // max(1, self.base.shape[1]))
        for start in range(0, len(self.base), count):
            part = slice(start, start + count)
            yield RowPiece(self.first + start, self.base[part], self.other[part])


@dataclass(frozen=True, slots=True)
class PairedTensor:
    """A weight that both checkpoints have: `name` is the base's, as a LoRA has it, `component` that of a pipeline.

    `parts` are its rows in the other checkpoint, in order and without holes.
    """

    name: str
    base: StoredRows
    parts: tuple[RowShare, ...]
    component: str = ""

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.base.rows

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.base.shape[1:])

    @property
    def size(self) -> int:
        """Number of values."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of both sides."""
        parts = (part.stored.nbytes * part.rows // part.stored.rows for part in self.parts)
        return self.base.nbytes + sum(parts)

    @property
    def is_shared(self) -> bool:
        """True where both sides are the same bytes of one file, under one name or two."""
        (*parts,) = ((part.stored, part.source) for part in self.parts)
        return len(parts) == 1 and parts[0][1] == 0 and self.base.is_in_place_of(parts[0][0])

    @property
    def dtype(self) -> str | None:
        """The dtype of the other checkpoint by a header's name; None of codes, and where its parts differ."""
        found = {part.stored.dtype for part in self.parts}
        return found.pop() if len(found) == 1 else None

    def pieces(self, nbytes: int = PIECE) -> Iterator[RowPiece]:
        """Read all rows of both, in order.

        Raises:
            BadCheckpoint: a file cannot be read.
        """
        block = max(1, nbytes // (4 * max(1, self.columns)))
        for part in self.parts:
            for start in range(0, part.rows, block):
                yield from self._pieces(part, [(start, min(block, part.rows - start))])

    def read(self, rows: Rows) -> RowPiece:
        """Read some rows, by their numbers in rising order; `RowPiece.first` is the first of them.

        Raises:
            BadCheckpoint: a file cannot be read.
        """
        found: list[RowPiece] = []
        for part in self.parts:
            own = rows[(rows >= part.first) & (rows < part.first + part.rows)] - part.first
            runs = np.split(own, np.flatnonzero(np.diff(own) != 1) + 1)
            found += self._pieces(part, [(int(run[0]), len(run)) for run in runs if len(run)])
        both = [np.concatenate([getattr(piece, side) for piece in found]) for side in ("base", "other")]
        return RowPiece(found[0].first, *both)

    def _pieces(self, part: RowShare, runs: Sequence[tuple[int, int]]) -> Iterator[RowPiece]:
        """Runs of a share's rows in both checkpoints, by first row and number."""
        bases = self.base.read([(part.first + start, count) for start, count in runs])
        others = part.stored.read([(part.source + start, count) for start, count in runs])
        for (start, _), base, other in zip(runs, bases, others, strict=True):
            for stored, values in ((self.base, base), (part.stored, other)):
                if not np.isfinite(values).all():
                    raise BadCheckpoint(
                        f"{stored.path}: {stored.tensor.name!r} holds NaN or infinity, of which no differences are "
                        "taken; get a good copy"
                    )
            yield RowPiece(part.first + start, base, other)


@dataclass(frozen=True, slots=True)
class PairedCheckpoints:
    """A checkpoint and its base: the weights that both have, in the base's order, and names that only one has.

    `sources` are what both are on the Hub, ``owner/name@commit``, where that is known.
    """

    other: Path
    base: Path
    sources: tuple[str | None, str | None]
    tensors: tuple[PairedTensor, ...]
    only_base: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None  # of the other's headers

    @property
    def names(self) -> tuple[str, str]:
        """Both, for a person: by `sources`, or else by their places."""
        return self.sources[0] or str(self.other), self.sources[1] or str(self.base)

    @property
    def nbytes(self) -> int:
        """Bytes of both sides that are read when all weights are."""
        stored = [one for tensor in self.tensors for one in (tensor.base, *(part.stored for part in tensor.parts))]
        places = {(one.path, place.start): place.nbytes for one in stored for place in [_place(one)]}
        return sum(places.values())


def _place(stored: StoredRows) -> TensorInfo:
    return stored.codes.codes.tensor if stored.codes else stored.tensor


@contextmanager
def opened(*places: Path | str) -> Iterator[list[Path | streamed_base.StreamedBase]]:
    """Places as `text.place` has them: a folder or file as it is, and a pipeline on the Hub opened for as long.

    Raises:
        BadSource, BadCheckpoint: see `streamed_base.open_streamed`.
    """
    with ExitStack() as stack:
        found: list[Path | streamed_base.StreamedBase] = []
        for place in places:
            if isinstance(place, Path):
                found.append(place)
                continue
            from lora_fuse.hub import streamed_base

            found.append(stack.enter_context(streamed_base.open_streamed(place)))
        yield found


def open_pair(other: Path | streamed_base.StreamedBase, base: Path | streamed_base.StreamedBase) -> PairedCheckpoints:
    """Open a checkpoint and its base from their headers: pipelines, components or single files, each of any kind.

    A pipeline may be on the Hub: of its weights what is asked for is read there, and only then. Nobody checks a sha256.

    Of two pipelines, all components with weights that both have; else the main one.

    Raises:
        BadCheckpoint: one cannot be opened, both are the same place, or they are of two architectures; a weight is
            quantised in a way that is not decoded, or is no number.
    """
    roots = [place if isinstance(place, Path) else place.root for place in (other, base)]
    for root in roots:
        if not root.exists():
            raise BadCheckpoint(f"no such file or folder: {root}")
    names = [str(place) if isinstance(place, Path) else place.lock.label for place in (other, base)]
    if roots[0].samefile(roots[1]) or names[0] == names[1]:
        raise BadCheckpoint(
            f"{names[0]} and {names[1]} are one place; name the checkpoint, and the base that it came from"
        )
    sides = [_opened(place) for place in (other, base)]
    shared = [name for name in sides[1] if name in sides[0]]
    if len(sides[0]) == 1 or len(sides[1]) == 1 or not shared:
        mains = [next(iter(side.values())) for side in sides]
        pairs = [_pair("", *mains)]
    else:
        pairs = [_pair(name if name != shared[0] else "", sides[0][name], sides[1][name]) for name in shared]
    tensors = tuple(tensor for pair in pairs for tensor in pair.tensors)
    return PairedCheckpoints(
        roots[0],
        roots[1],
        (_source(other), _source(base)),
        tensors,
        tuple(name for pair in pairs for name in pair.only_base),
        tuple(name for pair in pairs for name in pair.only_other),
        {key: value for pair in pairs for key, value in (pair.metadata or {}).items()},
    )


def _source(place: Path | streamed_base.StreamedBase) -> str | None:
    return hf_cache.cached_at(place.absolute()) if isinstance(place, Path) else place.lock.label


def _opened(place: Path | streamed_base.StreamedBase) -> dict[str, Checkpoint]:
    """The components of a checkpoint that have weights, the main one first; one of ``""`` where it is no pipeline."""
    root, streamed = (place, None) if isinstance(place, Path) else (place.root, place.files)
    there = repository_files.component_names(root)
    if not there:
        return {"": open_checkpoint(root)}
    main = repository_files.main_component(there)
    names = repository_files.list_files(root)
    more = sorted(
        folder
        for folder in there - {main}
        if any(name.startswith(f"{folder}/") and repository_files.is_weights(name) for name in names)
    )
    first = open_checkpoint(root, main, more=more, streamed=streamed)
    return {one.component: one for one in (first, *first.further)}


def _pair(component: str, other: Checkpoint, base: Checkpoint) -> PairedCheckpoints:
    """PairedCheckpoints the weights of one component."""
    ours = _weights(other)
    theirs = _weights(base)
    rows = {name: stored.rows for name, stored in ours.items()}
    maps = sorted(name_maps.maps(), key=lambda known: -known.covers(list(ours)))
    paired = []
    used = set()
    missing = []
    for name, stored in theirs.items():
        parts = _parts(name, ours, rows, maps)
        if parts is None:
            missing.append(name)
            continue
        _check_fit(name, stored, parts, other, base)
        used |= {part.stored.tensor.name for part in parts}
        shown = f"{component}/{name}" if component else name
        paired.append(PairedTensor(shown, stored, parts, component))
    left = [name for name, stored in ours.items() if stored.tensor.name not in used]
    if 2 * len(paired) < len(theirs) or not paired:
        _refuse_architecture(missing, left, len(theirs), other, base)
    metadata = {key: value for shard in other.shards for key, value in shard.header.metadata.items()}
    return PairedCheckpoints(other.root, base.root, (None, None), tuple(paired), tuple(missing), tuple(left), metadata)


def _weights(checkpoint: Checkpoint) -> dict[str, StoredRows]:
    """The weights of a component by name, without what lies beside codes and what has no values.

    Raises:
        BadCheckpoint: a weight is quantised and not decoded, or its dtype is no number's.
    """
    stored = checkpoint.stored()
    for error in stored.refused.values():
        raise error
    shards = {name: shard for shard in checkpoint.shards for name in shard.header.tensors}
    found = {}
    seen = set()
    for name, tensor in checkpoint.parameters().items():  # one of a single file has two names, the shorter first
        if tensor.name in seen or tensor.name in stored.beside or not tensor.nbytes:
            continue
        seen.add(tensor.name)
        codes = stored.matrices.get(tensor.name)
        if codes is None and tensor.dtype not in dtypes.ROUNDABLE and not _is_whole_number(tensor):
            raise BadCheckpoint(
                f"{shards[tensor.name].path}: {tensor.name!r} is {tensor.dtype}, of which no differences are taken; "
                f"name a checkpoint in {', '.join(dtypes.ROUNDABLE)}"
            )
        found[name] = StoredRows(shards[tensor.name], tensor, codes)
    return found


def _is_whole_number(tensor: TensorInfo) -> bool:
    return not dtypes.DTYPES[tensor.dtype].is_float


def _parts(
    name: str,
    ours: Mapping[str, StoredRows],
    rows: Mapping[str, int],
    maps: Sequence[name_maps.NameMap],
) -> tuple[RowShare, ...] | None:
    """The rows of a weight of the base in the other checkpoint; None where that has them not."""
    if name in ours:
        return (RowShare(0, ours[name].rows, ours[name], 0),)
    for known in maps:
        try:
            runs = known.translate(name, rows)
        except ValueError:  # rows that cannot be cut in the map's shares: another model's
            continue
        if runs is not None:
            parts = [RowShare(run.source, run.rows, ours[place], run.start) for place in runs for run in runs[place]]
            return tuple(sorted(parts, key=lambda part: part.first))
    return None


def _check_fit(name: str, stored: StoredRows, parts: Sequence[RowShare], other: Checkpoint, base: Checkpoint) -> None:
    """Refuse a weight that has another shape in the other checkpoint.

    Raises:
        BadCheckpoint: so it is.
    """
    columns = {math.prod(part.stored.shape[1:]) for part in parts}
    rows = sum(part.rows for part in parts)
    if rows == stored.rows and columns == {math.prod(stored.shape[1:])}:
        return
    shapes = " and ".join("x".join(map(str, part.stored.shape)) or "a number" for part in parts)
    raise BadCheckpoint(
        f"{other.root}: {name!r} is {shapes}, and in {base.root} {'x'.join(map(str, stored.shape)) or 'a number'}: "
        "two architectures; name the base that the checkpoint came from"
    )


def _refuse_architecture(
    missing: Sequence[str], left: Sequence[str], count: int, other: Checkpoint, base: Checkpoint
) -> None:
    """Refuse two checkpoints with few names in common.

    Raises:
        BadCheckpoint: always.
    """
    if not missing:
        raise BadCheckpoint(f"{base.root} has no weights; name the base that {other.root} came from")
    first = missing[0]
    near = text.nearest(first, left)
    hint = f" (nearest there: {near[0]!r})" if near else ""
    families = name_maps.made_for([[name] for name in left], list(missing))
    raise BadCheckpoint(
        f"{other.root} has not {len(missing)} of the {count} weights of {base.root}, first {first!r}{hint}{families}: "
        "two architectures; name the base that the checkpoint came from"
    )
