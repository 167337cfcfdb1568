"""What a fuse would do, worked out from headers alone: every target, every shape, every refusal. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_fuse.checkpoint import Checkpoint, Shard
from lora_fuse.errors import BadCheckpoint, BadScale
from lora_fuse.header import TensorInfo
from lora_fuse.lora import LoraInput, Update, match_targets
from lora_fuse.lora_file import LoraFile, open_lora

ROUNDABLE = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Term:
    """One LoRA's part in one weight: ``coefficient * up @ down``, where coefficient is scale * alpha / rank."""

    lora: LoraFile
    update: Update
    coefficient: float


@dataclass(frozen=True, slots=True)
class Target:
    """A weight that changes, and all that is added to it."""

    tensor: TensorInfo
    shard: Shard
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked fuse: nothing in it can be refused any more but for the disk and the data itself.

    `loras` are the opened files, in the order of `inputs`.
    """

    checkpoint: Checkpoint
    inputs: tuple[LoraInput, ...]
    loras: tuple[LoraFile, ...]
    targets: dict[str, Target]

    @property
    def fused_shards(self) -> tuple[Shard, ...]:
        """The shards that hold at least one target, in the base's order."""
        changed = {target.shard.relative for target in self.targets.values()}
        return tuple(shard for shard in self.checkpoint.shards if shard.relative in changed)

    @property
    def modules(self) -> int:
        """Modules in the LoRA files, summed over files: what has to be fused."""
        return sum(len(lora.updates) for lora in self.loras)


def make_plan(checkpoint: Checkpoint, inputs: Sequence[LoraInput]) -> Plan:
    """Match every LoRA against the base.

    LoRAs are summed in the order of their sha256, so the order on a command line cannot show in the result.

    Raises:
        BadScale: a scale is not finite.
        BadLora: a file cannot be used (see `open_lora` and `match_targets` for the kinds).
        BadCheckpoint: a target has a dtype that cannot be rounded to.
    """
    for given in inputs:
        if not math.isfinite(given.scale):
            raise BadScale(f"the scale of {given.name} is {given.scale}, not a finite number; 1.0 is the usual one")
    loras = tuple(open_lora(given.path) for given in inputs)
    weights = checkpoint.tensors()
    terms: dict[str, list[Term]] = {}
    for lora, given in sorted(zip(loras, inputs, strict=True), key=lambda pair: (pair[0].sha256, pair[1].scale)):
        for name, update in match_targets(lora.updates, weights, str(lora.path)).items():
            coefficient = given.scale * update.alpha / update.rank
            terms.setdefault(name, []).append(Term(lora, update, coefficient))
    return Plan(checkpoint, tuple(inputs), loras, _targets(checkpoint, terms))


def _targets(checkpoint: Checkpoint, terms: dict[str, list[Term]]) -> dict[str, Target]:
    targets = {}
    for shard in checkpoint.shards:
        for name, tensor in shard.header.tensors.items():
            if name not in terms:
                continue
            if tensor.dtype not in ROUNDABLE:
                raise BadCheckpoint(
                    f"{shard.path}: the target {name!r} is {tensor.dtype}, which cannot be rounded to; "
                    f"use a base in {', '.join(ROUNDABLE)}"
                )
            targets[name] = Target(tensor, shard, tuple(terms[name]))
    return targets
