"""Names of the other spelling of a base's family, and the rows of the base that they are.

The data of the maps is the engine's; the way to it is not: a row of the base has here the number of the row that it is
in the other spelling, where the engine has runs of rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from lora_fuse.models import name_maps

Numbers = npt.NDArray[np.int64]
Pieces = list[tuple[str, int, int]]  # of an original parameter, in order: diffusers', place in it, share of the rows
LONGEST = 300  # characters of a name that is looked for; those of the maps have up to 80
ABSENT = -1  # the number of a row that the other parameter has not


@dataclass(frozen=True, slots=True)
class _Spelt:
    """A name of one of both spellings: of which parameter, of which block, in which map."""

    of_map: int
    original: bool
    template: str
    block: str


@cache
def _maps() -> tuple[dict[str, Pieces], ...]:
    return tuple(json.loads(path.read_bytes())["pieces"] for path in name_maps.files())


@cache
def _templates() -> dict[str, list[tuple[int, bool, str]]]:
    """Every name of every map, in dots and with underscores for dots: the map, the spelling, the name in dots."""
    made: dict[str, list[tuple[int, bool, str]]] = {}
    for number, pieces in enumerate(_maps()):
        both = [(True, name) for name in pieces]
        both += [(False, name) for name in {part[0] for parts in pieces.values() for part in parts}]
        for original, template in both:
            for spelling in {template, template.replace(".", "_")}:
                made.setdefault(spelling, []).append((number, original, template))
    return made


class OtherNames:
    """The other names of some parameters, whose rows are given by name."""

    def __init__(self, rows: Mapping[str, int]) -> None:
        """Read nothing yet."""
        self._rows = rows

    @cached_property
    def _known(self) -> list[int]:
        """Number of parameters of the base that each map has, in the spelling of which it has more."""
        sides = [[0, 0] for _ in _maps()]
        for name in self._rows:
            for spelt in self._spelt(name):
                sides[spelt.of_map][spelt.original] += 1
        return [max(both) for both in sides]

    def _spelt(self, name: str) -> Iterator[_Spelt]:
        """The meanings of a name, each of its numbers taken for that of a block; a very long name has none."""
        if len(name) > LONGEST:
            return
        numbers = re.finditer(r"(?<![^._])\d+(?![^._])", name)
        written = [("", name), *((one[0], f"{name[: one.start()]}{{}}{name[one.end() :]}") for one in numbers)]
        for block, template in written:
            for number, original, dotted in _templates().get(template, ()):
                yield _Spelt(number, original, dotted, block)

    def find(self, tails: list[str]) -> tuple[str, dict[str, Numbers]] | None:
        """The first of some names that is a parameter's in the other spelling, and the parameters of the base.

        Each has for its rows the numbers that they have in the other one, or `ABSENT`.

        Raises:
            ValueError: maps that know the base equally well say different things.
        """
        for tail in tails:
            found: list[tuple[int, dict[str, Numbers]]] = []
            for spelt in self._spelt(tail):
                if (places := self._places(spelt)) is not None:
                    found.append((self._known[spelt.of_map], places))
            if not found:
                continue
            best = max(known for known, _ in found)
            first, *others = [places for known, places in found if known == best]
            if any(not _same(first, other) for other in others):
                raise ValueError(f"{tail} may be rows of {', '.join(first)}, or others")
            return tail, first
        return None

    def _places(self, spelt: _Spelt) -> dict[str, Numbers] | None:
        """Rows of the base by parameter; None where the base has not all that the name is of."""
        pieces = _maps()[spelt.of_map]
        group = _together(pieces, spelt)
        ours = {part[0] for name in group for part in pieces[name]} if spelt.original else set(group)
        if not all(name.replace("{}", spelt.block) in self._rows for name in ours):
            return None
        rows = {name: self._rows[name.replace("{}", spelt.block)] for name in ours}
        cut = dict(_cut(group, pieces, rows, original=not spelt.original))
        theirs, base = _numbered(cut, group, pieces, spelt.original)
        wanted = theirs[spelt.template]
        at = np.full(sum(cut.values()), ABSENT, np.int64)
        at[wanted] = np.arange(len(wanted))
        made = {}
        for name, numbers in base.items():
            own = at[numbers]
            if (own != ABSENT).any():
                made[name.replace("{}", spelt.block)] = own
        return made


def _together(pieces: Mapping[str, Pieces], spelt: _Spelt) -> list[str]:
    """The original parameters that have rows of a parameter, or of another that it has rows of, in the map's order."""
    theirs = {part[0] for part in pieces[spelt.template]} if spelt.original else {spelt.template}
    return [name for name, parts in pieces.items() if any(part[0] in theirs for part in parts)]


def _cut(
    group: list[str], pieces: Mapping[str, Pieces], rows: Mapping[str, int], *, original: bool
) -> Iterator[tuple[tuple[str, int], int]]:
    """The number of rows of each piece, by original parameter and order; `rows` are those of the spelling of the base.

    Raises:
        ValueError: rows are no multiple of the shares.
    """
    shares: dict[str, int] = {}
    for name, parts in pieces.items():
        for theirs, _, share in parts:
            owner = name if original else theirs
            shares[owner] = shares.get(owner, 0) + share
    for name in group:
        for order, (theirs, _, share) in enumerate(pieces[name]):
            owner = name if original else theirs
            count, rest = divmod(rows[owner] * share, shares[owner])
            if rest:
                raise ValueError(f"{owner} has {rows[owner]} rows, which are no multiple of {shares[owner]}")
            yield (name, order), count


def _numbered(
    cut: Mapping[tuple[str, int], int], group: list[str], pieces: Mapping[str, Pieces], original: bool
) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """Every row of the parameters of a group has a number of its own: in the other spelling, and in the base's."""
    counted = 0
    rows: dict[tuple[str, int], Numbers] = {}
    for piece, count in cut.items():
        rows[piece] = np.arange(counted, counted + count)
        counted += count
    originals = {name: np.concatenate([rows[name, order] for order in range(len(pieces[name]))]) for name in group}
    placed: dict[str, dict[int, Numbers]] = {}
    for (name, order), numbers in rows.items():
        theirs, place, _ = pieces[name][order]
        placed.setdefault(theirs, {})[place] = numbers
    diffusers = {name: np.concatenate([parts[at] for at in sorted(parts)]) for name, parts in placed.items()}
    return (originals, diffusers) if original else (diffusers, originals)


def _same(one: Mapping[str, Numbers], other: Mapping[str, Numbers]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
