"""LoRAs kept beside a base that stays as it is: the change is exact, at any precision of the base.

A file for each LoRA, with diffusers' names and the factors' own bytes. The strength that was asked for is in its
header, as diffusers writes and reads it, so it is loaded at a weight of 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath

from lora_fuse.checkpoint import PROVENANCE, Header, TensorInfo, dtypes
from lora_fuse.errors import BadConfig
from lora_fuse.fusion.plan import Plan, ScaledDelta
from lora_fuse.lora import LoraFile
from lora_fuse.machine import direct_io
from lora_fuse.models import COMPONENT

FOLDER = "loras"
STRENGTH = "lora_adapter_metadata"  # diffusers/loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY
SIDES = {"down": "lora_A.weight", "up": "lora_B.weight"}


def side_channel(plan: Plan) -> dict[str, bytes]:
    """The LoRAs of a plan as files beside the base, by POSIX path.

    Raises:
        BadConfig: something of a LoRA is no product of two matrices, and has no such names; or it is of several
            components.
        BadLora: a file cannot be read any more.
    """
    if plan.dtype is not None:
        raise BadConfig(
            "--dtype (fuse.dtype) is of weights that are written, and --side-channel writes none: leave it out"
        )
    if plan.further:
        names = ", ".join(part.component for part in plan.parts)
        raise BadConfig(f"LoRAs of one component are kept beside a base, and these are of {names}: fuse them")
    made = {}
    count = Counter(given.name for given in plan.inputs)
    bare = {tensor.name: name for name, tensor in plan.checkpoint.parameters().items()}
    for number, (given, lora) in enumerate(zip(plan.inputs, plan.loras, strict=True), 1):
        deltas = {
            bare[name].removesuffix(".weight"): scaled
            for name, target in plan.targets.items()
            for scaled in target.deltas
            if scaled.lora is lora
        }
        for scaled in deltas.values():
            _refuse_other_than_products(scaled)
        name = given.name if count[given.name] == 1 else f"{given.name}-{number}"
        made[f"{FOLDER}/{name}.safetensors"] = _file(lora, deltas, _component(plan), plan.checkpoint.label)
    return made


def _component(plan: Plan) -> str:
    """The name of the component that diffusers puts before a LoRA's names."""
    folder = PurePosixPath(plan.checkpoint.shards[0].relative).parent.name
    return folder if plan.checkpoint.kind == "pipeline" else COMPONENT


def _refuse_other_than_products(scaled: ScaledDelta) -> None:
    delta = scaled.placed.delta
    if scaled.placed.runs is not None:
        raise BadConfig(
            f"{scaled.lora.path}: {delta.module!r} is rows of several weights of the base, or of a part of one, and "
            "beside a base factors are kept as they are; leave --side-channel out"
        )
    if set(delta.keys) - {"alpha"} != set(SIDES) or any(len(_stored(scaled, side).shape) != 2 for side in SIDES):
        raise BadConfig(
            f"{scaled.lora.path}: {delta.module!r} is {delta.algorithm} of {', '.join(delta.keys)}, and beside a base "
            "are kept products of two matrices, lora_A and lora_B; leave --side-channel out"
        )


def _stored(scaled: ScaledDelta, side: str) -> TensorInfo:
    return scaled.lora.header.tensors[scaled.placed.delta.keys[side]]


def _file(lora: LoraFile, deltas: Mapping[str, ScaledDelta], component: str, base: str | None) -> bytes:
    """One LoRA as a safetensors file: the factors' own bytes, and in the header their strength and their source."""
    tensors = {
        f"{component}.{module}.{ending}": _stored(scaled, side)
        for module, scaled in deltas.items()
        for side, ending in SIDES.items()
    }
    entries: dict[str, dict[str, object]] = {}
    places: dict[str, tuple[int, int]] = {}
    at = 0
    ordered = sorted(tensors, key=lambda name: (-dtypes.DTYPES[tensors[name].dtype].bits, name))
    for name in ordered:
        tensor = tensors[name]
        places[name] = (at, at + tensor.nbytes)
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(places[name])}
        at += tensor.nbytes
    source = {"base": base, "side_channel_of": lora.sha256}
    strength = {f"{component}.{name}": value for name, value in _strength(deltas).items()}
    metadata = {"format": "pt", STRENGTH: json.dumps(strength), PROVENANCE: json.dumps(source, sort_keys=True)}
    data = bytearray(at)
    with direct_io.open_shard(lora.path) as file:
        for name in ordered:
            start, end = places[name]
            file.fill(memoryview(data)[start:end], tensors[name].start)
    return Header.pack(entries, metadata) + bytes(data)


def _strength(deltas: Mapping[str, ScaledDelta]) -> dict[str, object]:
    """PEFT's configuration: ``lora_alpha / r`` is the file's own factor times the scale that was asked for."""
    ranks = {module: _stored(scaled, "down").shape[0] for module, scaled in deltas.items()}
    alphas = {module: scaled.placed.delta.factor * scaled.scale * ranks[module] for module, scaled in deltas.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1.0
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: one for module, one in ranks.items() if one != rank},
        "alpha_pattern": {module: one for module, one in alphas.items() if one != alpha},
        "target_modules": sorted(deltas),
    }
