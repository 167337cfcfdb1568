"""A weight's block, by its name. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable


def block_of(name: str) -> str:
    """``transformer_blocks.7.attn.to_q.weight`` is of block ``7``; what is in no numbered block, by its first name."""
    numbered = re.match(r"^\w+\.(\d+)\.", name)
    return numbered[1] if numbered else name.partition(".")[0]


def in_order(blocks: Iterable[str]) -> list[str]:
    """Numbered blocks in the order of the model, then the others by name."""
    return sorted(blocks, key=lambda block: (0, int(block), "") if block.isdigit() else (1, 0, block))
