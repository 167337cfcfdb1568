"""The page of an explanation: the verdict, a plot of every block, the LoRAs' scales, and tables."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fuse.differences.explaining.explain_verdict import of_lora, verdict
from lora_fuse.differences.explaining.explanation import ExplainedBlock, Explanation
from lora_fuse.pictures import pages

# Of the plot, in its own units.
WIDTH = 960
HEIGHT = 220
FOOT = 24
LEFT = 56
NAMES = 24  # below the bars, at most
SIGN = 7  # the width of a letter, about
LISTED = 200  # weights in the table, those with the largest difference


@dataclass(frozen=True, slots=True)
class _Bar:
    """A bar of the plot: the difference, and in it what is left."""

    block: ExplainedBlock
    x: float
    width: float
    height: float
    left: float
    name: str


def explain_html(explained: Explanation) -> str:
    """The page: one self-contained file."""
    top = max((one.relative for one in explained.blocks), default=0.0) or 1.0
    largest = sorted(explained.tensors, key=lambda one: -one.relative)
    return pages.render_page(
        "lora_fuse.differences.explaining",
        "explain.html.j2",
        explained=explained,
        verdict=verdict(explained),
        loras=[(lora, of_lora(lora, explained)) for lora in explained.loras],
        bars=_bars(explained, top),
        ticks=[(share * top, HEIGHT - FOOT - share * (HEIGHT - FOOT - 8)) for share in (0.0, 0.5, 1.0)],
        width=WIDTH,
        height=HEIGHT,
        foot=FOOT,
        axis=LEFT,
        tensors=[one for one in largest if one.differing][:LISTED],
        changed=explained.differing,
    )


def _bars(explained: Explanation, top: float) -> list[_Bar]:
    step = (WIDTH - LEFT - 8) / max(1, len(explained.blocks))
    every = -(-len(explained.blocks) // NAMES)
    most = max(2, int(step * every / SIGN))
    room = HEIGHT - FOOT - 8
    return [
        _Bar(
            one,
            LEFT + number * step + step * 0.1,
            step * 0.8,
            min(one.relative, top) / top * room,
            min(one.left, top) / top * room,
            one.block[:most] if number % every == 0 else "",
        )
        for number, one in enumerate(explained.blocks)
    ]
