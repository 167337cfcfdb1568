"""An independent re-derivation of a merge: other code, other libraries, another way to judge rounding.

The engine streams bytes by its own header reader and computes in torch. Here safetensors itself reads, numpy computes,
`expectation` finds the modules in its own way, and a value is right if it is *nearest*: no neighbour in the weight's
dtype lies closer to the float64 sum. A mistake in one is not repeated in the other.
"""

from __future__ import annotations

import filecmp
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.machine import files, progress
from lora_fuse.recipe import records
from lora_fuse.verification.expectation import Array, ExpectedDelta, Weights, read_expected

SLACK = 1 + 1e-9  # float64 sums taken in another order differ by about 1e-16 of the value
SHOWN = 20  # problems that are spelled out; the rest is counted


@dataclass(frozen=True, slots=True)
class Change:
    """The change of a target, over the rows that were looked at.

    `relative_norm` is the norm of the difference over that of the base's weights (Frobenius), `unchanged` the share of
    the weights that rounding left as they were.
    """

    relative_norm: float
    unchanged: float


@dataclass(slots=True)
class Verification:
    """The result of a verification. Empty `problems` mean that the merge is right as far as was looked.

    `notes` are no failures: a target whose difference is zero, which a real LoRA can have, and one whose difference is
    larger than the weight itself, which is rarely meant.
    """

    modules: int = 0
    targets: int = 0
    rows_checked: int = 0
    rows_total: int = 0
    tensors_untouched: int = 0
    files_untouched: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)
    changes: dict[str, Change] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True where nothing was wrong."""
        return not self.problem_count

    def problem(self, text: str) -> None:
        """Count a problem, and keep its text if it is one of the first."""
        self.problem_count += 1
        if len(self.problems) < SHOWN:
            self.problems.append(text)


@dataclass(frozen=True, slots=True)
class Expectation:
    """The expected content of the merged repository's generated files; None or empty is not looked at.

    `beside` are POSIX paths that are no part of the merge, see `lora_fuse.release.download_check`.
    """

    pipeline: str | None = None
    scheduler: Mapping[str, object] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()


def verify_merge(
    merged: Path,
    base: Path,
    loras: Sequence[LoraInput],
    *,
    component: str,
    rows: int | None,
    expected: Expectation,
    selection: Selection | None = None,
) -> Verification:
    """Compare a merged checkpoint with what the base and the LoRAs should have given; progress goes to stderr.

    As `lora_fuse.verify`, but that `rows` is None for all of them.

    Raises:
        BadCheckpoint: one side has nothing to compare.
    """
    found = Verification()
    with (
        progress.byte_progress("verify", files.total_size(merged), at_least=progress.FEW) as advance,
        ExitStack() as stack,
    ):
        base_files = weight_files(base, component)
        merged_files = weight_files(merged, component)
        base_names, merged_names = ([file.name for file in side] for side in (base_files, merged_files))
        if base_names != merged_names and base.is_dir():
            found.problem(f"shards differ: base {', '.join(base_names)}, merged {', '.join(merged_names)}")
        ours = Weights(merged_files, stack)
        theirs = Weights(base_files, stack)
        expected_sum = read_expected(loras, theirs, selection or Selection())
        found.modules = expected_sum.modules
        found.targets = len(expected_sum.deltas)
        for problem in expected_sum.problems:
            found.problem(problem)
        _check_tensors(ours, theirs, expected_sum.deltas, rows, found, advance)
        if base.is_dir():
            _check_files(merged, base, {*base_files, *merged_files}, expected, found, advance)
    return found


def weight_files(root: Path, component: str) -> list[Path]:
    """The safetensors files of a file, a component folder or a pipeline's component; those that a fuse would change.

    Raises:
        BadCheckpoint: there are none, or see `repository_files.sort_files`.
    """
    if root.is_file():
        return [root]
    folder = component if (root / repository_files.MODEL_INDEX).is_file() else ""
    return [root / name for name in repository_files.sort_folder(root, folder).shards]


def _check_tensors(
    merged: Weights,
    base: Weights,
    deltas: Mapping[str, list[ExpectedDelta]],
    rows: int | None,
    found: Verification,
    advance: Callable[[int], None],
) -> None:
    for name in sorted(base.names() ^ merged.names()):
        found.problem(f"{name} is only in the {'base' if name in base.names() else 'merged'} checkpoint")
    for name in sorted(base.names() & merged.names()):
        if name in deltas:
            _check_target(name, merged, base, deltas[name], rows, found)
        else:
            found.tensors_untouched += 1
            if not merged.same(base, name):
                found.problem(f"{name} is no target of any LoRA and differs from the base")
        advance(merged.nbytes(name))


def _check_target(
    name: str, merged: Weights, base: Weights, deltas: Sequence[ExpectedDelta], rows: int | None, found: Verification
) -> None:
    total = base.shape(name)[0]
    if merged.shape(name) != base.shape(name):
        found.problem(f"{name} has the shape {merged.shape(name)}, the base has {base.shape(name)}")
        return
    found.rows_total += total
    sums = np.zeros(4)
    for block in row_blocks(name, total, rows):
        before = base.rows(name, block).reshape(len(block), -1)
        added = np.zeros(before.shape)
        for delta in deltas:
            added += delta.rows(block, partial(base.tensor, name))
        wide = before.astype(np.float64)
        exact = wide + added
        ours = merged.rows(name, block).reshape(exact.shape)
        sums += [np.square(wide).sum(), np.square(added).sum(), (before == ours).sum(), before.size]
        wrong = ~is_nearest(ours, exact)
        found.rows_checked += len(block)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            found.problem(
                f"{name}: {int(wrong.sum())} of {wrong.size} values looked at are not base + delta rounded once, "
                f"first [{block[row]}, {column}]: {ours[row, column]!s}, expected {exact[row, column]:.9g}"
            )
            return
    found.changes[name] = change = _change(*sums.tolist())
    if change.relative_norm == 0:
        found.notes.append(f"{name}: the difference is zero in the rows looked at")
    elif change.relative_norm > 1:
        times = f"{change.relative_norm:.2g} times the weight"
        found.notes.append(f"{name}: the difference is {times}; is the scale right?")


def _change(base: float, added: float, same: float, seen: float) -> Change:
    """The change of a target, from sums of squares (the base, what is added to it) and counts (the same, all)."""
    norm = math.sqrt(added / base) if base else math.inf if added else 0.0
    return Change(records.rounded(norm), records.rounded(same / max(seen, 1)))


def row_blocks(name: str, total: int, rows: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers to look at: all of them in blocks, or the first, the last and some drawn by the tensor's name."""
    if rows is None or rows >= total:
        yield from np.array_split(np.arange(total), math.ceil(total / 256))
        return
    drawn = np.random.default_rng(zlib.crc32(name.encode())).choice(total, size=rows, replace=False)
    yield np.unique(np.concatenate([drawn[: max(rows - 2, 0)], [0, total - 1]]))


def is_nearest(values: Array, exact: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """True for each value that is the nearest of its dtype to `exact`: no further than half-way to either neighbour."""
    wide = values.astype(np.float64)
    infinity = np.array(np.inf, dtype=values.dtype)
    up = np.nextafter(values, infinity).astype(np.float64)
    down = np.nextafter(values, -infinity).astype(np.float64)
    off = exact - wide
    return np.asarray((off <= (up - wide) / 2 * SLACK) & (-off <= (wide - down) / 2 * SLACK))


def _check_files(
    merged: Path,
    base: Path,
    weights: set[Path],
    expected: Expectation,
    found: Verification,
    advance: Callable[[int], None],
) -> None:
    generated: dict[Path, Mapping[str, object]] = {}
    if expected.scheduler:
        generated[merged / "scheduler" / "scheduler_config.json"] = expected.scheduler
    if expected.pipeline is not None:
        generated[merged / "model_index.json"] = {"_class_name": expected.pipeline}
    for path, wanted in generated.items():
        _check_json(path, wanted, found)
    apart = {*weights, *generated, *(merged / name for name in expected.beside)}
    for path in sorted(merged.rglob("*")):
        if path.is_dir() or path in apart:
            continue
        twin = base / path.relative_to(merged)
        found.files_untouched += 1
        if not twin.is_file():
            found.problem(f"{path.relative_to(merged)} is not in the base and no recipe asks for it")
        elif not twin.samefile(path) and not filecmp.cmp(twin, path, shallow=False):
            found.problem(f"{path.relative_to(merged)} differs from the base's")
        advance(path.stat().st_size)


def _check_json(path: Path, wanted: Mapping[str, object], found: Verification) -> None:
    try:
        content = files.read_json(path, dict, BadCheckpoint)
    except BadCheckpoint as error:
        found.problem(str(error))
        return
    for key, value in wanted.items():
        if content.get(key) != value:
            found.problem(f"{path.name}: {key} is {content.get(key)!r}, the recipe says {value!r}")
