"""The fuse of one shard whose targets are quantised again: the layout stays, and only their codes and scales differ.

A weight is quantised from the exact sum in float32. What that costs is measured against the change that was meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Shard, TensorInfo
from lora_fuse.checkpoint.stored import StoredMatrix, decode_rows, encode, with_entry
from lora_fuse.errors import BadCheckpoint, Refused, Unquantisable
from lora_fuse.fusion.adder import ExactSums, base_rows, read_sum
from lora_fuse.fusion.pieces import PIECE, row_pieces
from lora_fuse.fusion.plan import Plan, Target
from lora_fuse.fusion.stream import FuseOptions, Progress, Share, Stopped, refuse_other_content
from lora_fuse.machine import FileRecord, direct_io, files
from lora_fuse.recipe import records

Float32 = npt.NDArray[np.float32]

# A cosine of the change that is left. Noise as strong as half the change has .82, a fifth .91. At an update of 5 % of
# the weights Q8_0 and int8 leave .99, float8 .88, 4 bits less than .63.
LEAST_KEPT = 0.9


@dataclass(slots=True)
class Costs:
    """Sums over each target that was quantised again: energies of noise, change and kept change, and their product.

    `least` is the cosine of kept and meant change, over all, below which the result is refused.
    """

    least: float = LEAST_KEPT
    by_target: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)

    def add(self, name: str, parts: Iterable[tuple[Float32, Float32, Float32]]) -> None:
        """Take in a target by its rows: the base's values, the exact sum, and what the new codes stand for."""
        sums = np.zeros(4)
        for before, meant, stored in parts:
            change = meant.astype(np.float64) - before
            kept = stored.astype(np.float64) - before
            products = (np.square(kept - change), np.square(change), np.square(kept), change * kept)
            sums += [float(product.sum()) for product in products]
        noise, meant_energy, kept_energy, product = sums.tolist()
        self.by_target[name] = (noise, meant_energy, kept_energy, product)

    @property
    def total(self) -> records.Requantised:
        """The cost over all targets."""
        ordered = [self.by_target[name] for name in sorted(self.by_target)]
        noise, change, kept, product = (math.fsum(column) for column in zip(*ordered, strict=True))
        cosine = product / math.sqrt(change * kept) if change and kept else 0.0
        return records.Requantised(records.rounded(cosine), records.rounded(noise / change) if change else 0.0)

    def refuse_too_much(self) -> None:
        """Refuse a result that has lost too much of the change.

        Raises:
            Refused: the cosine over all targets is below it.
        """
        total = self.total
        if total.cosine < self.least:
            cosines = {name: _cosine(sums) for name, sums in self.by_target.items()}
            worst = min(cosines, key=cosines.__getitem__)
            raise Refused(
                f"quantised again, {total.cosine:.3f} of the LoRA is left (cosine; noise {total.noise_over_change:.2g} "
                f"of its energy), at least {self.least:g} is wanted, and {worst!r} has {cosines[worst]:.3f}: leave "
                "--requantise out for BF16, keep the LoRA beside the codes with --side-channel, or take "
                "--force-quantised; nothing was written"
            )


def _cosine(sums: tuple[float, float, float, float]) -> float:
    _, change, kept, product = sums
    return product / math.sqrt(change * kept) if change and kept else 0.0


def fused_header(shard: Shard, plan: Plan) -> bytes:
    """All of a shard before its tensors, which says what was fused; tensors stay at their distances from it.

    Raises:
        BadCheckpoint: see `Header.with_metadata`.
    """
    if shard.is_gguf:
        return with_entry(shard.header, plan.entry, plan.provenance)
    return shard.header.with_metadata(plan.entry, plan.provenance)


@dataclass(slots=True)
class _Made:
    """The parts of targets that were quantised again: the last codes, and all scales, which are small."""

    name: str = ""
    codes: memoryview = field(default_factory=lambda: memoryview(b""))
    scales: dict[str, memoryview] = field(default_factory=dict)


class Requantiser:
    """As `ShardFuser`, for a plan whose targets are quantised again."""

    def __init__(self, plan: Plan, way: FuseOptions, share: Share, progress: Progress, costs: Costs) -> None:
        """Begin with nothing; `costs` are told of each target, `progress` of what is written."""
        self._plan = plan
        self._way = way
        self._windows = share.windows
        self._progress = progress
        self._costs = costs
        self._sums = ExactSums(plan)
        self._one = Lock()  # a whole matrix is in memory, one at a time
        self._owners = {
            matrix.scale.tensor.name: name
            for name, target in plan.targets.items()
            if (matrix := target.stored) is not None and matrix.scale is not None
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to end."""

    def fuse(self, shard: Shard, to: Path) -> FileRecord:
        """Write the shard with its targets quantised again to `to`, hashing on the way.

        Raises:
            BadCheckpoint, Stopped: see `ShardFuser.fuse`; or a target cannot be held by its format.
        """
        if (pinned := self._way.pinned.get(shard.relative)) is not None:
            refuse_other_content(shard.path, files.hash_file(shard.path).sha256, pinned)
        made = _Made()
        size = shard.path.stat().st_size
        with (
            shard.open() as source,
            direct_io.HashingWriter(to, self._progress, self._way.direct, self._windows) as output,
        ):
            output.append(fused_header(shard, self._plan))
            at = len(shard.header.raw)
            for tensor in shard.header.tensors.values():
                for block in _blocks(source, at, tensor.start):
                    output.append(block)
                if (part := self._part(tensor, made)) is not None:
                    output.append(part)
                    at = tensor.end
                else:
                    at = tensor.start
                if self._way.stop.is_set():
                    raise Stopped
            for block in _blocks(source, at, size):
                output.append(block)
            return output.finish()

    def finish_measuring(self) -> None:
        """Quantise the targets that an earlier run has written, to know what that cost, and refuse what is too much.

        Raises:
            Refused: see `Costs.refuse_too_much`.
        """
        for name, target in self._plan.targets.items():
            if target.stored is not None and f"{self._plan.prefix}{name}" not in self._costs.by_target:
                self._encode(name, target.stored)
        self._costs.refuse_too_much()

    def _part(self, tensor: TensorInfo, made: _Made) -> memoryview | None:
        """The new bytes of a tensor: codes or scales of a target, or a target that is none; None for all else."""
        owner = self._owners.get(tensor.name, tensor.name)
        target = self._plan.targets.get(owner)
        if target is None:
            return None
        if target.stored is None:
            return self._plain(target)
        if made.name != owner and tensor.name not in made.scales:
            matrix, made.codes = self._encode(owner, target.stored)
            made.name = owner
            if matrix.scale is not None and matrix.scales is not None:
                made.scales[matrix.scale.tensor.name] = _bytes_of(matrix.scales)
        return made.codes if tensor.name == owner else made.scales[tensor.name]

    def _plain(self, target: Target) -> memoryview:
        """A target beside codes that is in plain numbers, a bias say; it is small."""
        data = bytearray(target.tensor.nbytes)
        with target.shard.open() as source:
            source.fill(memoryview(data), target.tensor.start)
        read_sum(target, "cpu")(memoryview(data), 0)
        return memoryview(data)

    def _encode(self, name: str, stored: StoredMatrix) -> tuple[StoredMatrix, memoryview]:
        target = self._plan.targets[name]
        with self._one:
            meant = self._sums.matrix(name).reshape(stored.shape[0], -1)
            try:
                matrix, codes = encode(stored, meant)
            except Unquantisable as error:
                where = f"{target.shard.path}: {name!r} with the LoRA"
                raise BadCheckpoint(f"{where}: {error}; leave --requantise out") from error
            self._costs.add(f"{self._plan.prefix}{name}", _compared(target, matrix, meant, codes))
            return matrix, _bytes_of(codes)


def _compared(
    target: Target, matrix: StoredMatrix, meant: Float32, codes: npt.NDArray[np.uint8]
) -> Iterator[tuple[Float32, Float32, Float32]]:
    """Rows of the base, of the exact sum and of what codes stand for."""
    end = 0
    with target.shard.open() as source:
        for piece in row_pieces(target):
            data = memoryview(bytearray(piece.nbytes))
            start = end
            end += piece.nbytes
            source.fill(data, target.tensor.start + start)
            before = base_rows(target, data, piece.first_row).numpy()
            stored = decode_rows(matrix, codes[start:end], piece.first_row)
            yield before, meant[piece.first_row : piece.first_row + len(before)], stored


def _bytes_of(array: npt.NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _blocks(source: direct_io.ByteSource, start: int, end: int) -> Iterator[memoryview]:
    """Bytes of the base, as they are."""
    for at in range(start, end, PIECE):
        data = memoryview(bytearray(min(PIECE, end - at)))
        source.fill(data, at)
        yield data
