"""An independent re-derivation of a merge: other code, other libraries, another way to judge rounding.

The engine streams shards by its own header reader and rounds exact sums. Here safetensors opens the files, numpy
computes, `expectation` finds the modules in its own way, and a value is right if it is *nearest*: no neighbour in the
weight's dtype lies closer to the float64 sum. A mistake in one is not repeated in the other.

Every target, and every piece of what should be the base's, is a task of its own; the result does not depend on who
is first.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import BadCheckpoint
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.machine import FileRecord, direct_io, file_state, files, progress
from lora_fuse.verification.byte_comparison import pieces
from lora_fuse.verification.coded_weights import (
    CodedTensor,
    ConvertedTensor,
    decoded,
    open_weights,
    read_codes,
    requantised,
)
from lora_fuse.verification.components import Components, find_components
from lora_fuse.verification.expectation import ExpectedDelta
from lora_fuse.verification.kept_beside import compare_kept, is_kept_beside
from lora_fuse.verification.nearest import FLOATS
from lora_fuse.verification.target_check import LITTLE, Change, Kept, Sums, TargetCheck, check_target, is_converted
from lora_fuse.verification.weights import WeightFile, Weights, weight_files
from lora_fuse.verification.whole_files import compare_files, sort_base

# A tensor beside a weight that says its numbers are not yet the weight: they are multiplied, or quantised.
SCALE = re.compile(r"(?P<module>.+)\.(?:scale_weight|weight_scale\w*|weight_zero_point|comfy_quant|weight\..+)")
WRITTEN = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # what a merge can be in, by a header's name
SHOWN = 20  # problems that are spelled out; the rest is counted


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
    `update` is what the weights keep of the change that was meant, over all targets: of each the measured rows stand
    for all. `warnings` say where that is little. `left_out` are keys of the LoRAs that were left out on purpose, of
    modules that the base has not.
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
    update: Kept = field(default_factory=Kept)
    warnings: list[str] = field(default_factory=list)
    left_out: int = 0

    def add(self, name: str, check: TargetCheck) -> None:
        """Add what was found of a target."""
        self.rows_total += check.rows_total
        self.rows_checked += check.rows_checked
        if self.drawn is not None:
            self.drawn.rows += check.rows_drawn
        if check.problem:
            self.problem(check.problem)
        if (change := check.change) is None:
            return
        self.changes[name] = change
        if change.relative_norm == 0:
            self.notes.append(f"{name}: the difference is zero in the rows looked at")
        elif change.relative_norm > 1:
            times = f"{change.relative_norm:.2g} times the weight"
            self.notes.append(f"{name}: the difference is {times}; is the scale right?")

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
    were made anew. `promised` are those of the base that are not here, as the Hub lists them. `dtype` is that of all
    floats of the merge, as configurations name it, None for the base's own, and `converted` are the fused weights that
    had others.
    """

    pipeline: str | None = None
    scheduler: Mapping[str, object] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()
    base_files: frozenset[str] | None = None
    generated: frozenset[str] = frozenset()
    promised: Mapping[str, FileRecord] = field(default_factory=dict)
    dtype: str | None = None
    converted: frozenset[str] = frozenset()


def verify_merge(  # noqa: PLR0913 - by keyword, each is a choice of its own
    merged: Path,
    base: Path,
    loras: Sequence[LoraInput],
    *,
    rows: int | None,
    expected: Expectation,
    component: str | None = None,
    selection: Selection | None = None,
    seed: int | None = None,
    streamed: direct_io.StreamedFiles | None = None,
) -> Verification:
    """Compare a merged checkpoint with what the base and the LoRAs should have given; progress goes to stderr.

    As `lora_fuse.verify`, but that `rows` is None for all of them. Of files of the base that are `streamed`, what is
    compared is fetched: rows, and tensors that do not change; whole files are compared by the sha256 of the Hub's list.

    Raises:
        BadCheckpoint: one side has nothing to compare, is of another kind, or cannot be read.
        BadLora: a LoRA cannot be read.
    """
    beside = base.exists() and is_kept_beside(merged)
    if not beside:
        _refuse_other_kinds(merged, base)
    chosen = selection or Selection()
    named = [given if given.component else replace(given, component=component or None) for given in loras]
    components = find_components(base, named, chosen)
    expected = replace(expected, promised={} if streamed is None else streamed.records)
    opening = partial(_open_base, base, streamed)
    found = Verification(left_out=components.left_out)
    found.drawn = None if rows is None else DrawnRows(secrets.randbits(32) if seed is None else seed)
    for problem in components.problems:
        found.problem(problem)
    with progress.byte_progress("verify", files.total_size(merged), at_least=progress.FEW) as advance:
        shards = sort_base(base, components.names, expected.base_files) if base.is_dir() else None
        if beside:
            return _verify_beside(merged, base, shards, components, expected, found, advance=advance, opening=opening)
        parts = [_Component(merged, base, name, shards, components, found, opening) for name in components.names]
        for part in parts:
            part.check(expected.dtype, rows, advance)
        _measure_update([one for part in parts for one in part.measured], found)
        if shards is not None:
            fused = {path.relative_to(merged).as_posix() for part in parts for path in part.merged_files}
            converted = frozenset(name for part in parts if part.is_converted for name in part.names)
            indexes = {name: index for part in parts for name, index in part.indexes.items()}
            expected = replace(expected, converted=converted)
            found.files_untouched, problems = compare_files(merged, base, fused, shards, expected, advance, indexes)
            for problem in problems:
                found.problem(problem)
    return found


def _verify_beside(  # noqa: PLR0913 - each is of another kind
    merged: Path,
    base: Path,
    shards: repository_files.SortedFiles | None,
    components: Components,
    expected: Expectation,
    found: Verification,
    *,
    advance: Callable[[int], None],
    opening: Callable[[Sequence[str]], Weights],
) -> Verification:
    """Compare a base that was left as it is, with LoRAs of one component beside it."""
    stored = opening(shards.shards if shards else ())
    wanted = components.expected(components.names[0], stored)
    found.modules = wanted.modules
    found.targets = len(wanted.deltas)
    found.files_untouched, problems = compare_kept(merged, base, shards, stored, wanted.deltas, expected, advance)
    for problem in [*wanted.problems, *problems]:
        found.problem(problem)
    return found


def _open_base(base: Path, streamed: direct_io.StreamedFiles | None, names: Sequence[str]) -> Weights:
    """Open weights of a base, all of one that is a file; those that are streamed are read where they are."""
    coming = {} if streamed is None else streamed.records
    here = [WeightFile(base / name, streamed if name in coming else None, name) for name in names]
    return open_weights(here or [base])


class _Component:
    """One component of a merge, whose weights are compared; names of several are told apart by their folder."""

    def __init__(
        self,
        merged: Path,
        base: Path,
        name: str,
        shards: repository_files.SortedFiles | None,
        components: Components,
        found: Verification,
        opening: Callable[[Sequence[str]], Weights],
    ) -> None:
        """Open the weights of the base, and read what LoRAs should add to them."""
        more = shards.more if shards else {}
        own = (shards.shards, shards.index) if shards else ((), None)
        self.names, self._index = more.get(name, own)
        base_files = [base / one for one in self.names] or [base]
        self._base = base
        self._found = found
        self._prefix = f"{name}/" if len(components.names) > 1 else ""
        self._stored = opening(self.names)
        self._expected = components.expected(name, self._stored)
        found.modules += self._expected.modules
        found.targets += len(self._expected.deltas)
        for problem in self._expected.problems:
            found.problem(f"{self._prefix}{problem}")
        merged_files = [merged / path.relative_to(base) for path in base_files]
        self.merged_files = [path for path in merged_files if path.is_file()] or weight_files(merged, name)
        self.is_converted = False
        self.indexes: dict[str, dict[str, Any]] = {}
        self.measured: list[tuple[str, TargetCheck, str]] = []

    def check(self, dtype: str | None, rows: int | None, advance: Callable[[int], None]) -> None:
        """Compare all tensors, and see which texts follow from their dtypes."""
        written = open_weights(self.merged_files)
        deltas = self._expected.deltas
        ours, theirs = _comparable(written, self._stored, deltas.keys(), dtype, self._found)
        if written.is_gguf == self._stored.is_gguf:
            _check_metadata(ours, theirs, self._found)
        self.measured = _check_tensors(ours, theirs, deltas, rows, self._found, advance, self._prefix)
        self.is_converted = theirs is not self._stored  # else all floats are in that dtype, and no text says another
        self.indexes = _indexes(self._base, self._index, theirs)


def _refuse_other_kinds(merged: Path, base: Path) -> None:
    """Refuse two places of which one is not there, or is a folder and the other a file."""
    for place in (merged, base):
        if not place.exists():
            raise BadCheckpoint(f"no such file or folder: {place}")
    kinds = ["a folder" if place.is_dir() else "a file" for place in (merged, base)]
    if kinds[0] != kinds[1]:
        raise BadCheckpoint(f"{merged} is {kinds[0]}, and its base {base} {kinds[1]}; name two of one kind")


def _comparable(
    merged: Weights, base: Weights, targets: Set[str], dtype: str | None, found: Verification
) -> tuple[Weights, Weights]:
    """The tensors of both sides as they are compared: codes are decoded in the base, or are codes on both sides.

    All floats of the base have `dtype` then.
    """
    codes = read_codes(base)
    wanted = None if dtype is None else WRITTEN[dtype]
    plain = {base[name].dtype for name in base.names() - codes.tensors.keys() if base[name].dtype in FLOATS}
    if plain <= {wanted} and not codes.tensors:
        wanted = None
    again = merged.is_gguf or any(name in targets and _is_stored_as(merged, base, name) for name in codes.tensors)
    if again and wanted:
        found.problem(f"targets are codes, as in the base, and should be {wanted}")
    if again:
        both = [requantised(merged, read_codes(merged), targets), requantised(base, codes, targets)]
        return both[0], both[1]
    if (
        wanted is None
        and base.is_gguf == merged.is_gguf
        and targets.isdisjoint(codes.tensors)
        and targets.isdisjoint(codes.problems)
    ):
        return merged, base
    for problem in codes.problems.values():
        found.problem(problem)
    return merged, decoded(base, codes, wanted)


def _is_stored_as(merged: Weights, base: Weights, name: str) -> bool:
    return name in merged.names() and merged[name].is_like(base[name])


def _indexes(base: Path, index: str | None, theirs: Weights) -> dict[str, dict[str, Any]]:
    """The index of shards as it should be, where dtypes are others than the base's: without what went with codes."""
    tensors = [theirs[name] for name in theirs.names()]
    if index is None or not any(
        isinstance(one, (CodedTensor, ConvertedTensor)) and one.dtype != one.kind for one in tensors
    ):
        return {}
    content = files.read_json(base / index, dict, BadCheckpoint)
    total = sum(one.nbytes_merged for one in tensors)
    listed = {name: file for name, file in content["weight_map"].items() if name in theirs.names()}
    metadata = {**content.get("metadata", {}), "total_size": total}
    return {index: {**content, "metadata": metadata, "weight_map": listed}}


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
    prefix: str,
) -> list[tuple[str, TargetCheck, str]]:
    """Compare the tensors of a component, before whose names `prefix` stands; the targets, each with its dtype."""
    for name in sorted(base.names() ^ merged.names()):
        found.problem(f"{prefix}{name} is only in the {'base' if name in base.names() else 'merged'} checkpoint")
    scales = {f"{match['module']}.weight": match[0] for match in map(SCALE.fullmatch, base.names()) if match}
    for name in sorted(deltas.keys() & scales.keys()):
        if isinstance(base[name], CodedTensor):
            continue  # its scale is its own
        found.problem(
            f"{prefix}{name} is no plain weight in the base: {scales[name]} goes with it, so the sum is of other "
            "numbers"
        )
    common = sorted(base.names() & merged.names())
    whole = {name for name in common if name in deltas or isinstance(base[name], (CodedTensor, ConvertedTensor))}
    tasks = [(name, piece) for name in common for piece in ([None] if name in whole else pieces(merged[name].nbytes))]

    def size(task: tuple[str, tuple[int, int] | None]) -> int:
        name, piece = task
        return merged[name].nbytes if piece is None else piece[1]

    def check(task: tuple[str, tuple[int, int] | None], told: Callable[[int], None]) -> TargetCheck | bool:
        name, piece = task
        if piece is None and name not in deltas:
            result: TargetCheck | bool = is_converted(prefix + name, merged[name], base[name])
        elif piece is None:
            seed = None if found.drawn is None else found.drawn.seed
            result = check_target(prefix + name, merged[name], base[name], deltas[name], rows, seed)
        else:
            result = merged[name].is_like(base[name]) and merged[name].same(base[name], piece)
        told(size(task))
        return result

    _keep_freed_memory()
    # BLAS has one thread: its own would spin against those that take tasks.
    with threadpool_limits(1, user_api="blas"):
        results = file_state.in_threads(check, tasks, advance, size)
    by_name: dict[str, list[TargetCheck | bool]] = {name: [] for name in common}
    for (name, _), result in zip(tasks, results, strict=True):
        by_name[name].append(result)
    for name, checks in by_name.items():
        _add_up(prefix + name, checks, merged[name].is_like(base[name]), found)
    return [
        (prefix + name, one, merged[name].dtype) for name, (one, *_) in by_name.items() if isinstance(one, TargetCheck)
    ]


def _measure_update(measured: Sequence[tuple[str, TargetCheck, str]], found: Verification) -> None:
    """Say what all targets together keep of the change that was meant, and where that is little."""
    together = Sums()
    dtypes = {name: dtype for name, check, dtype in measured if name in found.changes}
    for name, check, _ in measured:
        if name in dtypes:
            together.add_share(check.sums, check.rows_total / check.rows_checked)
    written = set(dtypes.values())
    found.update = together.kept(written.pop() if len(written) == 1 else "")
    cosines = {name: change.cosine for name, change in found.changes.items() if change.cosine is not None}
    little = {name: cosine for name, cosine in cosines.items() if cosine < LITTLE}
    if found.update.cosine is not None and (little or found.update.cosine < LITTLE):
        least = min(cosines, key=cosines.__getitem__)
        worst = f"{least} has {cosines[least]:.3g} in {dtypes[least]}, all together {found.update.cosine:.3g}"
        found.warnings.append(
            f"{len(little)} of {len(cosines)} targets keep little of the change that was meant, by a cosine below "
            f"{LITTLE}: {worst}; so small a change needs weights of more bits: --dtype float32 (fuse.dtype)"
        )


def _keep_freed_memory() -> None:
    """Have glibc keep what arrays of a thread leave for the next ones, whose pages would all be fetched anew.

    It keeps twice as much as the largest array that was freed, of up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).
    """
    largest = np.empty(31 << 20, np.uint8)
    del largest


def _add_up(name: str, checks: Sequence[TargetCheck | bool], alike: bool, found: Verification) -> None:
    """Add what was found of a tensor: one check of a target, or of every piece of another one."""
    for check in checks:
        if isinstance(check, TargetCheck):
            found.add(name, check)
            return
    found.tensors_untouched += 1
    if not alike or not all(checks):
        found.problem(f"{name} is no target of any LoRA and differs from the base")
