"""Two components of one class, one for high and one for low noise: a LoRA for one merges into the other. Pure.

Nothing in names of tensors or shapes tells them apart, so that only the name of a LoRA's file can.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from lora_fuse.models import families

NOISES = ("high", "low")  # in the order of the components of a family
_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)


def noise_of(filename: str) -> str | None:
    """The noise that a LoRA's file is for, by its name; None where it says neither, or both."""
    found = {word.lower() for word in _WORD.findall(filename.replace("_", "-"))}
    found |= {noise for noise in NOISES if f"{noise}noise" in re.sub(r"[-_ .]", "", filename.lower())}
    return found.pop() if len(found) == 1 else None


def expert_warnings(there: Collection[str], fused: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A sentence for each LoRA that is fused into the other expert than its name says, or for one that gets none.

    `there` are the components of the base, `fused` the LoRAs' filenames and the components that each is fused into.
    """
    experts = next((pair for pair in _pairs() if set(pair) <= set(there)), None)
    if experts is None:
        return []
    meant = dict(zip(NOISES, experts, strict=True))
    warnings = []
    changed: set[str] = set()
    for filename, components in fused:
        changed |= set(components)
        noise = noise_of(filename)
        others = [name for name in components if noise is not None and name in experts and name != meant[noise]]
        if noise is not None and others:
            warnings.append(
                f"{filename} is for {noise} noise by its name, which is the part of {meant[noise]}, and it is fused "
                f"into {others[0]}: both have the same names and shapes, so it merges, and pictures may be worse; "
                f"--component {meant[noise]} (loras.NAME.component) puts it there"
            )
    alone = [name for name in experts if name not in changed]
    if len(alone) == 1 and changed & set(experts):
        warnings.append(
            f"nothing is fused into {alone[0]}, which makes a part of the steps: give the LoRA for it too, with "
            f"--component {alone[0]} (loras.NAME.component), if there is one"
        )
    return warnings


def _pairs() -> Iterable[tuple[str, str]]:
    """The components of known families that are two of one class."""
    for family in families():
        for name in sorted(set(family.components.values())):
            folders = [folder for folder, kind in family.components.items() if kind == name]
            if len(folders) == len(NOISES):
                yield folders[0], folders[1]
