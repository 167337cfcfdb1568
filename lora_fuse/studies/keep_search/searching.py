"""Measures what each quantised layer costs, in bytes, in the error of its weights and in the latents of the cases.

A kind of layer at a time is quantised in the merged transformer, all others merged as they are, and every case is
rendered: the square of what that does to the latents is the kind's, shared among its layers by the errors of their
weights. The layers that take most of it a byte are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lora_fuse.errors import BadConfig
from lora_fuse.exports import FORMATS, ExportOptions, QuantisedPart, export_size, quantised_by
from lora_fuse.fusion import Plan
from lora_fuse.machine import progress
from lora_fuse.pictures import Case, metrics, pairs, render_progress
from lora_fuse.recipe import Artifacts, Recipe
from lora_fuse.regression.exported import FloatArray, Meant
from lora_fuse.studies.keep_search.layer_choice import Layer, by_latents, choose, patterns

WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class SearchedKeep:
    """The answer of a search: patterns for `export.keep`, the size with them, and the latents' error before and after.

    Errors are the largest of any case, relative L2 to the merged latents; `kept` counts layers that are kept more.
    """

    format: str
    keep: tuple[str, ...]
    size: int
    before: float
    after: float
    kept: int
    layers: int

    @property
    def line(self) -> str:
        """The line for a recipe."""
        return f"keep: [{', '.join(repr(pattern) for pattern in self.keep)}]"

    def __str__(self) -> str:
        size = progress.human_bytes(self.size)
        error = f"{self.before:.4g} to {self.after:.4g} off in the latents of the worst case"
        return f"{self.format}: {self.kept} of {self.layers} layers kept, {size}, {error}"


def format_of(recipe: Recipe) -> str:
    """The one format that a search is for.

    Raises:
        BadConfig: the recipe asks for none that quantises, for several, or for one that others encode.
    """
    found = [name for name in recipe.export.formats if FORMATS[name].codec is not None]
    if len(found) != 1:
        raise BadConfig(
            f"a search is for one format that is quantised here, and export.formats is {recipe.export.formats}: "
            "give one, export.formats=[int8_convrot]"
        )
    return found[0]


def search_keep(
    recipe: Recipe,
    at: Artifacts,
    plan: Plan,
    setup: pairs.Setup,
    room: int,
    watch: render_progress.RenderProgress | None = None,
) -> SearchedKeep:
    """Find the layers to keep for the least error in a file of at most `room` bytes.

    Raises:
        BadConfig: see `format_of`; or nothing can be kept in so many bytes.
        RenderFailed, OutOfMemory: see `pairs.render_pairs`.
    """
    name = format_of(recipe)
    options = ExportOptions.of(recipe.export)
    meant = Meant.of(plan, at.merged)
    part = quantised_by(name, meant.checkpoint, options)
    least = export_size(meant.checkpoint, [name], {}, options)
    if room < least:
        raise BadConfig(f"{name} takes {least} bytes at least, and --search gives it {room}: give it more")
    layers = list(_layers(name, meant, part, options, least))
    effects = _Effects(at, Case.of(recipe), setup, meant, part, watch)
    kinds = sorted({layer.kind for layer in layers})
    of_kind = {kind: [layer for layer in layers if layer.kind == kind] for kind in kinds}
    measured = by_latents(layers, {kind: effects.energy(same) for kind, same in of_kind.items()})
    chosen = choose(measured, room - least)
    before = effects.worst(layers)
    after = effects.worst([layer for layer in layers if layer.module not in {one.module for one in chosen}])
    effects.drop()
    keep = (*options.keep, *patterns(chosen, layers))
    size = export_size(meant.checkpoint, [name], {}, replace(options, keep=keep))
    return SearchedKeep(name, keep, size, before, after, len(chosen), len(layers))


def _layers(name: str, meant: Meant, part: QuantisedPart, options: ExportOptions, least: int) -> Iterator[Layer]:
    """The quantised layers: bytes that each costs to keep, and the relative energy of its error."""
    for tensor in sorted(part.names):
        module = tensor.removesuffix(WEIGHT)
        kept = replace(options, keep=(*options.keep, module))
        cost = export_size(meant.checkpoint, [name], {}, kept) - least
        exact = meant.exact(tensor)
        if part.at_best is not None:
            error = float(((part.at_best(tensor, exact) - exact).astype("float64") ** 2).sum())
            yield Layer(module, cost, error / float((exact.astype("float64") ** 2).sum()))


class _Effects:
    """Pictures of the cases with some layers quantised, against the merged ones of the same run."""

    def __init__(
        self,
        at: Artifacts,
        cases: Sequence[Case],
        setup: pairs.Setup,
        meant: Meant,
        part: QuantisedPart,
        watch: render_progress.RenderProgress | None,
    ) -> None:
        shared = pairs.share(at.merged, cases, setup, watch)
        self._sides = pairs.MergedSides(at.merged, cases, setup, shared, watch)
        self._meant = meant
        self._part = part
        self._merged = [picture.latents for picture in self._sides.merged()]

    def energy(self, layers: Sequence[Layer]) -> float:
        """The mean over the cases of the square of the relative L2 of the latents."""
        apart = self._apart(layers)
        return sum(one**2 for one in apart) / len(apart)

    def worst(self, layers: Sequence[Layer]) -> float:
        """The largest relative L2 of the latents of any case."""
        return max(self._apart(layers))

    def drop(self) -> None:
        """Give the transformer's memory back."""
        self._sides.drop()

    def _apart(self, layers: Sequence[Layer]) -> list[float]:
        quantised = {layer.module + WEIGHT for layer in layers}
        rendered = self._sides.exported(f"{len(layers)} layers", self._weights(quantised))
        return [metrics.latents_l2(one.latents, merged) for one, merged in zip(rendered, self._merged, strict=True)]

    def _weights(self, quantised: set[str]) -> Iterator[tuple[str, FloatArray]]:
        for name in sorted(self._meant.shapes):
            if name in quantised and self._part.at_best is not None:
                yield name, self._part.at_best(name, self._meant.exact(name))
            else:
                yield name, self._meant.merged(name)
