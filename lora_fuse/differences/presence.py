"""LoRAs that are in a base already, found without the base's original: fused a second time they would act twice.

A merge of this engine says so in its headers, and is refused by them. Any other base is asked by `matched_filter`, from
some rows of some weights: those in which the delta is largest, which is known before any of the base is read.
Nothing is refused by what is found, and where the rows cannot tell, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from lora_fuse.differences.matched_filter import Answers, ScaleEstimate, estimate, weigh
from lora_fuse.differences.paired import StoredRows
from lora_fuse.fusion import Plan
from lora_fuse.lora import Delta, LoraFile, LowRank
from lora_fuse.machine import progress

WEIGHTS = 64  # of a component, at most, evenly over its targets
NBYTES = 2 << 20  # of each, at most: 128 MiB of a base of any size
RUN = 16  # rows in one piece
PRODUCTS = 2e8  # of a weight's rows, its columns and the delta's rank: a tenth of a second
LARGEST_DELTA = 16 << 20  # bytes of a delta in the LoRA's file: factors of any rank, and no whole difference of 3072²
DENSE_ROWS = 128  # of a delta that has no factors
WAY_OUT = "fused again it acts twice: take the base without it, or leave the LoRA out"
NARROWEST = 8  # rows and columns that a weight has to have: a vector has one component

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Presence:
    """A look for one LoRA in a base, from so many bytes of some weights; `found` is None where they are too few."""

    name: str
    base: str
    found: ScaleEstimate | None
    weights: int
    nbytes: int

    @property
    def claim(self) -> str | None:
        """A sentence on what is in the base; None where nothing is claimed."""
        if self.found is None or not self.found.is_present:
            return None
        return (
            f"{self.name} is in {self.base} already, as it seems, at about {self.found.scale:.2f} ± "
            f"{self.found.margin:.2f} (from {progress.human_bytes(self.nbytes)} of {self.weights} weights; another "
            "version of it looks alike)"
        )


def look_for(plan: Plan) -> list[Presence]:
    """Look for each LoRA of a plan in its base, but for those that are to be taken out, at a negative scale.

    A base that is streamed is not looked into: its weights pass once, when they are fused.

    Raises:
        BadCheckpoint: the base cannot be read.
        BadLora: a LoRA cannot be read any more.
    """
    # BLAS has one thread: those of small decompositions spin, and take ten times as long where others are at work.
    with threadpool_limits(1, user_api="blas"):
        return [
            _look(plan, number)
            for number, given in enumerate(plan.inputs)
            if given.scale > 0 and plan.checkpoint.streamed is None
        ]


def presence_warnings(plan: Plan) -> list[str]:
    """Warn of LoRAs that are in the base already, a sentence each with the way out; see `look_for`."""
    return [f"{one.claim}; {WAY_OUT}" for one in look_for(plan) if one.claim is not None]


def _look(plan: Plan, number: int) -> Presence:
    lora = plan.loras[number]
    parts = [part for part in plan.parts if number in part.own]
    evidence: list[Answers] = []
    nbytes = 0
    for part in parts:
        for stored, delta in _chosen(part, lora):
            left, right, rows = _factors(delta, stored)
            evidence.append(weigh(_read(stored, rows), left, right))
            nbytes += len(rows) * stored.nbytes // stored.rows
    return Presence(lora.path.name, str(plan.checkpoint.root), estimate(evidence), len(evidence), nbytes)


def _chosen(part: Plan, lora: LoraFile) -> Iterator[tuple[StoredRows, Delta]]:
    """Some targets, evenly over all, that one delta of a LoRA changes, whatever the base holds there."""
    found = []
    for target in part.targets.values():
        own = [one.placed for one in target.deltas if one.lora is lora]
        if len(own) == 1 and min(own[0].shape) >= NARROWEST and not own[0].delta.has_dora:
            nbytes = sum(lora.header.tensors[key].nbytes for key in own[0].delta.keys.values())
            found += [(target, own[0])] if nbytes <= LARGEST_DELTA else []
    places = sorted({round(place) for place in np.linspace(0, len(found) - 1, min(WEIGHTS, len(found)))})
    for place in places:
        target, placed = found[place]
        delta = lora.make(placed, 1.0)
        if np.isfinite(delta.size) and delta.size > 0:  # one of a formula with a root depends on the base
            yield StoredRows(target.shard, target.tensor, target.stored), delta


def _factors(delta: Delta, stored: StoredRows) -> tuple[Floats, Floats, Rows]:
    """Rows of a delta as a product, (rows, rank) and (rank, columns), and the numbers of these rows."""
    fit = NBYTES * stored.rows // max(1, stored.nbytes)
    if isinstance(delta, LowRank) and delta.matrix.b is not None:
        left = delta.factor * delta.matrix.a
        right = delta.matrix.b
        energy = np.einsum("ij,ij->i", left @ (right @ right.T), left)
        rows = _largest_runs(energy, min(fit, int(PRODUCTS / right.size)))
        return left[rows], right, rows
    rows = _largest_runs(np.ones(stored.rows), min(fit, DENSE_ROWS))
    if isinstance(delta, LowRank):
        return np.eye(len(rows)), delta.factor * delta.matrix.a[rows], rows
    return np.eye(len(rows)), _dense(delta, rows, math.prod(stored.shape[1:])), rows


def _largest_runs(energy: Floats, count: int) -> Rows:
    """The numbers of at least `RUN` and at most `count` rows or so, in runs, in which there is most; in order."""
    runs = np.array_split(np.arange(len(energy)), math.ceil(len(energy) / RUN))
    most = sorted(runs, key=lambda run: -float(energy[run].mean()))[: max(1, count // RUN)]
    return np.sort(np.concatenate(most))


def _dense(delta: Delta, rows: Rows, columns: int) -> Floats:
    """Values of some rows of a delta that has no factors."""
    import torch

    values = torch.zeros(len(rows), columns, dtype=torch.float64)
    for total, row in zip(values, rows.tolist(), strict=True):
        delta.add_to(total.unsqueeze(0), total.unsqueeze(0), row, 0)
    return values.numpy()


def _read(stored: StoredRows, rows: Rows) -> Floats:
    """Rows of the base."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return np.concatenate(stored.read([(int(run[0]), len(run)) for run in runs])).astype(np.float64)
