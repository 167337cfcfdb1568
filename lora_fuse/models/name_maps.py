"""Two spellings of a model's parameters, the original checkpoint's and diffusers', and the rows of one in the other.

The maps are data beside the families' files, derived by ``python -m tests.support.derived_names`` from the converters
of diffusers, so that a fuse imports no diffusers and its bytes depend on no version of it. A map has no sizes: it has
the order of pieces, and their shares of the rows where one parameter is cut in several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lora_fuse.models.families import families
from lora_fuse.models.family import Family

FOLDER = Path(__file__).parent / "families"
LONGEST = 200  # characters of a name with its number; of the maps, the longest has 80
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows of a parameter, from `start` on, that are as many rows of another, from `source` on."""

    start: int
    source: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that lie together in both spellings: the parameters that have them, and the share of the original's rows.

    `order` is that of the original's pieces.
    """

    names: tuple[str, str]
    order: int
    share: int


Sides = tuple[dict[str, tuple[_Piece, ...]], dict[str, tuple[_Piece, ...]]]


class NameMap:
    """Names of the parameters of a family, in two spellings: 0 is the original, 1 is diffusers'."""

    def __init__(self, family: str, pieces: Mapping[str, Sequence[tuple[str, int, int]]]) -> None:
        """Take the map that a family has: by original parameter its pieces, as the file has them."""
        self.family = family
        self._sides = _sides(pieces)
        self._flat = tuple({name.replace(".", "_"): name for name in side} for side in self._sides)

    def covers(self, parameters: Sequence[str]) -> int:
        """Number of a base's parameters that the map has, in the spelling of which it has more."""
        return max(sum(_template(name, side) is not None for name in parameters) for side in self._sides)

    def knows(self, parameter: str) -> bool:
        """True for a parameter of the family, in either spelling, with dots or underscores; see `translate`."""
        return any(self._sources(parameter, spelling) for spelling in (0, 1))

    def translate(self, parameter: str, rows: Mapping[str, int]) -> dict[str, tuple[RowRun, ...]] | None:
        """The parameters of a base that have the rows of one of the other spelling, by name.

        `rows` are those of each parameter of the base. A `parameter` without dots has underscores in their places; one
        that a trainer calls a module's weight may be a scale.

        Returns:
            None where the map has no such name, or the base not all of the parameters.

        Raises:
            ValueError: a parameter of the base cannot be cut in its shares.
        """
        for spelling in (0, 1):
            for source, number in self._sources(parameter, spelling):
                if (made := self._runs(source, spelling, number, rows)) is not None:
                    return made
        return None

    def _sources(self, parameter: str, spelling: int) -> list[tuple[tuple[_Piece, ...], str]]:
        """The pieces of a parameter in a spelling, and the number of its block."""
        made = []
        for name in (parameter, parameter.removesuffix("weight") + "scale"):
            flat = self._flat[spelling] if "." not in name.rpartition(".")[0] else None
            found = _template(name.replace(".", "_") if flat else name, flat or self._sides[spelling])
            if found is not None:
                template, number = found
                made.append((self._sides[spelling][flat[template] if flat else template], number))
        return made

    def _runs(
        self, source: tuple[_Piece, ...], spelling: int, number: str, rows: Mapping[str, int]
    ) -> dict[str, tuple[RowRun, ...]] | None:
        made: dict[str, list[RowRun]] = {}
        at = 0
        for piece in source:
            template = piece.names[1 - spelling]
            name = template.replace("{}", number)
            if name not in rows:
                return None
            start, count = _place(piece, self._sides[1 - spelling][template], rows[name], name)
            made.setdefault(name, []).append(RowRun(start, at, count))
            at += count
        return {name: tuple(sorted(runs, key=lambda run: run.start)) for name, runs in made.items()}


def _place(piece: _Piece, pieces: tuple[_Piece, ...], rows: int, name: str) -> tuple[int, int]:
    """The first row of a piece in a parameter of so many rows, and the number of its rows."""
    unit, rest = divmod(rows, sum(one.share for one in pieces))
    if rest:
        shares = ":".join(str(one.share) for one in pieces)
        raise ValueError(f"{name} has {rows} rows, which are to be cut {shares}")
    before = sum(one.share for one in pieces[: pieces.index(piece)])
    return before * unit, piece.share * unit


def _sides(pieces: Mapping[str, Sequence[tuple[str, int, int]]]) -> Sides:
    original: dict[str, tuple[_Piece, ...]] = {}
    placed: dict[str, dict[int, _Piece]] = {}
    for name, parts in pieces.items():
        original[name] = tuple(_Piece((name, part[0]), order, part[2]) for order, part in enumerate(parts))
        for piece, (theirs, place, _) in zip(original[name], parts, strict=True):
            placed.setdefault(theirs, {})[place] = piece
    return original, {name: tuple(parts[at] for at in sorted(parts)) for name, parts in placed.items()}


def _template(name: str, known: Mapping[str, object]) -> tuple[str, str] | None:
    """The template that a name is of, and the number of its block, if it has one.

    A longer name than any template is of none: a LoRA's may have hundreds of numbers, each of which is tried.
    """
    if name in known:
        return name, ""
    if len(name) > LONGEST:
        return None
    for match in _NUMBER.finditer(name):
        template = f"{name[: match.start()]}{{}}{name[match.end() :]}"
        if template in known:
            return template, match[0]
    return None


def path_of(converter: str) -> Path:
    """The file of a converter's map."""
    return FOLDER / f"{converter}.json"


def files() -> tuple[Path, ...]:
    """The files of all maps, for who reads them in a way of their own."""
    converters = {family.converter for family in families() if family.converter and family.originals}
    return tuple(path_of(converter) for converter in sorted(converters))


@cache
def maps() -> tuple[NameMap, ...]:
    """The maps of all families that list their original names."""
    return tuple(NameMap(family.name, _pieces(family)) for family in families() if family.originals)


def _pieces(family: Family) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """The pieces of a family's parameters; each is the whole of itself where both spellings are one."""
    if family.converter is None:
        named = [f"{module}.{part}" for module in family.originals for part in ("weight", "bias")]
        return {name: ((name, 0, 1),) for name in (*named, *family.original_parameters)}
    content = json.loads(path_of(family.converter).read_text(encoding="utf-8"))
    own = {*family.originals, *family.original_parameters}
    return {
        name: tuple(map(tuple, pieces))
        for name, pieces in content["pieces"].items()
        if name in own or name.rpartition(".")[0] in own
    }


def made_for(parameters: Iterable[Sequence[str]], base: Sequence[str]) -> str:
    """The end of a sentence on a LoRA that does not fit: whose names it has, and whose the base; or nothing.

    `parameters` are those of the LoRA, each in the ways in which it may be spelt. Only names that not all families have
    tell something.
    """
    spelt = list(parameters)
    known = {one.family: sum(any(map(one.knows, names)) for names in spelt) for one in maps()}
    covered = {one.family: one.covers(base) for one in maps()}
    theirs = [family for family, count in known.items() if count and count == max(known.values())]
    ours = [family for family, count in covered.items() if count and count == max(covered.values())]
    if len(theirs) not in (1, 2) or set(theirs) == set(ours):
        return ""
    said = f": its names are those of {' or '.join(theirs)}"
    return said if set(theirs) & set(ours) or not ours else f"{said}, and the base's those of {' or '.join(ours)}"
