"""The explanation in words: one sentence, and a sentence for each LoRA. Nothing is decided here but how to say it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_fuse.differences.explaining.explanation import RELATED, AskedLora, Explanation
from lora_fuse.differences.explaining.remainder import MOST


def verdict(explained: Explanation) -> str:
    """The answer in one sentence."""
    if explained.is_equal:
        how = f", rounded to {', '.join(explained.dtypes)}" if explained.dtypes else ""
        return f"BASE itself{how}: no weight differs"
    if explained.is_other_base:
        return f"another base: the cosine of both is {explained.cosine:.2g}"
    left = explained.unexplained
    if not explained.found and explained.is_full:
        return (
            f"BASE trained on as a whole, or another version of it: {len(left)} of {len(explained.tensors)} weights "
            f"differ, in no few directions, and the cosine of both is {explained.cosine:.4g}"
        )
    sentence = _sum(explained)
    return f"{sentence}, plus {_rest(explained)}" if left else sentence


def _sum(explained: Explanation) -> str:
    """The base, the LoRAs and the way, as far as they are known."""
    if not explained.found:
        return "BASE"
    named = " + ".join(f"{lora.name} at {_scale(lora, exact=explained.way is not None)}" for lora in explained.found)
    if explained.way is None:
        return f"BASE + {named}{'' if explained.unexplained else ', rounded in no way that is known here'}"
    exactly = "exactly " if not explained.missed and explained.way.way.is_exact else ""
    where = _where(explained)
    half = all(one.dtype == "F16" for one in explained.pair.tensors)
    also = " and ComfyUI on a GPU" if half and explained.way.way.key == "twice" else ""
    some = "" if not explained.missed else f", {_share(1 - explained.missed / max(1, explained.moved))} of what moved"
    return f"{exactly}BASE + {named}{where} ({explained.way.way.words}{also}{some})"


def _where(explained: Explanation) -> str:
    """The number of targets that the LoRAs are in, where they are not in all."""
    targets = [one for one in explained.tensors if one.is_target and one.explained]
    plain = [one for one in targets if not one.differing and one.moved]
    return f" in {len(targets) - len(plain)} of {len(targets)} weights" if plain else ""


def _rest(explained: Explanation) -> str:
    """The remainder: its rank, and the blocks that it is in."""
    left = [one for one in explained.blocks if one.rest is not None]
    where = in_blocks([one.block for one in left], [one.block for one in explained.blocks])
    rests = [one.rest for one in left if one.rest is not None]
    ranks = sorted(rest.rank for rest in rests if rest.rank is not None)
    if not ranks:
        return f"other biases or norms {where}"
    if sum(rest.full for rest in rests) * 2 > len(rests):
        return f"something of no few directions {where}"
    rank = ranks[len(ranks) // 2]
    if not rank:
        return f"something as small as rounding {where}"
    return f"something of rank {rank}{' or more' if rank >= MOST else ' or so'} {where}"


def of_lora(lora: AskedLora, explained: Explanation) -> str:
    """A sentence on one of the LoRAs."""
    if lora.found:
        exactly = explained.way is not None and explained.way.way.is_exact and not explained.missed
        how = ", where all weights come out bit for bit" if exactly and not explained.unexplained else ""
        return f"{lora.name} is in it at {_scale(lora, exact=False)}{how}"
    if lora.smallest == math.inf:
        return f"{lora.name} cannot be told apart from rounding at any scale: its deltas are too small to move a weight"
    if abs(lora.cosine) >= RELATED and not explained.is_equal:
        return (
            f"{lora.name} is not in it as it is, and something like it is: the cosine of its delta and the difference "
            f"is {lora.cosine:.2f}; another version of it?"
        )
    hides = "rounding" if explained.is_equal or explained.way is not None else "what else changed"
    seen = f"from a scale of {lora.smallest:.2g} on it would show"
    return f"{lora.name} is not in it: {seen}, below that {hides} hides it"


def _scale(lora: AskedLora, *, exact: bool) -> str:
    if exact:
        return f"{lora.scale:.6g}"
    digits = max(0, min(9, 1 - math.floor(math.log10(lora.error)))) if 0 < lora.error < math.inf else 6
    return f"{lora.scale:.{digits}f} ± {lora.error:.1g}"


def _share(share: float) -> str:
    return "99.99 %" if 0.9999 <= share < 1 else f"{100 * share:.2f} %"


def in_blocks(some: Sequence[str], every: Sequence[str]) -> str:
    """Blocks in words: ``in blocks 3 to 9``."""
    if len(some) == len(every):
        return "in all blocks"
    places = [every.index(block) for block in some]
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1 and every[place].rpartition("/")[2].isdigit():
            runs[-1].append(place)
        else:
            runs.append([place])
    words = [
        every[run[0]] if len(run) == 1 else f"{every[run[0]]} {'to' if len(run) > 2 else 'and'} {every[run[-1]]}"
        for run in runs
    ]
    several = "block" if len(some) == 1 else "blocks"
    return f"in {several} {', '.join(words[:-1]) + ' and ' if len(words) > 1 else ''}{words[-1]}"
