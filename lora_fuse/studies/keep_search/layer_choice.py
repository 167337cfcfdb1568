"""Layers chosen to be kept, for the most error that goes at a number of bytes. Pure: numbers in, patterns out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

NUMBER = re.compile(r"\.\d+\.")  # of a block


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantised module: the bytes that it costs to keep, and the energy of the error that goes if it is kept.

    `error` is of the weights, relative to theirs, until `by_latents` makes it one of latents.
    """

    module: str
    cost: int
    error: float

    @property
    def kind(self) -> str:
        """A pattern for the modules of the same place in all blocks."""
        return NUMBER.sub(".*.", self.module, count=1)


def by_latents(layers: Sequence[Layer], effects: Mapping[str, float]) -> list[Layer]:
    """The layers with their share of what their kind does to the latents (energies, by kind), in proportion to errors.

    Errors of single layers are small and add up; one picture a layer would take hours, one a kind is enough.
    """
    totals: dict[str, float] = defaultdict(float)
    for layer in layers:
        totals[layer.kind] += layer.error
    return [
        replace(layer, error=effects[layer.kind] * layer.error / totals[layer.kind] if totals[layer.kind] else 0.0)
        for layer in layers
    ]


def choose(layers: Iterable[Layer], room: int) -> list[Layer]:
    """Take layers by error per byte, the most first, as long as they fit into so many bytes.

    Greedy by density (Dantzig 1957, of the knapsack): short of the best by less than one layer's error.
    """
    chosen = []
    for layer in sorted(layers, key=lambda layer: (-layer.error / max(1, layer.cost), layer.module)):
        if layer.error > 0 and layer.cost <= room:
            chosen.append(layer)
            room -= layer.cost
    return chosen


def patterns(chosen: Iterable[Layer], layers: Iterable[Layer]) -> list[str]:
    """Patterns for `export.keep`: one for a kind of which all layers are chosen, else the modules themselves."""
    taken = {layer.module for layer in chosen}
    kinds: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        kinds[layer.kind].append(layer.module)
    found = []
    for kind, modules in kinds.items():
        inside = sorted(taken.intersection(modules))
        found += [kind] if len(inside) == len(modules) else inside
    return sorted(found)
