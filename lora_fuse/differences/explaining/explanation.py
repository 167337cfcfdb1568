"""A checkpoint explained: which of its weights differ from the base, which LoRAs are in it and how, and what is left.

First some rows of the weights that LoRAs are for are held in memory, and scales and a way to round are looked for. Then
every weight is read once and compared with what comes out of that; of each block with something left, one weight is
read again for its rank. Memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from lora_fuse.checkpoint import PROVENANCE, blocks
from lora_fuse.differences import PairedCheckpoints, open_pair
from lora_fuse.differences.explaining.estimation import TRACE, Estimate, cosine_of, estimate, smallest_told
from lora_fuse.differences.explaining.examiner import ExaminedTensor, Examiner, LeftInBlock
from lora_fuse.differences.explaining.remainder import effective_rank, pencil_scales
from lora_fuse.differences.explaining.samples import SampledTensor, TargetedTensor, find_targets, take_samples
from lora_fuse.differences.explaining.way_search import Recognised, recognise, trace_of
from lora_fuse.errors import BadLora, require
from lora_fuse.fusion import plan_base
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.machine import file_state, progress

if TYPE_CHECKING:
    from lora_fuse.hub import streamed_base

Array = npt.NDArray[np.float64]

SURE = 6.0  # standard errors
STEADY = 0.1  # of a scale is how far single weights may be from it
NEARLY_ALL = 0.9  # of the energy, or of the weights
ALIKE = 0.9999  # cosine of two LoRAs that are one
OTHER_BASE = 0.9  # cosine of two checkpoints below which one did not come from the other
RANKED = 3  # weights whose ranks are compared with and without a LoRA
CLEAR = 1.5  # times the energy of rounding, of weights with nothing else in them
RELATED = 0.3  # cosine of the difference and a LoRA


@dataclass(frozen=True, slots=True)
class AskedLora:
    """A LoRA that was asked for: its scale with a standard error, and if it is in the checkpoint.

    `smallest` is the smallest scale that would show, `cosine` that of its delta and the difference, in sampled rows;
    `trace` the number of sampled values that come out with it and not without. `by_block` are scales and errors.
    """

    name: str
    path: Path
    scale: float
    error: float
    spread: float
    smallest: float
    cosine: float
    trace: int
    found: bool
    by_block: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class ExplainedBlock:
    """A block: its weights, how many of their values differ, and both relative norms; see `ExaminedTensor`."""

    block: str
    tensors: int
    values: int
    differing: int
    relative: float
    left: float
    unexplained: int
    rest: LeftInBlock | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer, of all components: `way` is None where no way to round fits; `cosine` is of both checkpoints.

    `header` is what the checkpoint itself says of its making, which nothing here relies on. `rows` were looked at of
    each weight, None for all.
    """

    pair: PairedCheckpoints
    loras: tuple[AskedLora, ...]
    way: Recognised | None
    tensors: tuple[ExaminedTensor, ...]
    blocks: tuple[ExplainedBlock, ...]
    cosine: float
    header: str | None
    rows: int | None

    @property
    def found(self) -> tuple[AskedLora, ...]:
        """The LoRAs that are in the checkpoint."""
        return tuple(lora for lora in self.loras if lora.found)

    @property
    def differing(self) -> int:
        """Weights of which a value differs."""
        return sum(one.differing > 0 for one in self.tensors)

    @property
    def unexplained(self) -> tuple[ExaminedTensor, ...]:
        """Weights of which something is left."""
        return tuple(one for one in self.tensors if not one.explained)

    @property
    def is_equal(self) -> bool:
        """True where no value differs."""
        return not self.differing

    @property
    def missed(self) -> int:
        """Values that do not come out, of weights that are explained."""
        return sum(one.missed for one in self.tensors if one.explained and one.differing)

    @property
    def moved(self) -> int:
        """Values that moved or should have, of weights that are explained."""
        return sum(one.moved for one in self.tensors if one.explained and one.differing)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the checkpoint's weights that are others in the base."""
        return tuple(sorted({one.dtype or "codes" for one in self.pair.tensors if one.dtype != one.base.dtype}))

    @property
    def is_other_base(self) -> bool:
        """True where the checkpoint did not come from this base."""
        return self.cosine < OTHER_BASE and not self.found

    @property
    def is_full(self) -> bool:
        """True where what is left is in nearly all matrices, and of no few directions."""
        matrices = [one for one in self.tensors if one.is_matrix]
        ranked = [one.rest for one in self.blocks if one.rest and one.rest.rank is not None]
        left = sum(not one.explained for one in matrices)
        return bool(ranked) and all(one.full for one in ranked) and left >= NEARLY_ALL * len(matrices)


def explain(
    checkpoint: Path | streamed_base.StreamedBase,
    base: Path | streamed_base.StreamedBase,
    loras: Sequence[Path] = (),
    *,
    components: Sequence[str | None] = (),
    rows: int | None = None,
    leave_out: Sequence[str] = (),
    show_progress: bool = False,
) -> Explanation:
    """Explain a checkpoint by its base and by LoRAs that may be in it; nothing is written.

    Args:
        checkpoint: a pipeline folder, a component folder or one file, in any spelling of the family's names; or a
            pipeline on the Hub as `streamed_base.open_streamed` of `lora_fuse.hub` opens it: what is looked at is read
            from there, all of the weights unless there are `rows`.
        base: what it may have come from, as `checkpoint`.
        loras: files or PEFT folders.
        components: the folder of the pipeline's component that each LoRA is for, None where its keys say it; nothing
            for all of them.
        rows: rows of each weight to compare in the end; None for all.
        leave_out: patterns of keys of the LoRAs that the base has no module for, see `Selection`.
        show_progress: show bytes and rate on stderr.

    Raises:
        BadCheckpoint: one cannot be read, both are one place, or they are of two architectures.
        BadLora: a LoRA cannot be read, matches nothing, or is one with another.
    """
    pair = open_pair(checkpoint, base)
    named = _named(loras)
    targets: dict[str, TargetedTensor] = {}
    if named:
        require("torch", "explain with LoRAs")
        given = [*components, *[None] * (len(named) - len(components))]
        inputs = [LoraInput(name, path, 1.0, part) for (name, path), part in zip(named, given, strict=True)]
        streamed = None if isinstance(base, Path) else base.files
        selection = Selection(leave_out=tuple(leave_out))
        targets = find_targets(plan_base(pair.base, inputs, selection, streamed=streamed), pair.tensors)
        if not targets:
            raise BadLora(
                f"{named[0][1]}: none of its targets is in both {' and '.join(pair.names)}; name its own base"
            )
    count = len(named)
    # BLAS has one thread: its own would spin against those that examine other weights.
    with nullcontext() if show_progress else progress.silence(), threadpool_limits(1, user_api="blas"):
        samples = take_samples(list(targets.values()), count)
        guess = estimate(samples, count) if samples else None
        way = recognise(samples, guess.scales) if guess is not None else None
        asked = _asked(named, samples, guess, way, targets)
        return _examined(pair, asked, way, targets, rows)


def _named(loras: Sequence[Path]) -> list[tuple[str, Path]]:
    """Names that tell the LoRAs apart.

    Raises:
        BadLora: one is given twice.
    """
    named: list[tuple[str, Path]] = []
    for path in loras:
        if any(path.exists() and path.samefile(other) for _, other in named):
            raise BadLora(f"{path} is given twice, and one scale is all that a checkpoint says of it; give it once")
        taken = {name for name, _ in named}
        named.append((path.stem if path.stem not in taken else f"{path.parent.name}/{path.stem}", path))
    return named


def _asked(
    named: Sequence[tuple[str, Path]],
    samples: Sequence[SampledTensor],
    guess: Estimate | None,
    way: Recognised | None,
    targets: Mapping[str, TargetedTensor],
) -> tuple[AskedLora, ...]:
    """The LoRAs, each with its scale and if it is in the checkpoint.

    Raises:
        BadLora: two of them are one, so that nobody can tell their scales apart.
    """
    if guess is None:
        return ()
    for one in range(len(named)):
        for other in range(one):
            if abs(cosine_of(guess.fits, one, other)) > ALIKE:
                raise BadLora(
                    f"{named[one][1]} and {named[other][1]} add the same but for their strength (cosine "
                    f"{cosine_of(guess.fits, one, other):.6f}), so no checkpoint tells their scales apart; give one"
                )
    scales = guess.scales if way is None else np.array(way.scales)
    found = None
    if way is None:
        found, scales = _without_way(guess, targets)
    asked = []
    for number, (name, path) in enumerate(named):
        trace = 0 if way is None else trace_of(samples, way, number)
        error = float(guess.errors[number] if way else max(guess.errors[number], guess.robust[number]))
        smallest = smallest_told(samples, scales, number, error)
        asked.append(
            AskedLora(
                name,
                path,
                float(scales[number]),
                error,
                float(guess.spread[number]),
                smallest if way else max(smallest, SURE * error),
                _cosine(guess, number),
                trace,
                bool(scales[number]) and trace >= TRACE if found is None else found[number],
                _by_block(guess, number),
            )
        )
    return tuple(asked)


def _cosine(guess: Estimate, number: int) -> float:
    """The cosine of a LoRA's delta and of the difference, where it adds something."""
    fits = [fit for fit in guess.fits if number in fit.sample.loras]
    rests = [fit.sample.values - fit.sample.summands.weights for fit in fits]
    energy = sum(float(rest @ rest) for rest in rests)
    size = sum(float(fit.gram[number, number]) for fit in fits)
    return sum(float(fit.moment[number]) for fit in fits) / (energy * size) ** 0.5 if energy and size else 0.0


def _by_block(guess: Estimate, number: int) -> dict[str, tuple[float, float]]:
    """A LoRA's scale and its standard error by rounding, by block."""
    found: dict[str, tuple[float, float]] = {}
    names = {blocks.block_of(fit.sample.name) for fit in guess.fits if number in fit.sample.loras}
    for block in blocks.in_order(names):
        own = [fit for fit in guess.fits if blocks.block_of(fit.sample.name) == block]
        gram = sum(fit.gram / fit.unit for fit in own)
        inverse = np.linalg.pinv(np.asarray(gram), rcond=1e-10, hermitian=True)
        scales = inverse @ sum(fit.moment / fit.unit for fit in own)
        noise = inverse @ np.asarray(sum(fit.noise / fit.unit**2 for fit in own)) @ inverse
        found[block] = float(scales[number]), float(max(noise[number, number], 0.0) ** 0.5)
    return found


def _without_way(guess: Estimate, targets: Mapping[str, TargetedTensor]) -> tuple[list[bool], Array]:
    """The LoRAs that are in a checkpoint although no way to round fits: sure, the same everywhere, and simpler so.

    Simpler means that what is left is rounding, or has fewer directions than with the LoRA in it.

    Returns:
        By LoRA if it is in it, and the scales, which are better than the guess where something else is there.
    """
    errors = np.maximum(guess.errors, guess.robust)
    found = [
        bool(abs(scale) > SURE * error and spread <= STEADY * abs(scale))
        for scale, error, spread in zip(guess.scales, errors, guess.spread, strict=True)
    ]
    scales = guess.scales.copy()
    if not any(found) or _is_rounding(guess, np.where(found, scales, 0.0)):
        return found, scales
    for number in [number for number, one in enumerate(found) if one]:
        others = np.where(found, scales, 0.0)
        found[number], scales[number] = _told_by_rank(guess, targets, others, number)
    return found, scales


def _is_rounding(guess: Estimate, scales: Array) -> bool:
    """True where scales leave no more than rounding does."""
    energy = rest = 0.0
    near = changed = 0
    for fit in (one for one in guess.fits if one.changed):
        difference = fit.sample.values - fit.sample.summands.weights
        left = fit.sample.values - fit.sample.summands.total(scales)
        energy += float(difference @ difference) / fit.unit
        rest += max(0.0, float(left @ left) / fit.unit - len(left))
        near += fit.left <= CLEAR
        changed += 1
    return near >= NEARLY_ALL * changed and rest <= (1 - NEARLY_ALL) * energy


def _told_by_rank(
    guess: Estimate, targets: Mapping[str, TargetedTensor], scales: Array, number: int
) -> tuple[bool, float]:
    """A LoRA by the largest weights that it is for: whether less is left without it, and its scale."""
    own = [targets[fit.sample.name] for fit in guess.fits if number in fit.sample.loras and fit.changed]
    matrices = [one for one in own if min(one.tensor.rows, one.tensor.columns) > 1]
    largest = sorted(matrices, key=lambda one: -one.tensor.size)[:RANKED]
    without = scales.copy()
    without[number] = 0.0
    unit = without.copy()
    unit[number] = 1.0
    examiner = Examiner(None, scales.tolist(), None)
    rests = []
    told = []
    for one in largest:
        there, _ = examiner.rest(one.tensor, one, without.tolist())
        delta = there - examiner.rest(one.tensor, one, unit.tolist())[0]
        rests.append((there, delta))
        told += pencil_scales(there, delta).tolist()
    if not told:
        return False, float(scales[number])
    scale = float(np.median(told))
    width = float(np.median(np.abs(np.array(told) - scale))) / len(told) ** 0.5
    scale = next((round(scale, digits) for digits in range(5) if abs(round(scale, digits) - scale) <= 3 * width), scale)
    fewer = sum(
        effective_rank(there - np.float32(scale) * delta)[0] < effective_rank(there)[0] for there, delta in rests
    )
    return 2 * fewer > len(largest), scale


def _examined(
    pair: PairedCheckpoints,
    asked: tuple[AskedLora, ...],
    way: Recognised | None,
    targets: Mapping[str, TargetedTensor],
    rows: int | None,
) -> Explanation:
    """Read all weights, and say what is left."""
    scales = [lora.scale if lora.found else 0.0 for lora in asked]
    way = None if way is None else replace(way, scales=tuple(scales))
    if way is not None and not any(scales):
        way = None
    examiner = Examiner(way, scales, rows)
    with progress.byte_progress("explain", pair.nbytes, at_least=progress.FEW) as advance:
        tensors = file_state.in_threads(
            lambda one, read: examiner.examine(one, targets.get(one.name), read),
            pair.tensors,
            advance,
            lambda one: one.nbytes,
        )
    paired = {one.name: one for one in pair.tensors}
    by_block: dict[str, list[ExaminedTensor]] = {}
    for one in tensors:
        by_block.setdefault(one.block, []).append(one)
    made = []
    for block in blocks.in_order(by_block):
        own = by_block[block]
        left = sorted((one for one in own if not one.explained), key=lambda one: (not one.is_matrix, -one.left))
        rest = examiner.left_of(paired[left[0].name], targets.get(left[0].name)) if left else None
        base = sum(one.base_norm**2 for one in own) ** 0.5 or 1.0
        made.append(
            ExplainedBlock(
                block,
                len(own),
                sum(one.values for one in own),
                sum(one.differing for one in own),
                sum(one.difference_norm**2 for one in own) ** 0.5 / base,
                sum(one.left**2 for one in own if not one.explained) ** 0.5 / base,
                len(left),
                rest,
            )
        )
    header = (pair.metadata or {}).get(PROVENANCE)
    return Explanation(pair, asked, way, tuple(tensors), tuple(made), _cosine_of_both(tensors), header, rows)


def _cosine_of_both(tensors: Sequence[ExaminedTensor]) -> float:
    """The cosine of both checkpoints' matrices."""
    matrices = [one for one in tensors if one.is_matrix] or list(tensors)
    size = (sum(one.base_norm**2 for one in matrices) * sum(one.other_norm**2 for one in matrices)) ** 0.5
    return sum(one.dot for one in matrices) / size if size else 1.0
