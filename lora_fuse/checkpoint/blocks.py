"""A weight's block, by its name. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable


def block_of(name: str) -> str:
    """``transformer_blocks.7.attn.to_q.weight`` is of block ``7``; what is in no numbered block, by its first name.

    A component before a slash stays before the block.
    """
    component, slash, rest = name.rpartition("/")
    numbered = re.match(r"^\w+\.(\d+)\.", rest)
    return component + slash + (numbered[1] if numbered else rest.partition(".")[0])


def in_order(blocks: Iterable[str]) -> list[str]:
    """Numbered blocks in the order of the model, then the others by name; by component, where names have one."""

    def place(block: str) -> tuple[str, int, int, str]:
        component, _, own = block.rpartition("/")
        return (component, 0, int(own), "") if own.isdigit() else (component, 1, 0, own)

    return sorted(blocks, key=place)
