"""The licence of a local folder: what the front matter of its README.md says, or what its licence file is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_fuse.machine import files
from lora_fuse.recipe.records import License

NAMES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt", "COPYING")
READ = 1 << 18  # bytes of a file that are looked at
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*(\n|\Z)", re.DOTALL)

# The Hub's id of a text, by words that must all stand near its beginning in this order, the more special first.
_BSD = "Redistribution and use in source and binary forms"
TEXTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("apache-2.0", (r"Apache License\s+Version 2\.0, January 2004",)),
    ("mit", ("Permission is hereby granted, free of charge", "without restriction", "THE SOFTWARE IS PROVIDED")),
    ("bsd-3-clause", (_BSD, "Neither the name", "AS IS")),
    ("bsd-2-clause", (_BSD, "AS IS")),
    ("cc0-1.0", (r"CC0 1\.0 Universal",)),
)


def license_of(card: Mapping[str, Any], origin: Literal["hub", "front matter"]) -> License | None:
    """The licence in the front matter of a model card: `license`, `license_name`, `license_link`.

    A list of one is that one; of several nobody says whether all or any are meant, which is ``other`` with their names.
    """
    stated = card.get("license")
    names = [str(name).strip().lower() for name in (stated if isinstance(stated, list) else [stated]) if name]
    if not names:
        return None
    if len(names) > 1:
        return License("other", ", ".join(names), None, origin)
    name, link = (str(card[key]) if card.get(key) else None for key in ("license_name", "license_link"))
    return License(names[0], name, link, origin)


def read_license(folder: Path) -> License | None:
    """The licence that a folder states; None if it states none.

    A licence file that is none of the known texts is ``other``, by the file's name.
    """
    readme = FRONT_MATTER.match(_text(folder, "README.md"))
    try:
        card = files.parse_yaml(readme[1]) if readme else None
    except ValueError:
        card = None
    if isinstance(card, dict) and (stated := license_of(card, "front matter")):
        return stated
    for name in NAMES:
        if text := _text(folder, name):
            known = next((id_ for id_, words in TEXTS if _stand_in_order(words, text)), None)
            return License(known, origin="licence file") if known else License("other", name, None, "licence file")
    return None


def _stand_in_order(words: Sequence[str], text: str) -> bool:
    """One after another: a single expression of them would look for each pair anew."""
    at = 0
    for expression in words:
        found = re.compile(expression).search(text, at)
        if found is None:
            return False
        at = found.end()
    return True


def _text(folder: Path, name: str) -> str:
    try:
        with files.open_regular(files.inside(folder, name)) as file:
            return file.read(READ).decode("utf-8", "replace")
    except OSError:  # not there, or not for us: it states nothing
        return ""
