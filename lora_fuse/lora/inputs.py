"""The LoRAs that are given, and a selection of targets by patterns on the base's module names. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadConfig, BadScale


@dataclass(frozen=True, slots=True)
class LoraInput:
    """A LoRA to fuse and the scale to fuse it at; `name` is what the recipe calls it.

    `component` is the folder of the pipeline's component that it is fused into. Without one its keys say that, each for
    itself: those that name none are for the main one.
    """

    name: str
    path: Path
    scale: float
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Shell patterns (`*` also matches dots) on the base's names of modules, without `.weight` or `.bias`.

    A module is fused if it matches some pattern of `only` (or that is empty) and none of `skip`. Of `scales`, the first
    pattern that matches a module gives a number that every LoRA's scale is multiplied by there.

    `leave_out` are patterns on whole keys of the LoRAs, of tensors that no module of the base is for: they are refused
    unless one of these names them.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern, scale in self.scales.items():
            if not math.isfinite(scale):
                raise BadScale(f"the scale of {pattern!r} is {scale}, not a finite number; 1.0 changes nothing")

    @property
    def everything(self) -> bool:
        """True where nothing is left out and nothing is scaled."""
        return not (self.only or self.skip or self.scales or self.leave_out)

    @property
    def entries(self) -> dict[str, Any]:
        """The patterns by kind, as a fused shard's header says them; nothing where everything is fused."""
        if self.everything:
            return {}
        return {name: value for name, value in asdict(self).items() if value or name != "leave_out"}

    def leaves_out(self, key: str) -> bool:
        """True for a LoRA's key that a pattern of `leave_out` names."""
        return _matches(key, self.leave_out)

    def reach(self, parameters: Iterable[str]) -> dict[str, list[str]]:
        """The modules that each pattern of `only` and `skip` matches, of LoRAs' targets, by ``KIND PATTERN``."""
        modules = sorted({parameter.rpartition(".")[0] for parameter in parameters})
        return {
            f"{kind} {pattern}": [module for module in modules if fnmatchcase(module, pattern)]
            for kind, patterns in (("only", self.only), ("skip", self.skip))
            for pattern in patterns
        }

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
                        + ("; keys of a LoRA that no module of the base is for: --leave-out" * (name == "skip"))
                    )
        if not any(self.share(parameter) is not None for parameter in parameters):
            raise BadConfig(f"only {list(self.only)} and skip {list(self.skip)} leave nothing to fuse; loosen them")

    def check_left_out(self, keys: Iterable[str], has_module: Callable[[str], bool]) -> None:
        """Refuse a pattern of `leave_out` that is not needed.

        `keys` are those of all LoRAs that are left out, `has_module` tells of one if the base has its module.

        Raises:
            BadConfig: a pattern leaves out nothing, or what would be fused.
        """
        left = sorted(keys)
        for pattern in self.leave_out:
            named = [key for key in left if fnmatchcase(key, pattern)]
            if not named:
                raise BadConfig(
                    f"leave_out: {pattern!r} names no key of the LoRA; it is a pattern of a whole key, as "
                    "'*.k_img.*': mend it, or take it out"
                )
            if fused := [key for key in named if has_module(key)]:
                raise BadConfig(
                    f"leave_out: {pattern!r} names {len(fused)} keys of {len(named)} whose modules are in the base, "
                    f"first {fused[0]!r}: it is for keys that no module is for; narrow it, or leave modules as they "
                    "are with --skip (fuse.skip)"
                )


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)
