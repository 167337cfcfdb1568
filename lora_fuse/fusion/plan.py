"""The plan of a fuse, worked out from headers alone: every target, every shape, every refusal. Writes nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import Checkpoint, Shard, TensorInfo, dtypes, fitness, open_checkpoint, repository_files
from lora_fuse.checkpoint.stored import MADE, StoredMatrix, StoredWeights
from lora_fuse.errors import BadCheckpoint, BadConfig, BadLora, BadScale, require
from lora_fuse.lora import Delta, LoraFile, LoraInput, PlacedDelta, Selection, match_targets, open_lora
from lora_fuse.machine import files
from lora_fuse.models import COMPONENT, alpha_warnings, distillation, pair_warnings
from lora_fuse.recipe import Lock, hf_cache, paths

if TYPE_CHECKING:  # parameters are models of pydantic, and a plain fuse has none
    from lora_fuse.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ScaledDelta:
    """One LoRA's delta of one parameter, at the scale that the user gives."""

    lora: LoraFile
    placed: PlacedDelta
    scale: float

    def read(self) -> Delta:
        """Read its tensors.

        Raises:
            BadLora: see `LoraFile.read`.
        """
        return self.lora.make(self.placed, self.scale)


@dataclass(frozen=True, slots=True)
class Target:
    """A weight that changes, and all that is added to it; `stored` says how to read one that is codes."""

    tensor: TensorInfo
    shard: Shard
    deltas: tuple[ScaledDelta, ...]
    stored: StoredMatrix | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked fuse: nothing in it can be refused any more but for the disk and the data itself.

    `loras` are the opened files, in the order of `inputs`; `skipped` the parameters that the selection leaves out.
    `stored` are the base's weights that are codes, where a target is one of them or the base is GGUF: all of these are
    decoded then, or with `requantise` the targets alone, to be quantised again as they were. `dtype` is that of all
    floats of the result, by a header's name; None where that is the base's own everywhere.
    """

    checkpoint: Checkpoint
    inputs: tuple[LoraInput, ...]
    loras: tuple[LoraFile, ...]
    targets: dict[str, Target]
    selection: Selection = field(default_factory=Selection)
    skipped: tuple[str, ...] = ()
    stored: StoredWeights | None = None
    requantise: bool = False
    dtype: str | None = None

    @property
    def is_laid_out_anew(self) -> bool:
        """True where tensors of the result have other dtypes, and so other places, than the base's."""
        return not self.requantise and (self.stored is not None or self.dtype is not None)

    def written(self, tensor: TensorInfo) -> str:
        """The dtype in which a plain tensor is written: integers and floats of 8 bits or fewer stay as they are."""
        return self.dtype if self.dtype and tensor.dtype in dtypes.ROUNDABLE else tensor.dtype

    @property
    def fused_shards(self) -> tuple[Shard, ...]:
        """The shards that are written anew, in the base's order.

        They hold a target, or what is decoded, or what is written in another dtype.
        """
        changed = {target.shard.relative for target in self.targets.values()}
        codes = self.stored.tensors if self.stored and not self.requantise else self._new_scales
        return tuple(
            shard
            for shard in self.checkpoint.shards
            if shard.relative in changed
            or not codes.isdisjoint(shard.header.tensors)
            or any(self.written(tensor) != tensor.dtype for tensor in shard.header.tensors.values())
        )

    @property
    def _new_scales(self) -> frozenset[str]:
        """The scales of targets that are quantised again, which may lie in other shards."""
        matrices = (target.stored for target in self.targets.values() if self.requantise)
        return frozenset(one.scale.tensor.name for one in matrices if one is not None and one.scale is not None)

    @property
    def plain(self) -> bool:
        """True where only plain LoRAs are added, and only to weights of 16 bits: the fastest case."""
        return self.dtype is None and all(_beyond_plain(target) is None for target in self.targets.values())

    @property
    def provenance(self) -> str:
        """The entry in a fused shard's header, as JSON: base, LoRAs and scales, the same wherever it is made."""
        loras = [
            {"sha256": lora.sha256, "scale": given.scale, **_config(lora)}
            for given, lora in sorted(zip(self.inputs, self.loras, strict=True), key=_order)
        ]
        selected = self.selection.entries
        source = {} if self.stored is None else {"source": self.source, "requantised": self.requantise}
        dtype = {} if self.dtype is None else {"dtype": self.dtype}
        return json.dumps(
            {"base": self.checkpoint.label, "loras": loras, **selected, **source, **dtype}, sort_keys=True
        )

    @property
    def source(self) -> dict[str, int]:
        """The formats of the base's weights that are codes, each with their number; empty of plain safetensors."""
        if self.stored is None:
            return {}
        words = Counter(matrix.words for matrix in self.stored.matrices.values())
        return dict(sorted(words.items())) or {"of GGUF, plain": len(self.checkpoint.tensors())}

    @property
    def reach(self) -> dict[str, list[str]]:
        """The modules that each pattern of the selection reaches, see `Selection.reach`."""
        names = {tensor.name: name for name, tensor in self.checkpoint.parameters().items()}
        return self.selection.reach([*self.skipped, *(names[name] for name in self.targets)])

    @property
    def modules(self) -> int:
        """Modules in the LoRA files, summed over files: what has to be fused."""
        return sum(len(lora.deltas) for lora in self.loras)


def make_plan(
    checkpoint: Checkpoint,
    inputs: Sequence[LoraInput],
    selection: Selection | None = None,
    *,
    dtype: str | None = None,
    digests: bool = False,
    requantise: bool = False,
) -> Plan:
    """Match every LoRA against the base.

    `dtype` is a key of `dtypes.OUTPUTS`: that of all floats of the result, or None for the base's own.

    LoRAs are summed in the order of their sha256, so the order on a command line cannot show in the result. `digests`
    are those of `LoraFile`, `requantise` is that of `Plan`.

    Raises:
        BadScale: a scale is not finite.
        BadLora: a file cannot be used (see `open_lora` and `match_targets` for the kinds).
        BadCheckpoint: the base cannot be fused into, or a target is quantised and cannot be decoded, or of a dtype that
            is not rounded to.
        BadConfig: a pattern of the selection matches no target, or it leaves none, or leaves out what would be fused;
            or nothing can be quantised again; or there is no such dtype.
        MissingExtra: a target is not plain (see `Plan.plain`), and torch is not installed.
    """
    chosen = selection or Selection()
    fitness.refuse_unfit(checkpoint)
    for given in inputs:
        if not math.isfinite(given.scale):
            raise BadScale(f"the scale of {given.name} is {given.scale}, not a finite number; 1.0 is the usual one")
    loras = tuple(open_lora(given.path, digests=digests, leave_out=chosen.leaves_out) for given in inputs)
    weights = checkpoint.parameters()
    fusable = {key for lora in loras for key in lora.left_out_in(weights)}
    chosen.check_left_out({key for lora in loras for key in lora.left_out}, fusable.__contains__)
    deltas: dict[str, list[ScaledDelta]] = {}
    for given, lora in sorted(zip(inputs, loras, strict=True), key=_order):
        with fitness.blaming_a_quantised_base(checkpoint):
            matched = match_targets(lora.deltas, weights, str(lora.path))
        for name, placed in matched.items():
            _refuse_cut_columns(lora, placed)
            share = given.scale * (chosen.share(name) or 0.0)
            deltas.setdefault(name, []).extend(ScaledDelta(lora, one, share) for one in placed)
    chosen.check(deltas)
    skipped = tuple(sorted(name for name in deltas if chosen.share(name) is None))
    kept = {name: scaled for name, scaled in deltas.items() if name not in skipped}
    stored = checkpoint.stored()
    targets = _targets(checkpoint, {weights[name].name: scaled for name, scaled in kept.items()}, stored)
    codes = any(target.stored for target in targets.values())
    decoded = codes or any(shard.is_gguf for shard in checkpoint.shards) or bool(dtype and stored.tensors)
    if decoded and stored.refused:
        raise next(iter(stored.refused.values()))
    if requantise:
        _refuse_unmade(checkpoint, [target.stored for target in targets.values() if target.stored])
    if (beyond := next(filter(None, map(_beyond_plain, targets.values())), None)) is not None:
        require("torch", beyond)
    written = _converted(checkpoint, dtype, decoded=decoded, requantise=requantise)
    return Plan(
        checkpoint, tuple(inputs), loras, targets, chosen, skipped, stored if decoded else None, requantise, written
    )


def plan_of(base: Lock, loras: Mapping[str, Lock], params: Recipe) -> Plan:
    """Match the pinned LoRAs against the pinned base, as the recipe chooses and scales them.

    Raises:
        BadSource: a LoRA is not what its lock says, by the bytes that were read.
    """
    checkpoint = open_checkpoint(hf_cache.locate(base), COMPONENT, base.files, base.label if base.repo_id else None)
    inputs = paths.lora_inputs(loras, params)
    digests = params.fuse.inputs == "hash"
    plan = make_plan(checkpoint, inputs, params.fuse.selection, dtype=params.fuse.dtype, digests=digests)
    for given, lora in zip(inputs, plan.loras, strict=True):
        for name, record in loras[given.name].files.items():
            sha256 = lora.config_sha256 if name.endswith(".json") else lora.sha256
            if sha256 != record.sha256:
                raise hf_cache.other_content(loras[given.name], name, sha256)
    return plan


def cautions(plan: Plan, scheduler: Mapping[str, object] | None = None) -> list[str]:
    """Warn of what may be a mistake, a sentence each: base, strength or scheduler is another's, or the base is odd.

    `scheduler` are the settings that the result gets, None or nothing for the base's own.
    """
    base, _ = hf_cache.cached_from(plan.checkpoint.root.absolute())
    warnings = pair_warnings(base, [hf_cache.cached_from(given.path.absolute()) for given in plan.inputs])
    warnings += alpha_warnings([(lora.path.name, lora.missing_alphas) for lora in plan.loras])
    warnings += plan.checkpoint.remarks
    if scheduler:
        return warnings
    own: dict[str, object] | None = None
    if plan.checkpoint.kind == "pipeline":
        path = plan.checkpoint.root / repository_files.SCHEDULER_CONFIG
        own = files.read_json(path, dict, BadCheckpoint, "fetch the base again") if path.exists() else {}
    known = [found for given in plan.inputs if (found := distillation(given.path.name)) is not None]
    return warnings + [said for one in known if (said := one.warning(own)) is not None]


def _refuse_cut_columns(lora: LoraFile, placed: Sequence[PlacedDelta]) -> None:
    """Refuse DoRA by column in a part of a parameter's rows: its lengths are of columns of another matrix."""
    for one in placed:
        if one.runs is not None and lora.has_lengths_of_columns(one.delta):
            raise BadLora(
                f"{lora.path}: {one.delta.module!r} has a length for each column (dora_scale) of a matrix that the "
                "base has not whole: its rows are in other parameters; fuse it into a base with the LoRA's names"
            )


def _order(pair: tuple[LoraInput, LoraFile]) -> tuple[str, str, float]:
    return pair[1].sha256, pair[1].config_sha256 or "", pair[0].scale


def _config(lora: LoraFile) -> dict[str, str]:
    """The sha256 of a PEFT folder's configuration, on which the bytes depend too."""
    return {} if lora.config_sha256 is None else {"config_sha256": lora.config_sha256}


def _refuse_unmade(checkpoint: Checkpoint, targets: Sequence[StoredMatrix]) -> None:
    """Refuse to quantise again where no target is codes, or one is of a format that is only read."""
    if not targets:
        raise BadConfig(f"{checkpoint.root} has no target that is quantised: leave --requantise out")
    for matrix in targets:
        if matrix.format not in MADE:
            raise BadConfig(
                f"{checkpoint.root}: {matrix.name!r} is {matrix.format}, which is read here and not made (made are "
                f"{', '.join(MADE)}): leave --requantise out for BF16, or keep the LoRA beside codes, --side-channel"
            )


def _targets(
    checkpoint: Checkpoint, deltas: Mapping[str, list[ScaledDelta]], stored: StoredWeights
) -> dict[str, Target]:
    fitness.refuse_quantised(checkpoint, stored, deltas)
    targets = {}
    for shard in checkpoint.shards:
        for name, tensor in shard.header.tensors.items():
            if name not in deltas:
                continue
            codes = stored.matrices.get(name)
            if codes is None and tensor.dtype not in dtypes.ROUNDABLE:
                raise BadCheckpoint(
                    f"{shard.path}: the target {name!r} is {tensor.dtype}, as quantised weights are, and no sum can be "
                    f"rounded to that; use a base in {', '.join(dtypes.ROUNDABLE)}"
                )
            targets[name] = Target(tensor, shard, tuple(deltas[name]), codes)
    return targets


def _converted(checkpoint: Checkpoint, dtype: str | None, *, decoded: bool, requantise: bool) -> str | None:
    """The dtype to write, by a header's name; None where all floats of the base have it already.

    Raises:
        BadConfig: no sum is rounded to it, or targets are to be codes.
        MissingExtra: something has to be converted, and torch is not installed.
    """
    if dtype is None:
        return None
    if dtype not in dtypes.OUTPUTS:
        raise BadConfig(f"--dtype (fuse.dtype) is {dtype!r}; it is one of {', '.join(dtypes.OUTPUTS)}, or left out")
    if requantise:
        raise BadConfig(
            f"--dtype (fuse.dtype) is {dtype}, and weights are to be quantised again; leave one of both out"
        )
    wanted = dtypes.OUTPUTS[dtype]
    if not decoded and all(
        tensor.dtype in (wanted, *(dtypes.DTYPES.keys() - dtypes.ROUNDABLE)) for tensor in checkpoint.tensors().values()
    ):
        return None
    require("torch", f"{checkpoint.root}: weights in {dtype}")
    return wanted


def _beyond_plain(target: Target) -> str | None:
    """The first thing about a target that only torch can add; None for plain LoRAs and weights of 16 bits."""
    if target.tensor.dtype not in dtypes.SIXTEEN_BIT:
        return f"{target.shard.path}: a fuse into {target.tensor.dtype} weights, as {target.tensor.name!r} is,"
    for scaled in target.deltas:
        if not scaled.placed.delta.is_plain:
            return f"{scaled.lora.path}: a fuse of {scaled.placed.delta.algorithm}, as for {target.tensor.name!r},"
    return None
