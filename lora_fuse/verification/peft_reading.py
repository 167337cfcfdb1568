"""PEFT's configuration of an adapter, read by PEFT itself where it is installed, else by a few lines that do the same.

Patterns are matched here, as PEFT would take as long as somebody's pattern takes; a test holds both together.

`adapter_config.json` and diffusers' `lora_adapter_metadata` are such configurations. What a field may say and the merge
still be the product of the factors was read in PEFT 0.21.2, peft/tuners/lora/config.py, layer.py and variants.py.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lora_fuse.errors import BadLora

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


SECONDS = 5.0  # for all matches of one place's patterns
LARGEST = 1000  # characters of a pattern, and copies that its counts make of a part
NAME = re.compile(r"\^?[\w.-]*")  # a pattern that is a name, quick for any engine
COUNT = re.compile(r"\{(\d*),?(\d*)\}")


class Tails:
    """Numbers by a pattern of how names end, from a dot on; the first pattern counts.

    Raises:
        ValueError: a pattern is none, or too large.
    """

    def __init__(self, numbers: Mapping[str, Any], place: str) -> None:
        self.place = place
        self.seconds = SECONDS
        self.numbers = [(_ending(pattern), float(number)) for pattern, number in numbers.items()]

    def find(self, names: Sequence[str], otherwise: float | None) -> float | None:
        """The number of a module, by the names that it has in the file and in the base.

        Raises:
            BadLora: it takes too long.
        """
        started = time.monotonic()
        try:
            found = (number for ending, number in self.numbers if any(self._ends(name, ending) for name in names))
            return next(found, otherwise)
        except TimeoutError as error:
            raise BadLora(
                f"{self.place}: its patterns take more than {SECONDS:g} s to match, as at {names[0]!r}; spell the "
                "names of modules out"
            ) from error
        finally:
            self.seconds -= time.monotonic() - started

    def _ends(self, name: str, ending: Any) -> bool:
        if self.seconds <= 0:
            raise TimeoutError
        limit = {} if isinstance(ending, re.Pattern) else {"timeout": self.seconds}
        return ending.match(name, **limit) is not None


def _ending(pattern: str) -> Any:
    """The expression of PEFT's `get_pattern_key`: of `regex`, which can be told a time, unless it is but a name."""
    import regex

    whole = rf"(.*\.)?({pattern})$"
    copies = math.prod(max([1, *map(int, filter(None, pair))]) for pair in COUNT.findall(pattern))
    if max(len(pattern), copies) > LARGEST or "{" in COUNT.sub("", pattern):
        raise ValueError(f"{pattern[:60]!r} is too large a pattern, or has a brace that is no count")
    try:
        plain = re.compile(whole)
        return plain if NAME.fullmatch(pattern) else regex.compile(whole)
    except (re.error, regex.error, RecursionError, ArithmeticError) as error:
        raise ValueError(f"{pattern[:60]!r} is no pattern: {error}") from error


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
    rank_pattern: Tails | None = None
    alpha_pattern: Tails | None = None
    dora: bool | None = None
    bias: bool | None = None
    only_rank: int | None = None

    def rank_of(self, names: Sequence[str]) -> float | None:
        """The rank claimed for a module, by the names that it has in the file and in the base."""
        return self.rank_pattern.find(names, self.rank) if self.rank_pattern else self.rank

    def alpha_of(self, names: Sequence[str]) -> float | None:
        """The alpha claimed for a module."""
        return self.alpha_pattern.find(names, self.alpha) if self.alpha_pattern else self.alpha


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
        return Claim(
            place,
            component,
            rank=_number(said.get("r")),
            alpha=_number(said.get("lora_alpha")),
            default_alpha=_number(read.lora_alpha) if whole else None,
            stabilized=_flag(said.get("use_rslora")) or False,
            rank_pattern=Tails(said["rank_pattern"], place) if said.get("rank_pattern") else None,
            alpha_pattern=Tails(said["alpha_pattern"], place) if said.get("alpha_pattern") else None,
            dora=_flag(said.get("use_dora")),
            bias=_flag(said.get("lora_bias")),
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError, ImportError) as error:
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
        try:
            return LoraConfig.from_peft_type(**{**told, "peft_type": "LORA"})
        except Exception as error:  # its fields are classes of their own, which fail in ways of their own
            raise ValueError(f"PEFT cannot load it, {type(error).__name__}: {error}") from error


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
