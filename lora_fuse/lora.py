"""What a LoRA file means: which keys make an update of which module. Pure: names, shapes and scalars in, updates out.

A LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1) changes a weight by ``scale * (alpha / rank) * up @ down``.
Every key is consumed, or the file is refused. ``alpha`` absent means ``alpha = rank``: said here and nowhere else.

A key format is a row of `FORMATS`; a prefix that a trainer puts before module names is a row of `PREFIXES`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.errors import BadLora, ShapeMismatch, UnmatchedTargets
from lora_fuse.header import TensorInfo

ALPHA = ".alpha"


@dataclass(frozen=True, slots=True)
class LoraInput:
    """A LoRA to fuse and the scale to fuse it at; `name` is what the recipe calls it."""

    name: str
    path: Path
    scale: float


@dataclass(frozen=True, slots=True)
class Format:
    """How one family of trainers names the two factors of a module."""

    name: str
    down: str
    up: str


FORMATS = (
    Format("lightning", ".lora_down.weight", ".lora_up.weight"),
    Format("peft", ".lora_A.weight", ".lora_B.weight"),
)

PREFIXES = ("", "transformer.", "diffusion_model.", "base_model.model.", "base_model.model.transformer.")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The scaling that PEFT keeps outside the tensors: one alpha for every module (`adapter_config.json`)."""

    lora_alpha: float | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """One low-rank update as the file names it.

    `down` is the key of A: (rank, in_features); `up` the key of B: (out_features, rank).
    """

    module: str
    down: str
    up: str
    rank: int
    alpha: float
    out_features: int
    in_features: int


def parse_adapter_config(text: str, where: str) -> AdapterConfig:
    """Read PEFT's `adapter_config.json`, or the same JSON that diffusers keeps in a header.

    Raises:
        BadLora: it is not JSON, or it asks for a scaling that would be ignored here.
    """
    try:
        entries = json.loads(text)
        plain = {key.removeprefix("transformer."): value for key, value in entries.items()}
    except (ValueError, AttributeError) as error:
        raise BadLora(f"{where} is not a PEFT configuration: {error}") from error
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if plain.get(key):
            raise BadLora(
                f"{where} sets {key}={plain[key]!r}, which this version cannot merge; bake it with its trainer"
            )
    alpha = plain.get("lora_alpha")
    return AdapterConfig(float(alpha) if alpha is not None else None)


def parse_lora(
    tensors: Mapping[str, TensorInfo], alphas: Mapping[str, float], config: AdapterConfig, where: str
) -> tuple[Update, ...]:
    """Group a file's keys into updates, every key exactly once.

    Args:
        tensors: the file's header.
        alphas: the values of its `.alpha` keys.
        config: the scaling that a PEFT configuration gives to modules without an alpha of their own.
        where: what to call the file in an error.

    Raises:
        BadLora: the file is empty, a key is of no known format, or a factor is alone.
        ShapeMismatch: two factors do not fit each other.
    """
    if not tensors:
        raise BadLora(f"{where} is empty: it has no tensors")
    left = dict(tensors)
    updates = [_update(module, row, left, alphas, config, where) for module, row in _modules(tensors)]
    if left:
        first = sorted(left)[0]
        raise BadLora(
            f"{where}: {len(left)} of {len(tensors)} keys belong to no known LoRA format or have no partner, "
            f"first {first!r}; known are {', '.join(f'X{row.down} + X{row.up}' for row in FORMATS)} and X{ALPHA}"
        )
    return tuple(sorted(updates, key=lambda update: update.module))


def _modules(tensors: Mapping[str, TensorInfo]) -> Iterable[tuple[str, Format]]:
    for row in FORMATS:
        for name in tensors:
            module = name.removesuffix(row.down)
            if module != name and module + row.up in tensors:
                yield module, row


def _update(
    module: str,
    row: Format,
    left: dict[str, TensorInfo],
    alphas: Mapping[str, float],
    config: AdapterConfig,
    where: str,
) -> Update:
    down, up = left.pop(module + row.down), left.pop(module + row.up)
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ShapeMismatch(
            f"{where}: the factors of {module!r} do not multiply: down is {list(down.shape)} and up {list(up.shape)}, "
            "expected [rank, in] and [out, rank]"
        )
    rank = down.shape[0]
    alpha = config.lora_alpha if config.lora_alpha is not None else float(rank)
    if left.pop(module + ALPHA, None) is not None:
        alpha = alphas[module + ALPHA]
    if not math.isfinite(alpha):
        raise BadLora(f"{where}: the alpha of {module!r} is {alpha}, not a finite number; the file is broken")
    return Update(module, down.name, up.name, rank, alpha, up.shape[0], down.shape[1])


def match_targets(updates: Iterable[Update], weights: Mapping[str, TensorInfo], where: str) -> dict[str, Update]:
    """Find each update's weight in the base by the base's own names.

    Args:
        updates: of one file.
        weights: the base's tensors by name.
        where: what to call the file in an error.

    Returns:
        The updates by the name of the base tensor that they change.

    Raises:
        UnmatchedTargets: a module is not in the base.
        ShapeMismatch: an update does not fit its weight.
        BadLora: two modules of the file mean the same weight.
    """
    found: dict[str, Update] = {}
    missing: list[str] = []
    for update in updates:
        name = _weight_name(update.module, weights)
        if name is None:
            missing.append(update.module)
            continue
        if name in found:
            raise BadLora(f"{where}: {found[name].module!r} and {update.module!r} both mean the base's {name!r}")
        _check_fit(update, weights[name], where)
        found[name] = update
    if missing:
        raise UnmatchedTargets(_missing_message(missing, len(found), weights, where))
    return found


def _weight_name(module: str, weights: Mapping[str, TensorInfo]) -> str | None:
    for prefix in PREFIXES:
        name = module.removeprefix(prefix) + ".weight"
        if module.startswith(prefix) and name in weights:
            return name
    return None


def _check_fit(update: Update, weight: TensorInfo, where: str) -> None:
    if weight.shape != (update.out_features, update.in_features):
        raise ShapeMismatch(
            f"{where}: {update.module!r} gives a {update.out_features}x{update.in_features} update, and the base's "
            f"{weight.name!r} is {'x'.join(map(str, weight.shape))}; this LoRA was made for another base"
        )


def _missing_message(missing: list[str], matched: int, weights: Mapping[str, TensorInfo], where: str) -> str:
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    near = difflib.get_close_matches(missing[0], modules, n=1, cutoff=0.0)
    return (
        f"{where}: {len(missing)} of {len(missing) + matched} modules are not in the base, first {missing[0]!r} "
        f"(nearest in the base: {near[0] if near else 'none'!r}); use the LoRA made for this base, or the other base"
    )
