"""The component of a pipeline that each delta of a LoRA is for: one that is named for the LoRA, or that its key names.

A key that names none is for the main component. What is for a component that is not there is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.errors import BadConfig, BadLora, BadScale
from lora_fuse.lora import LoraFile, LoraInput, Selection, open_lora

SHOWN = 3  # keys that an error names


@dataclass(frozen=True, slots=True)
class RoutedLora:
    """A LoRA that was opened, and its parts by component; the one of a base that is no pipeline has an empty name."""

    given: LoraInput
    lora: LoraFile
    parts: Mapping[str, LoraFile]


def route_to_one(
    inputs: Sequence[LoraInput], selection: Selection, *, digests: bool, component: str, root: Path
) -> list[RoutedLora]:
    """Open LoRAs that are all for one component; it has no name (``""``) where the base is no pipeline.

    Raises:
        BadConfig: LoRAs name other components.
        BadLora: a file cannot be used, or holds keys of another component.
        BadScale: a scale is not finite.
    """
    named = {given.component for given in inputs if given.component is not None} - {component}
    if named if component else len(named) > 1:
        raise BadConfig(
            f"{root} is {f'fused in {component} alone' if component else 'one component'}, and --component names "
            f"{' and '.join(sorted(map(str, named)))}; give the pipeline's folder to fuse into several at once"
        )
    return [_routed_to_one(given, _opened(given, selection, digests=digests), component) for given in inputs]


def _routed_to_one(given: LoraInput, lora: LoraFile, component: str) -> RoutedLora:
    whose = given.component or component
    _refuse_strays(lora, {whose}, whose or "BASE, which is no pipeline")
    return RoutedLora(given, lora, {component: lora})


def route(
    inputs: Sequence[LoraInput], selection: Selection, *, digests: bool, main: str, available: Collection[str]
) -> list[RoutedLora]:
    """Open LoRAs for a pipeline that has some components, of which `main` is for keys that name none.

    Raises:
        BadLora, BadScale: see `route_to_one`.
    """
    routed = []
    for given in inputs:
        lora = _opened(given, selection, digests=digests)
        own = given.component or main
        if given.component is None:
            _refuse_strays(lora, available, f"{', '.join(sorted(available))}, which are the components of the base")
        else:
            _refuse_strays(lora, {own}, f"{own}, as --component says")
        names = {delta.component or own for delta in lora.deltas}
        routed.append(RoutedLora(given, lora, {name: lora.of_component(name, own) for name in names}))
    return routed


def components(routed: Sequence[RoutedLora], main: str) -> list[str]:
    """The components that LoRAs are for, the main one first."""
    names = {name for one in routed for name in one.parts}
    return sorted(names, key=lambda name: (name != main, name))


def _opened(given: LoraInput, selection: Selection, *, digests: bool) -> LoraFile:
    if not math.isfinite(given.scale):
        raise BadScale(f"the scale of {given.name} is {given.scale}, not a finite number; 1.0 is the usual one")
    return open_lora(given.path, digests=digests, leave_out=selection.leaves_out)


def _refuse_strays(lora: LoraFile, allowed: Collection[str], whose: str) -> None:
    strays = [delta for delta in lora.deltas if delta.component is not None and delta.component not in allowed]
    if not strays:
        return
    first = ", ".join(repr(delta.module) for delta in strays[:SHOWN])
    of = ", ".join(sorted({str(delta.component) for delta in strays}))
    raise BadLora(
        f"{lora.path}: {len(strays)} of {len(lora.deltas)} modules are for {of} (first {first}), and it is fused into "
        f"{whose}: leave --component out to let keys say where they go, or leave them out on purpose: --leave-out "
        "PATTERN (fuse.leave_out)"
    )
