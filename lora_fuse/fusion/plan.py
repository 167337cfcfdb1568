"""The plan of a fuse, worked out from headers alone: every target, every shape, every refusal. Writes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import (
    PROVENANCE,
    Checkpoint,
    Shard,
    TensorInfo,
    dtypes,
    fitness,
    open_checkpoint,
    repository_files,
)
from lora_fuse.checkpoint.stored import MADE, StoredMatrix, StoredWeights
from lora_fuse.errors import BadCheckpoint, BadConfig, BadLora, require
from lora_fuse.fusion.planning.experts import expert_warnings
from lora_fuse.fusion.planning.routing import RoutedLora, components, route, route_to_one
from lora_fuse.fusion.undone.merge_marks import UNMERGED, Rounding, undone_plan, unmarked
from lora_fuse.lora import Delta, LoraFile, LoraInput, PlacedDelta, Selection, match_targets
from lora_fuse.machine import direct_io, files
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

    It is of one component of a pipeline, or of a base that is one. A build of several is a plan for each, as if that
    were fused alone: this one and `further`, together `parts`. `inputs` and `loras`, the opened files, are those of the
    whole build; `own` are the numbers of those that are fused here. `prefix` stands before names of this component
    where there are several. `skipped` are the parameters that the selection leaves out.
    `stored` are the base's weights that are codes, where a target is one of them or the base is GGUF: all of these are
    decoded then, or with `requantise` the targets alone, to be quantised again as they were. `dtype` is that of all
    floats of the result, by a header's name; None where that is the base's own everywhere. `lock` is that of a base
    that is streamed. With `undo` the base is a merge that was rounded so, and the LoRAs are taken out of it.
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
    own: tuple[int, ...] = ()
    prefix: str = ""
    further: tuple[Plan, ...] = ()
    lock: Lock | None = None
    undo: Rounding | None = None

    @property
    def parts(self) -> tuple[Plan, ...]:
        """The plans of all components of the build."""
        return (self, *self.further)

    @property
    def component(self) -> str:
        """The folder of the component in its pipeline; empty where the base is no pipeline."""
        return self.checkpoint.component

    @property
    def is_of_other_components(self) -> bool:
        """True where more or another component of a pipeline is fused than the transformer."""
        return bool(self.further) or self.component not in ("", COMPONENT)

    def components_of(self, number: int) -> list[str]:
        """The components that a LoRA of the build is fused into, by its number."""
        return [part.component for part in self.parts if number in part.own]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of all components of the build."""
        return tuple(shard for part in self.parts for shard in part.checkpoint.shards)

    def with_loras(self, inputs: Sequence[LoraInput], selection: Selection) -> Plan:
        """The plan of other LoRAs for the same base.

        Raises:
            Refused: see `make_plan`.
        """
        base = self.checkpoint
        if base.kind != "pipeline":
            return make_plan(base, inputs, selection)
        names = [*(shard.relative for shard in self.shards), *base.others]
        plan = plan_base(base.root, inputs, selection, names=names, label=base.label, streamed=base.streamed)
        return replace(plan, lock=self.lock)

    @property
    def is_laid_out_anew(self) -> bool:
        """True where tensors of the result have other dtypes, and so other places, than the base's."""
        return not self.requantise and (self.stored is not None or self.dtype is not None)

    def written(self, tensor: TensorInfo) -> str:
        """The dtype in which a plain tensor is written: integers and floats of 8 bits or fewer stay as they are."""
        return self.dtype if self.dtype and tensor.dtype in dtypes.ROUNDABLE else tensor.dtype

    @property
    def fused_shards(self) -> tuple[Shard, ...]:
        """The shards of all components of the build that are written anew, in the base's order."""
        return tuple(shard for part in self.parts for shard in part.own_fused_shards)

    @property
    def own_fused_shards(self) -> tuple[Shard, ...]:
        """The shards of this component that are written anew.

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
        return all(
            part.dtype is None and all(_beyond_plain(target) is None for target in part.targets.values())
            for part in self.parts
        )

    @property
    def provenance(self) -> str:
        """The entry in a fused shard's header, as JSON: base, LoRAs and scales, the same wherever it is made."""
        loras = [
            {"sha256": lora.sha256, "scale": given.scale, **_config(lora)}
            for given, lora in sorted(((self.inputs[number], self.loras[number]) for number in self.own), key=_order)
        ]
        selected = self.selection.entries
        source = {} if self.stored is None else {"source": self.source, "requantised": self.requantise}
        dtype = {} if self.dtype is None else {"dtype": self.dtype}
        of = {"merged" if self.undo else "base": self.checkpoint.label}
        return json.dumps({**of, "loras": loras, **selected, **source, **dtype}, sort_keys=True)

    @property
    def entry(self) -> str:
        """The name of that entry."""
        return UNMERGED if self.undo else PROVENANCE

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
        reached: set[str] = set()
        for part in self.parts:
            names = {tensor.name: name for name, tensor in part.checkpoint.parameters().items()}
            reached |= {*part.skipped, *(names[name] for name in part.targets)}
        return self.selection.reach(reached)

    @property
    def modules(self) -> int:
        """Modules in the LoRA files, summed over files: what has to be fused in the build."""
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
    """Match every LoRA against a base that is open, or that component of it.

    `dtype` is a key of `dtypes.OUTPUTS`: that of all floats of the result, or None for the base's own.

    LoRAs are summed in the order of their sha256, so the order on a command line cannot show in the result. `digests`
    are those of `LoraFile`, `requantise` is that of `Plan`.

    Raises:
        BadScale: a scale is not finite.
        BadLora: a file cannot be used (see `open_lora` and `match_targets` for the kinds), or is for another component.
        BadCheckpoint: the base cannot be fused into, or a target is quantised and cannot be decoded, or of a dtype that
            is not rounded to.
        BadConfig: a pattern of the selection matches no target, or it leaves none, or leaves out what would be fused;
            or nothing can be quantised again; or there is no such dtype.
        MissingExtra: a target is not plain (see `Plan.plain`), and torch is not installed.
    """
    fitness.refuse_unfit(checkpoint)
    chosen = selection or Selection()
    component = checkpoint.component
    routed = route_to_one(inputs, chosen, digests=digests, component=component, root=checkpoint.root)
    return _plan_components((checkpoint,), routed, chosen, dtype, requantise=requantise)


def plan_base(  # noqa: PLR0913 - by keyword, each is a choice of its own
    root: Path,
    inputs: Sequence[LoraInput],
    selection: Selection | None = None,
    *,
    names: Iterable[str] | None = None,
    label: str | None = None,
    dtype: str | None = None,
    digests: bool = False,
    requantise: bool = False,
    streamed: direct_io.StreamedFiles | None = None,
    undo: Rounding | None = None,
) -> Plan:
    """Open a base and the components of it that LoRAs are for, and match them; see `make_plan`.

    A pipeline may have several: a LoRA is for the component that it names, or for those that its keys name. `names`,
    `label` and `streamed` are those of `open_checkpoint`. With `undo` the base is a merge that was rounded so, and the
    LoRAs are to be taken out of it.

    Raises:
        Refused: as `make_plan`; or they cannot be taken out, see `undone_plan`.
    """
    chosen = selection or Selection()
    there = repository_files.component_names(root)
    if not there:
        merged = open_checkpoint(root, None, names, label, streamed=streamed)
        base = unmarked(merged) if undo else merged
        plan = make_plan(base, inputs, chosen, dtype=dtype, digests=digests, requantise=requantise)
        return undone_plan(plan, merged, undo) if undo else plan
    main = repository_files.main_component(there)
    routed = route(inputs, chosen, digests=digests, main=main, available=there)
    first, *more = components(routed, main)
    merged = open_checkpoint(root, first, names, label, more, streamed)
    base = unmarked(merged) if undo else merged
    opened = (base, *base.further)
    for one in opened:
        fitness.refuse_unfit(one)
    plan = _plan_components(opened, routed, chosen, dtype, requantise=requantise)
    return undone_plan(plan, merged, undo) if undo else plan


def _plan_components(
    checkpoints: Sequence[Checkpoint],
    routed: Sequence[RoutedLora],
    chosen: Selection,
    dtype: str | None,
    *,
    requantise: bool,
) -> Plan:
    """Plan all components, and check the selection against all of them together."""
    matched = [_matched(checkpoint, routed, chosen) for checkpoint in checkpoints]
    fusable = {
        key
        for checkpoint in checkpoints
        for one in routed
        if checkpoint.component in one.parts
        for key in one.parts[checkpoint.component].left_out_in(checkpoint.parameters())
    }
    chosen.check_left_out({key for one in routed for key in one.lora.left_out}, fusable.__contains__)
    chosen.check({name for deltas in matched for name in deltas})
    plans = [
        _planned(checkpoint, routed, deltas, chosen, dtype, requantise=requantise)
        for checkpoint, deltas in zip(checkpoints, matched, strict=True)
    ]
    if requantise:
        targets = [target for plan in plans for target in plan.targets.values()]
        _refuse_unmade(checkpoints[0], [target.stored for target in targets if target.stored])
    if len(plans) > 1:
        plans = [replace(plan, prefix=f"{plan.component}/") for plan in plans]
    return replace(plans[0], further=tuple(plans[1:]))


def _matched(checkpoint: Checkpoint, routed: Sequence[RoutedLora], chosen: Selection) -> dict[str, list[ScaledDelta]]:
    """Everything that is to be added to the parameters of a component."""
    weights = checkpoint.parameters()
    deltas: dict[str, list[ScaledDelta]] = {}
    for one in sorted(routed, key=lambda one: _order((one.given, one.lora))):
        if (part := one.parts.get(checkpoint.component)) is None:
            continue
        with fitness.blaming_a_quantised_base(checkpoint):
            matched = match_targets(part.deltas, weights, str(one.lora.path), one.lora.adds_the_same)
        for name, placed in matched.items():
            _refuse_cut_columns(one.lora, placed)
            if checkpoint.streamed is not None:
                _refuse_lengths_of_columns(one.lora, placed)
            scale = one.given.scale * (chosen.share(name) or 0.0)
            deltas.setdefault(name, []).extend(ScaledDelta(one.lora, part_of, scale) for part_of in placed)
    for name, scaled in deltas.items():
        _refuse_shared_replacement(name, scaled)
    return deltas


def _planned(
    checkpoint: Checkpoint,
    routed: Sequence[RoutedLora],
    deltas: Mapping[str, list[ScaledDelta]],
    chosen: Selection,
    dtype: str | None,
    *,
    requantise: bool,
) -> Plan:
    """The plan of one component."""
    weights = checkpoint.parameters()
    skipped = tuple(sorted(name for name in deltas if chosen.share(name) is None))
    kept = {name: scaled for name, scaled in deltas.items() if name not in skipped}
    stored = checkpoint.stored()
    targets = _targets(checkpoint, {weights[name].name: scaled for name, scaled in kept.items()}, stored)
    codes = any(target.stored for target in targets.values())
    decoded = codes or any(shard.is_gguf for shard in checkpoint.shards) or bool(dtype and stored.tensors)
    if decoded and stored.refused:
        raise next(iter(stored.refused.values()))
    if (beyond := next(filter(None, map(_beyond_plain, targets.values())), None)) is not None:
        require("torch", beyond)
    return Plan(
        checkpoint,
        tuple(one.given for one in routed),
        tuple(one.lora for one in routed),
        targets,
        chosen,
        skipped,
        stored if decoded else None,
        requantise,
        _converted(checkpoint, dtype, decoded=decoded, requantise=requantise),
        tuple(number for number, one in enumerate(routed) if checkpoint.component in one.parts),
    )


def plan_of(
    base: Lock,
    loras: Mapping[str, Lock],
    params: Recipe,
    *,
    root: Path | None = None,
    streamed: direct_io.StreamedFiles | None = None,
) -> Plan:
    """Match the pinned LoRAs against the pinned base, as the recipe chooses and scales them.

    The base is what its lock says, on this machine; or in `root`, of one that is `streamed` (`open_checkpoint`).

    Raises:
        BadSource: a LoRA is not what its lock says, by the bytes that were read.
    """
    inputs = paths.lora_inputs(loras, params)
    plan = plan_base(
        root or hf_cache.locate(base),
        inputs,
        params.fuse.selection,
        names=base.files,
        label=base.label if base.repo_id else None,
        dtype=params.fuse.dtype,
        digests=params.fuse.inputs == "hash",
        streamed=streamed,
    )
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
    if plan.checkpoint.streamed is not None and plan.checkpoint.label is not None:
        base = plan.checkpoint.label.partition("@")[0]
    warnings = pair_warnings(base, [hf_cache.cached_from(given.path.absolute()) for given in plan.inputs])
    warnings += alpha_warnings([(lora.path.name, lora.missing_alphas) for lora in plan.loras])
    warnings += expert_warnings(
        repository_files.component_names(plan.checkpoint.root),
        [(given.path.name, plan.components_of(number)) for number, given in enumerate(plan.inputs)],
    )
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


def _refuse_lengths_of_columns(lora: LoraFile, placed: Sequence[PlacedDelta]) -> None:
    """Refuse DoRA by column for weights that are streamed: a column has its length when the whole weight was read."""
    for one in placed:
        if lora.has_lengths_of_columns(one.delta):
            raise BadLora(
                f"{lora.path}: {one.delta.module!r} has a length for each column (dora_scale), for which the weight is "
                "read twice, and what arrives is read once; fetch the base first (`hf download`), and name the folder"
            )


def _refuse_shared_replacement(name: str, deltas: Sequence[ScaledDelta]) -> None:
    """Refuse values in the place of the base's that are to be scaled, or that something is to be added to.

    Raises:
        BadLora: see above.
    """
    for one in deltas:
        if not one.placed.delta.is_replacement:
            continue
        said = f"{one.lora.path}: {one.placed.delta.module!r} is put in the place of the base's {name!r} (set_weight)"
        if one.scale not in (0.0, 1.0):
            raise BadLora(
                f"{said}, which has no strength, and the scale is {one.scale:g}; fuse at 1.0, or leave it out (--skip)"
            )
        if len(deltas) > 1:
            raise BadLora(
                f"{said}, and {len(deltas) - 1} more change it too, so the order would decide; take one of them out"
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
    if checkpoint.streamed is not None:
        raise BadConfig(
            f"--dtype (fuse.dtype) is {dtype}: tensors of another dtype lie in another order, and weights that arrive "
            "are read in their own; fetch the base first (`hf download`), and name the folder"
        )
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
