"""An independent re-derivation of a merge: other code, other libraries, another way to judge rounding.

The engine streams bytes by its own header reader and computes in torch. Here safetensors itself reads, numpy computes,
`expectation` finds the modules in its own way, and a value is right if it is *nearest*: no neighbour in the weight's
dtype lies closer to the float64 sum. A mistake in one is not repeated in the other.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lora_fuse.errors import BadCheckpoint
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.machine import files, progress
from lora_fuse.recipe import records
from lora_fuse.verification.expectation import ExpectedDelta, read_expected
from lora_fuse.verification.weights import Array, Weights, drawn_rows, row_blocks, weight_files
from lora_fuse.verification.whole_files import compare_files, sort_base

SLACK = 1 + 1e-9  # float64 sums taken in another order differ by about 1e-16 of the value
# A tensor beside a weight that says its numbers are not yet the weight: they are multiplied, or quantised.
SCALE = re.compile(r"(?P<module>.+)\.(?:scale_weight|weight_scale\w*|weight_zero_point|comfy_quant|weight\..+)")
FLOATS = ("F16", "BF16", "F32", "F64")
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
class DrawnRows:
    """The rows that were drawn at random: the seed draws them again. They are beside those that are measured."""

    seed: int
    rows: int = 0


@dataclass(slots=True)
class Verification:
    """The result of a verification. Empty `problems` mean that the merge is right as far as was looked.

    `rows_checked` are those that the measurements are of, the same in every run, and `drawn` as many more that no
    engine can know before; None where all rows were looked at. `notes` are no failures: a target whose difference is
    zero, which a real LoRA can have, and one whose difference is larger than the weight itself, which is rarely meant.
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
    drawn: DrawnRows | None = None

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
    """The expected files of the merged repository beside the weights.

    `pipeline` and `scheduler` are the recipe's changes; without them the base's are expected. `beside` are POSIX paths
    that are no part of the merge, see `lora_fuse.release.download_check`. `base_files` are those that the base's lock
    has, all of which are taken; without a lock they are what lies there. `generated` are those that the manifest says
    were made anew.
    """

    pipeline: str | None = None
    scheduler: Mapping[str, object] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    base_files: frozenset[str] | None = None
    generated: frozenset[str] = frozenset()


def verify_merge(  # noqa: PLR0913 - by keyword, each is a choice of its own
    merged: Path,
    base: Path,
    loras: Sequence[LoraInput],
    *,
    component: str,
    rows: int | None,
    expected: Expectation,
    selection: Selection | None = None,
    seed: int | None = None,
) -> Verification:
    """Compare a merged checkpoint with what the base and the LoRAs should have given; progress goes to stderr.

    As `lora_fuse.verify`, but that `rows` is None for all of them.

    Raises:
        BadCheckpoint: one side has nothing to compare, is of another kind, or cannot be read.
        BadLora: a LoRA cannot be read.
    """
    _refuse_other_kinds(merged, base)
    found = Verification()
    if rows is not None:
        found.drawn = DrawnRows(secrets.randbits(32) if seed is None else seed)
    with (
        progress.byte_progress("verify", files.total_size(merged), at_least=progress.FEW) as advance,
        ExitStack() as stack,
    ):
        shards = sort_base(base, component, expected.base_files) if base.is_dir() else None
        base_files = [base / name for name in shards.shards] if shards else [base]
        merged_files = [merged / path.relative_to(base) for path in base_files]
        merged_files = [path for path in merged_files if path.is_file()] or weight_files(merged, component)
        ours = Weights(merged_files, stack)
        theirs = Weights(base_files, stack)
        expected_sum = read_expected(loras, theirs, selection or Selection())
        found.modules = expected_sum.modules
        found.targets = len(expected_sum.deltas)
        for problem in expected_sum.problems:
            found.problem(problem)
        _check_metadata(ours, theirs, found)
        _check_tensors(ours, theirs, expected_sum.deltas, rows, found, advance)
        if shards is not None:
            fused = {path.relative_to(merged).as_posix() for path in merged_files}
            found.files_untouched, problems = compare_files(merged, base, fused, shards, expected, advance)
            for problem in problems:
                found.problem(problem)
    return found


def _refuse_other_kinds(merged: Path, base: Path) -> None:
    """Refuse two places of which one is not there, or is a folder and the other a file."""
    for place in (merged, base):
        if not place.exists():
            raise BadCheckpoint(f"no such file or folder: {place}")
    kinds = ["a folder" if place.is_dir() else "a file" for place in (merged, base)]
    if kinds[0] != kinds[1]:
        raise BadCheckpoint(f"{merged} is {kinds[0]}, and its base {base} {kinds[1]}; name two of one kind")


def _check_metadata(merged: Weights, base: Weights, found: Verification) -> None:
    """Compare what the headers say beside tensors: a merge may add entries, and loses and changes none."""
    pairs = zip(sorted(merged.metadata.items()), sorted(base.metadata.items()), strict=False)
    for (name, ours), (_, theirs) in pairs:
        for key in sorted(key for key, value in theirs.items() if ours.get(key) != value):
            found.problem(f"{name}: its header says {key} {ours.get(key)!r}, the base's {theirs[key]!r}")


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
    scales = {f"{match['module']}.weight": match[0] for match in map(SCALE.fullmatch, base.names()) if match}
    for name in sorted(deltas.keys() & scales.keys()):
        found.problem(
            f"{name} is no plain weight in the base: {scales[name]} goes with it, so the sum is of other numbers"
        )
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
    if merged.dtype(name) != base.dtype(name) or base.dtype(name) not in FLOATS:
        found.problem(f"{name} is {merged.dtype(name)}, the base's {base.dtype(name)}; sums are rounded to {FLOATS}")
        return
    found.rows_total += total
    sums = np.zeros(4)
    for measured in row_blocks(name, total, rows):
        block = measured
        if found.drawn is not None and rows is not None and len(measured) < total:
            drawn = drawn_rows(found.drawn.seed, name, total, rows, measured)
            found.drawn.rows += len(drawn)
            block = np.concatenate([measured, drawn])
        before = base.rows(name, block).reshape(len(block), -1)
        added = np.zeros(before.shape)
        try:
            for delta in deltas:
                added += delta.rows(block, partial(base.tensor, name))
        except (ValueError, IndexError) as error:
            found.problem(f"{name}: a delta does not fit {base.shape(name)}: {error}")
            return
        wide = before.astype(np.float64)
        exact = wide + added
        ours = merged.rows(name, block).reshape(exact.shape)
        parts = np.square(wide), np.square(added), before == ours, np.ones(before.shape)
        sums += [part[: len(measured)].sum() for part in parts]
        wrong = ~is_nearest(ours, exact)
        found.rows_checked += len(measured)
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


def is_nearest(values: Array, exact: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """True for each value that is the nearest of its dtype to `exact`: no further than half-way to either neighbour."""
    wide = values.astype(np.float64)
    infinity = np.array(np.inf, dtype=values.dtype)
    up = np.nextafter(values, infinity).astype(np.float64)
    down = np.nextafter(values, -infinity).astype(np.float64)
    off = exact - wide
    return np.asarray((off <= (up - wide) / 2 * SLACK) & (-off <= (wide - down) / 2 * SLACK))
