"""The match of a delta to parameters of the base: by the base's own names, or else by another spelling of them. Pure.

Own names need no table of models. Another spelling is known by the maps of `lora_fuse.models`: there one delta may be
rows of several parameters, or several deltas the rows of one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lora_fuse.checkpoint import TensorInfo
from lora_fuse.errors import BadLora, ShapeMismatch, UnmatchedTargets, WrongPrefix
from lora_fuse.lora.key_formats import FLAT_PREFIXES, PREFIXES, Algorithm, spellings
from lora_fuse.lora.key_parser import LEAVE_OUT, PARTS, SHOWN, LoraDelta
from lora_fuse.machine import text
from lora_fuse.models import name_maps

Runs = tuple[name_maps.RowRun, ...]


@dataclass(frozen=True, slots=True)
class PlacedDelta:
    """A delta as it is added to a parameter of the base, which has `shape` as a matrix.

    `runs` say which rows of the parameter are which of the delta; None where they are all of both, in order.
    """

    delta: LoraDelta
    shape: tuple[int, int]
    runs: Runs | None = None

    @property
    def rows(self) -> set[int]:
        """The rows of the parameter to which something is added."""
        if self.runs is None:
            return set(range(self.shape[0]))
        return {row for run in self.runs for row in range(run.start, run.start + run.rows)}

    def overlaps(self, other: PlacedDelta) -> bool:
        """True where both are added to a row."""
        if self.runs is None or other.runs is None:
            return True
        return any(
            one.start < two.start + two.rows and two.start < one.start + one.rows
            for one in self.runs
            for two in other.runs
        )


Same = Callable[[PlacedDelta, PlacedDelta], bool]


def match_targets(
    deltas: Iterable[LoraDelta], weights: Mapping[str, TensorInfo], where: str, same: Same = lambda *_: False
) -> dict[str, list[PlacedDelta]]:
    """The deltas of one file, by the name of the base's tensor that each changes.

    Where two have rows in common, because the file has a module in both spellings, `same` says whether they add the
    same there; then they count once.

    Raises:
        UnmatchedTargets: a module is not in the base; `WrongPrefix` if all are, but for the beginning of the names.
        ShapeMismatch: a delta does not fit its parameter.
        BadLora: two deltas mean the same rows and differ, or a name could mean two modules of the base.
    """
    names = _Names(weights, where)
    matched: dict[str, list[PlacedDelta]] = {}
    missing: list[str] = []
    given = list(deltas)
    for delta in given:
        try:
            places = names.places(delta)
        except ShapeMismatch as error:
            raise ShapeMismatch(f"{error}{names.made_for(given)}") from error
        if not places:
            missing.append(f"{delta.module}.{delta.part}")
        for name, placed in places.items():
            matched[name] = _together(matched.get(name, []), placed, same, name, where)
    if missing:
        if not matched and (fault := _prefix_fault(missing, weights)) is not None:
            raise WrongPrefix(f"{where}: none of {len(missing)} modules is in the base as it is named; {fault}")
        said = _missing_message(missing, len(matched), weights, where, names.made_for(given))
        raise UnmatchedTargets(said)
    return matched


def _together(there: list[PlacedDelta], placed: PlacedDelta, same: Same, name: str, where: str) -> list[PlacedDelta]:
    """The deltas of a parameter with one more; of those that add the same to the same rows, the one that has more.

    Raises:
        BadLora: they add other things, or neither has all rows of the other.
    """
    others = [other for other in there if placed.overlaps(other)]
    if not others:
        return [*there, placed]
    rows = set().union(*(other.rows for other in others))
    if (placed.rows <= rows or rows <= placed.rows) and all(same(placed, other) for other in others):
        return there if placed.rows <= rows else [*(other for other in there if other not in others), placed]
    raise BadLora(
        f"{where}: {others[0].delta.module!r} and {placed.delta.module!r} both mean the base's {name!r}, and add other "
        "values to it; take one of them out of the file"
    )


def modules_in(modules: Iterable[str], weights: Mapping[str, TensorInfo], where: str) -> set[str]:
    """The modules of a LoRA file, by their names there, that a base has, in either spelling of its family.

    Raises:
        BadLora: a name could mean two modules of the base.
    """
    names = _Names(weights, where)
    return {name for name in modules if any(names.has(name, part) for part in PARTS)}


class _Names:
    """The names of a base's parameters, and what a file calls them."""

    def __init__(self, weights: Mapping[str, TensorInfo], where: str) -> None:
        self._weights = weights
        self._where = where
        self._flat: dict[str, list[str]] = defaultdict(list)  # modules by their names with underscores for dots
        for module in {name.rpartition(".")[0] for name in weights}:
            self._flat[module.replace(".", "_")].append(module)

    def places(self, delta: LoraDelta) -> dict[str, PlacedDelta]:
        """The parameters that a delta is added to, by name; none where the base has no such."""
        name = self._own_name(delta.module, delta.part)
        if name is None:
            return self._translated(delta)
        _check_fit(delta, self._weights[name], self._where)
        return {name: PlacedDelta(delta, delta.shape)}

    def made_for(self, deltas: Iterable[LoraDelta]) -> str:
        """The end of a sentence on a file that does not fit: whose names it has, where they tell."""
        return name_maps.made_for([_spelt(delta.module, delta.part) for delta in deltas], list(self._weights))

    def has(self, module: str, part: str) -> bool:
        """True where the base has a parameter of a module of a file."""
        return self._own_name(module, part) is not None or any(self._translations(module, part))

    def _own_name(self, module: str, part: str) -> str | None:
        names = [f"{spelling}.{part}" for spelling in spellings(module, PREFIXES)]
        if part == "weight":  # or a parameter that is no module's weight: for ComfyUI it is called as it stands
            names += spellings(module, PREFIXES)
        if (name := next((name for name in names if name in self._weights), None)) is not None:
            return name
        for spelling in spellings(module, FLAT_PREFIXES):
            modules = sorted(self._flat.get(spelling, []))
            if len(modules) > 1:
                raise BadLora(
                    f"{self._where}: {module!r} could mean {' or '.join(map(repr, modules))} of the base; "
                    "export the LoRA with dotted names"
                )
            if modules and f"{modules[0]}.{part}" in self._weights:
                return f"{modules[0]}.{part}"
        return None

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Rows of the base's parameters."""
        return {name: tensor.shape[0] for name, tensor in self._weights.items() if tensor.shape}

    @cached_property
    def _maps(self) -> Sequence[tuple[name_maps.NameMap, int]]:
        """All maps, each with the number of the base's parameters that it has."""
        return [(known, known.covers(list(self._weights))) for known in name_maps.maps()]

    def _translated(self, delta: LoraDelta) -> dict[str, PlacedDelta]:
        """As `places`, by the other spelling of a family's names."""
        found = list(self._translations(delta.module, delta.part))
        best = max((covered for _, covered in found), default=0)
        runs = [one for one, covered in found if covered == best]
        if any(one != runs[0] for one in runs):
            meant = " or ".join(", ".join(map(repr, one)) for one in runs)
            raise BadLora(
                f"{self._where}: {delta.module!r} could mean {meant} of the base; export the LoRA with its names"
            )
        return {name: self._place(delta, name, runs[0]) for name in runs[0]} if runs else {}

    def _translations(self, module: str, part: str) -> Iterator[tuple[dict[str, Runs], int]]:
        """The rows that a delta is for, as each map has them, and how many of the base's parameters that map has."""
        for known, covered in self._maps:
            for name in _spelt(module, part):
                try:
                    runs = known.translate(name, self._rows)
                except ValueError as error:
                    raise ShapeMismatch(f"{self._where}: {module!r}: {error}; use another base") from error
                if runs is not None:
                    yield runs, covered
                    break

    def _place(self, delta: LoraDelta, name: str, places: Mapping[str, Runs]) -> PlacedDelta:
        """Place a delta in one of the parameters that have its rows."""
        weight = self._weights[name]
        shape = (weight.shape[0], math.prod(weight.shape[1:]))
        is_whole = len(places) == 1 and [run.start for run in places[name]] == [run.source for run in places[name]]
        has_values = delta.format.algorithm in (Algorithm.FULL, Algorithm.SET)
        if is_whole and has_values and math.prod(shape) == math.prod(delta.shape):
            return PlacedDelta(delta, shape)  # the same numbers, laid out in other dimensions
        rows = sum(run.rows for runs in places.values() for run in runs)
        if (rows, shape[1]) != delta.shape or 0 in shape:
            of = " and ".join(repr(other) for other in places)
            raise ShapeMismatch(
                f"{self._where}: {delta.module!r} gives a {'x'.join(map(str, delta.shape))} delta, and the rows of the "
                f"base's {of} that it is for are {rows}x{shape[1]}; this LoRA was made for another base"
            )
        return PlacedDelta(delta, shape, None if is_whole and rows == shape[0] else places[name])


def _spelt(module: str, part: str) -> list[str]:
    """The parameters that a module of a file may mean, without the prefixes that it may have."""
    modules = [*spellings(module, PREFIXES), *spellings(module, FLAT_PREFIXES)]
    return [f"{name}.{part}" for name in modules] + (modules if part == "weight" else [])


def _check_fit(delta: LoraDelta, weight: TensorInfo, where: str) -> None:
    if not weight.shape or 0 in weight.shape:
        raise ShapeMismatch(
            f"{where}: {delta.module!r} is for the base's {weight.name!r}, of the shape {list(weight.shape)}, and only "
            "to rows of numbers something is added; take it out of the LoRA, or get a good copy of the base"
        )
    if (weight.shape[0], math.prod(weight.shape[1:])) != delta.shape:
        raise ShapeMismatch(
            f"{where}: {delta.module!r} gives a {'x'.join(map(str, delta.shape))} delta, and the base's "
            f"{weight.name!r} is {'x'.join(map(str, weight.shape))}; this LoRA was made for another base"
        )


def _missing_message(
    missing: list[str], matched: int, weights: Mapping[str, TensorInfo], where: str, made_for: str
) -> str:
    shown = []
    for name in sorted(missing)[:SHOWN]:
        near = text.nearest(name, weights)
        shown.append(f"{name!r} (nearest in the base: {near[0] if near else 'none'!r})")
    return (
        f"{where}: {len(missing)} of {len(missing) + matched} modules are not in the base, first {', '.join(shown)}"
        f"{made_for}; use the LoRA made for this base, or the other base" + (LEAVE_OUT if matched else "")
    )


def _prefix_fault(missing: list[str], weights: Mapping[str, TensorInfo]) -> str | None:
    """The beginning that all names have too much, or that the base's have before all of them; None if neither."""
    first = missing[0].split(".")
    for dots in range(1, len(first) - 1):
        beginning = ".".join(first[:dots]) + "."
        if all(name.startswith(beginning) and name.removeprefix(beginning) in weights for name in missing):
            return f"all are, without {beginning!r} at the beginning of the names: take it off the LoRA's keys"
    bare = min(spellings(missing[0], PREFIXES), key=len)
    ahead = {weight.removesuffix(bare) for weight in weights if weight.endswith(f".{bare}")}
    for beginning in sorted(ahead):
        if all(beginning + min(spellings(name, PREFIXES), key=len) in weights for name in missing):
            return f"all are, with {beginning!r} at the beginning of the names: put it before the LoRA's keys"
    return None
