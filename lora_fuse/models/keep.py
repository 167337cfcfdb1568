"""Layers that lose more by few bits than they save: a family's list for its class, with the source of each line.

A layer of a list stays in the dtype of the merge. Those called coarse are kept in formats of 8-bit floats and of fewer
bits only: int8 with a scale a row has room for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from lora_fuse.errors import BadConfig
from lora_fuse.models.families import families
from lora_fuse.models.family import KeptLayers


def keep_list(kind: str) -> tuple[KeptLayers, ...]:
    """The layers to keep of a class of transformer, as its family has them; none of a class that no family has."""
    return next((family.keep[kind] for family in families() if kind in family.keep), ())


def kept_layers(kind: str, modules: Iterable[str], more: Iterable[str] = (), *, coarse: bool) -> frozenset[str]:
    """The modules of a class of transformer that stay as they are; `more` are patterns that a user adds.

    Raises:
        BadConfig: one of these matches no module.
    """
    names = frozenset(modules)
    patterns = [pattern for row in keep_list(kind) if coarse or not row.coarse for pattern in row.patterns]
    kept = {name for pattern in patterns for name in names if fnmatchcase(name, pattern)}
    for pattern in more:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise BadConfig(
                f"export.keep: {pattern!r} matches none of the {len(names)} layers of {kind} that have a matrix; they "
                f"have names as {min(names, default='')!r}"
            )
        kept |= found
    return frozenset(kept)
