"""The scaling that PEFT keeps outside the tensors: `adapter_config.json`, or the same in a file's header. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_fuse.errors import BadLora

Number = TypeVar("Number", int, float)
# What would change the merge and has no formula here. A value that is false, empty or null is the usual one.
REFUSED = ("fan_in_fan_out", "alora_invocation_tokens", "use_qalora", "corda_config", "arrow_config", "megatron_config")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Rank and alpha of every module, as far as a configuration tells; patterns as PEFT matches them."""

    where: str = ""
    rank: int | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int | None:
        """The rank that the configuration gives a module; None if it gives none."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str, rank: int) -> float:
        """The alpha that the configuration gives a module; without one, its rank: said here and nowhere else."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return float(rank) if alpha is None else float(alpha)

    def factor(self, alpha: float, rank: int) -> float:
        """The factor of a low-rank product: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

        Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732.
        """
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def _by_pattern(patterns: Mapping[str, Number], module: str, otherwise: Number | None) -> Number | None:
    """As `peft.utils.other.get_pattern_key`: the first pattern that is a tail of the name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def parse_adapter_config(text: str, where: str) -> AdapterConfig:
    """Read PEFT's `adapter_config.json`, or the same JSON that diffusers keeps in a header under ``transformer.``.

    Raises:
        BadLora: it is not such JSON, a pattern is no regular expression, or it asks for what cannot be merged.
    """
    try:
        entries = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        config = AdapterConfig(
            where=where,
            rank=_number(entries.get("r"), int),
            alpha=_number(entries.get("lora_alpha"), float),
            rank_stabilized=bool(entries.get("use_rslora")),
            rank_pattern={str(k): int(v) for k, v in (entries.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (entries.get("alpha_pattern") or {}).items()},
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise BadLora(f"{where} is not a PEFT configuration: {error}") from error
    for key in REFUSED:
        if entries.get(key):
            raise BadLora(f"{where} sets {key}={entries[key]!r}, which cannot be merged here; bake it with its trainer")
    if (entries.get("peft_type") or "LORA") != "LORA":
        raise BadLora(f"{where}: peft_type is {entries['peft_type']}; only LORA, with or without DoRA, can be merged")
    return config


def _number(value: Any, kind: Any) -> Any:
    return None if value is None else kind(value)
