"""PEFT's configuration of an adapter, read by PEFT itself where it is installed, else by a few lines that do the same.

`adapter_config.json` and diffusers' `lora_adapter_metadata` are such configurations. What a field may say and the merge
still be the product of the factors was read in PEFT 0.21.2, peft/tuners/lora/config.py, layer.py and variants.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

# Fields that say how strong the product is, with PEFT's defaults.
STRENGTH: Mapping[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "lora_bias": False,
}
# Fields that change no merged weight, whatever they say: names of modules, the training, the origin.
SILENT = {
    *STRENGTH,
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("lora_dropout", "qalora_group_size", "eva_config", "velora_config"),
}
# Fields of which some values are harmless; of all others, named or not, those that are unset.
HARMLESS: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "true", "gaussian", "eva", "orthogonal", "mica"),  # the others move weights of the base
}


@dataclass(frozen=True, slots=True)
class Claim:
    """One place's claim of rank, alpha and kind; None is not said there, and `component` is whom it speaks of.

    `default_alpha` counts where no place says an alpha. `only_rank` are the factors that the claim is of.
    """

    place: str
    component: str = ""
    rank: float | None = None
    alpha: float | None = None
    default_alpha: float | None = None
    stabilized: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool | None = None
    bias: bool | None = None
    only_rank: int | None = None

    def rank_of(self, names: Sequence[str]) -> float | None:
        """The rank claimed for a module, by the names that it has in the file and in the base."""
        return _by_pattern(self.rank_pattern, names, self.rank)

    def alpha_of(self, names: Sequence[str]) -> float | None:
        """The alpha claimed for a module."""
        return _by_pattern(self.alpha_pattern, names, self.alpha)


def _by_pattern(patterns: Mapping[str, float], names: Sequence[str], otherwise: float | None) -> float | None:
    if not patterns:  # the import takes seconds
        return otherwise
    matches = _pattern_reader()
    matched = (value for pattern, value in patterns.items() if any(matches(pattern, name) for name in names))
    return next(matched, otherwise)


@cache
def _pattern_reader() -> Callable[[str, str], bool]:
    try:
        from peft.utils.other import get_pattern_key
    except ImportError:
        return lambda pattern, name: re.match(rf"(.*\.)?({pattern})$", name) is not None
    return lambda pattern, name: get_pattern_key([pattern], name) == pattern


def read_config(
    entries: Mapping[str, Any], place: str, component: str, problems: list[str], *, whole: bool = True
) -> Claim | None:
    """The claim of a configuration's fields; None, and a problem, where it cannot be read.

    A `whole` one is loaded by PEFT, and PEFT's default of alpha counts where it says none.
    """
    for name, value in entries.items():
        if name not in SILENT and value and value not in HARMLESS.get(name, ()):
            problems.append(f"{place}: {name} is {value!r}, and then a merge is not base + factors")
    try:
        read = _loaded(entries) if whole else SimpleNamespace(**entries)
        said = {name: getattr(read, name) for name in STRENGTH if entries.get(name) is not None}
        for pattern in (*said.get("rank_pattern", ()), *said.get("alpha_pattern", ())):
            re.compile(pattern)
        return Claim(
            place,
            component,
            rank=_number(said.get("r")),
            alpha=_number(said.get("lora_alpha")),
            default_alpha=_number(read.lora_alpha) if whole else None,
            stabilized=_flag(said.get("use_rslora")) or False,
            rank_pattern={key: float(value) for key, value in said.get("rank_pattern", {}).items()},
            alpha_pattern={key: float(value) for key, value in said.get("alpha_pattern", {}).items()},
            dora=_flag(said.get("use_dora")),
            bias=_flag(said.get("lora_bias")),
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError, ImportError, re.error) as error:
        problems.append(f"{place} is no configuration of a LoRA: {error}")
        return None


def _loaded(entries: Mapping[str, Any]) -> Any:
    """The configuration as PEFT's own class has it, of the fields that are set and not silent."""
    told = {name: value for name, value in entries.items() if name in STRENGTH or (value and name not in SILENT)}
    try:
        from peft import LoraConfig
    except ImportError:
        return SimpleNamespace(**{**STRENGTH, **told})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraConfig.from_peft_type(**{**told, "peft_type": "LORA"})


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool):
        raise TypeError(f"{value!r} stands for a number")
    return float(value)


def _flag(value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{value!r} stands for true or false")
    return value
