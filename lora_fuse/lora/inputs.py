"""The LoRAs that are given, and a selection of targets by patterns on the base's module names. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from lora_fuse.errors import BadConfig, BadScale


@dataclass(frozen=True, slots=True)
class LoraInput:
    """A LoRA to fuse and the scale to fuse it at; `name` is what the recipe calls it."""

    name: str
    path: Path
    scale: float


@dataclass(frozen=True, slots=True)
class Selection:
    """Shell patterns (`*` also matches dots) on the base's names of modules, without `.weight` or `.bias`.

    A module is fused if it matches some pattern of `only` (or that is empty) and none of `skip`. Of `scales`, the first
    pattern that matches a module gives a number that every LoRA's scale is multiplied by there.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, scale in self.scales.items():
            if not math.isfinite(scale):
                raise BadScale(f"the scale of {pattern!r} is {scale}, not a finite number; 1.0 changes nothing")

    @property
    def everything(self) -> bool:
        """True where nothing is left out and nothing is scaled."""
        return not (self.only or self.skip or self.scales)

    def share(self, parameter: str) -> float | None:
        """The factor of the scale for a parameter of the base; None where the parameter is left as it is."""
        module = parameter.rpartition(".")[0]
        if (self.only and not _matches(module, self.only)) or _matches(module, self.skip):
            return None
        return next((scale for pattern, scale in self.scales.items() if fnmatchcase(module, pattern)), 1.0)

    def check(self, parameters: Iterable[str]) -> None:
        """Refuse a pattern that matches none of the targets: it is mistyped.

        Raises:
            BadConfig: there is such a pattern, or nothing is left to fuse.
        """
        modules = {parameter.rpartition(".")[0] for parameter in parameters}
        for name, patterns in (("only", self.only), ("skip", self.skip), ("scales", tuple(self.scales))):
            for pattern in patterns:
                if not any(fnmatchcase(module, pattern) for module in modules):
                    raise BadConfig(
                        f"{name}: {pattern!r} matches none of the {len(modules)} modules that the LoRA targets, such "
                        f"as {min(modules, default='none')!r}; a pattern is for the whole name, * matches anything"
                    )
        if not any(self.share(parameter) is not None for parameter in parameters):
            raise BadConfig(f"only {list(self.only)} and skip {list(self.skip)} leave nothing to fuse; loosen them")


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)
