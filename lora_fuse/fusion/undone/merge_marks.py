"""The statements of a merged checkpoint on what was fused into it, held against what is to be taken out. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lora_fuse.checkpoint import PROVENANCE, Checkpoint, Shard
from lora_fuse.errors import BadCheckpoint, BadConfig, BadLora

if TYPE_CHECKING:
    from lora_fuse.fusion.plan import Plan, Target

UNMERGED = f"{PROVENANCE}.unmerged"  # the metadata entry of a shard that LoRAs were taken out of, as JSON
# Roundings of a merge: of the exact sum; of the delta and of the sum, as PEFT does with an adapter in 16 bits on a CPU;
# or of the product of the two factors, of that with the scale and of the sum, as it does on a GPU
# (peft/tuners/lora/layer.py, get_delta_weight). With an adapter in float32, its default, it rounds once.
Rounding = Literal["once", "twice", "thrice"]
OF_THE_MERGE = ("loras", "only", "skip", "scales", "leave_out")  # parts of a fused shard's entry


def unmarked(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint without the statements of its shards that it was merged: it is to be a base again."""
    shards = tuple(_unmarked(shard) for shard in checkpoint.shards)
    return replace(checkpoint, shards=shards, further=tuple(unmarked(one) for one in checkpoint.further))


def _unmarked(shard: Shard) -> Shard:
    metadata = {name: value for name, value in shard.header.metadata.items() if name != PROVENANCE}
    return replace(shard, header=replace(shard.header, metadata=metadata))


def undone_plan(plan: Plan, merged: Checkpoint, rounding: Rounding) -> Plan:
    """The plan that takes its LoRAs out of a merge, which says itself what was fused, or says nothing.

    Raises:
        BadConfig: the merge is codes; or was rounded twice, and there are several LoRAs.
        BadLora: a LoRA leaves no trace of the base, or depends on it.
        BadCheckpoint: a weight is float64, or the merge says that other LoRAs were fused, or otherwise, or into a base
            of another dtype.
    """
    if rounding != "once" and len(plan.inputs) > 1:
        raise BadConfig(
            f"{len(plan.inputs)} LoRAs and --rounding {rounding}: every sum was rounded then, so take them out "
            "one after another, the last one first"
        )
    parts = []
    for part, of in zip(plan.parts, (merged, *merged.further), strict=True):
        if part.stored is not None:
            codes = ", ".join(part.source)
            raise BadConfig(f"{of.root} is quantised ({codes}): its sums are not there any more; give the merge itself")
        for target in part.targets.values():
            _refuse_unsuited(target)
        for shard in of.shards:
            if (said := shard.header.metadata.get(PROVENANCE)) is not None:
                _compare(_parsed(said), json.loads(part.provenance), shard)
        parts.append(replace(part, undo=rounding, further=()))
    return replace(parts[0], further=tuple(parts[1:]))


def _refuse_unsuited(target: Target) -> None:
    """Refuse to take out what leaves no trace of the base, and what depends on it."""
    for scaled in target.deltas:
        delta = scaled.placed.delta
        if delta.is_replacement or delta.has_dora:
            replaced = "is put in the place of the base's values, of which nothing is left"
            why = replaced if delta.is_replacement else "is DoRA, whose lengths are made of the base's own values"
            raise BadLora(f"{scaled.lora.path}: {delta.module!r} {why}: it cannot be taken out; get the base itself")
    if target.tensor.dtype == "F64":
        raise BadCheckpoint(
            f"{target.shard.path}: {target.tensor.name!r} is F64, in which no sum is rounded exactly; get the base"
        )


def _parsed(said: str) -> dict[str, object]:
    try:
        entry = json.loads(said)
    except ValueError:
        entry = None
    return entry if isinstance(entry, dict) else {}


def _compare(said: Mapping[str, object], given: Mapping[str, object], shard: Shard) -> None:
    for key, what in (("dtype", "was written in another dtype than its base"), ("source", "was made of codes")):
        if key in said:
            raise BadCheckpoint(
                f"{shard.path} {what}, as its header says ({key} {said[key]!r}): its sums are no sums of numbers of "
                "this dtype, and say nothing of the base; get the base itself"
            )
    theirs, ours = ({key: entry[key] for key in OF_THE_MERGE if key in entry} for entry in (said, given))
    if theirs and theirs != ours:
        texts = [json.dumps(entry, sort_keys=True) for entry in (theirs, ours)]
        raise BadCheckpoint(
            f"{shard.path} says that it was fused with {texts[0]}, and to be taken out is {texts[1]}: give all LoRAs, "
            "scales and patterns of its merge"
        )
