"""The match of a delta to a parameter of the base, by the base's own names. Pure: no table of models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from lora_fuse.checkpoint import TensorInfo
from lora_fuse.errors import BadLora, ShapeMismatch, UnmatchedTargets, WrongPrefix
from lora_fuse.lora.key_formats import FLAT_PREFIXES, PREFIXES, spellings
from lora_fuse.lora.key_parser import LEAVE_OUT, SHOWN, LoraDelta
from lora_fuse.machine import text


def match_targets(deltas: Iterable[LoraDelta], weights: Mapping[str, TensorInfo], where: str) -> dict[str, LoraDelta]:
    """The deltas of one file, by the name of the base's tensor that each changes.

    Raises:
        UnmatchedTargets: a module is not in the base; `WrongPrefix` if all are, but for the beginning of the names.
        ShapeMismatch: a delta does not fit its parameter.
        BadLora: two deltas mean the same parameter, or a name could mean two modules of the base.
    """
    flat = _flat(weights)
    matched: dict[str, LoraDelta] = {}
    missing: list[str] = []
    for delta in deltas:
        name = _parameter(delta.module, delta.part, weights, flat, where)
        if name is None:
            missing.append(f"{delta.module}.{delta.part}")
            continue
        if name in matched:
            raise BadLora(f"{where}: {matched[name].module!r} and {delta.module!r} both mean the base's {name!r}")
        _check_fit(delta, weights[name], where)
        matched[name] = delta
    if missing:
        if not matched and (fault := _prefix_fault(missing, weights)) is not None:
            raise WrongPrefix(f"{where}: none of {len(missing)} modules is in the base as it is named; {fault}")
        raise UnmatchedTargets(_missing_message(missing, len(matched), weights, where))
    return matched


def modules_in(modules: Iterable[str], weights: Mapping[str, TensorInfo], where: str) -> set[str]:
    """The modules of a LoRA file, by their names there, that a base has.

    Raises:
        BadLora: a name could mean two modules of the base.
    """
    flat = _flat(weights)
    parts = ("weight", "bias")
    return {name for name in modules if any(_parameter(name, part, weights, flat, where) is not None for part in parts)}


def _flat(weights: Iterable[str]) -> dict[str, list[str]]:
    """The modules of a base by their names with underscores for dots."""
    flat: dict[str, list[str]] = defaultdict(list)
    for module in {name.rpartition(".")[0] for name in weights}:
        flat[module.replace(".", "_")].append(module)
    return flat


def _parameter(
    name: str, part: str, weights: Mapping[str, TensorInfo], flat: Mapping[str, list[str]], where: str
) -> str | None:
    dotted = (f"{module}.{part}" for module in spellings(name, PREFIXES))
    if (found := next((one for one in dotted if one in weights), None)) is not None:
        return found
    for spelling in spellings(name, FLAT_PREFIXES):
        modules = sorted(flat.get(spelling, []))
        if len(modules) > 1:
            raise BadLora(
                f"{where}: {name!r} could mean {' or '.join(map(repr, modules))} of the base; "
                "export the LoRA with dotted names"
            )
        if modules and f"{modules[0]}.{part}" in weights:
            return f"{modules[0]}.{part}"
    return None


def _check_fit(delta: LoraDelta, weight: TensorInfo, where: str) -> None:
    if not weight.shape or 0 in weight.shape:
        raise ShapeMismatch(
            f"{where}: {delta.module!r} is for the base's {weight.name!r}, of the shape {list(weight.shape)}, and only "
            "to rows of numbers something is added; take it out of the LoRA, or get a good copy of the base"
        )
    if (weight.shape[0], math.prod(weight.shape[1:])) != delta.shape:
        raise ShapeMismatch(
            f"{where}: {delta.module!r} gives a {'x'.join(map(str, delta.shape))} delta, and the base's "
            f"{weight.name!r} is {'x'.join(map(str, weight.shape))}; this LoRA was made for another base"
        )


def _missing_message(missing: list[str], matched: int, weights: Mapping[str, TensorInfo], where: str) -> str:
    shown = []
    for name in sorted(missing)[:SHOWN]:
        near = text.nearest(name, weights)
        shown.append(f"{name!r} (nearest in the base: {near[0] if near else 'none'!r})")
    return (
        f"{where}: {len(missing)} of {len(missing) + matched} modules are not in the base, first {', '.join(shown)}; "
        "use the LoRA made for this base, or the other base" + (LEAVE_OUT if matched else "")
    )


def _prefix_fault(missing: list[str], weights: Mapping[str, TensorInfo]) -> str | None:
    """The beginning that all names have too much, or that the base's have before all of them; None if neither."""
    first = missing[0].split(".")
    for dots in range(1, len(first) - 1):
        beginning = ".".join(first[:dots]) + "."
        if all(name.startswith(beginning) and name.removeprefix(beginning) in weights for name in missing):
            return f"all are, without {beginning!r} at the beginning of the names: take it off the LoRA's keys"
    bare = min(spellings(missing[0], PREFIXES), key=len)
    ahead = {weight.removesuffix(bare) for weight in weights if weight.endswith(f".{bare}")}
    for beginning in sorted(ahead):
        if all(beginning + min(spellings(name, PREFIXES), key=len) in weights for name in missing):
            return f"all are, with {beginning!r} at the beginning of the names: put it before the LoRA's keys"
    return None
