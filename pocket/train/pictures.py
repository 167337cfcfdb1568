"""The drawings that training sees, and the examples that they make: indices into the pictures, and prompts."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
import torch

from pocket import scenes
from pocket.model import SIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocket.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Example:
    """Input pictures, a prompt, and the pictures that answer it."""

    inputs: tuple[int, ...]
    prompt: str
    answers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Curriculum:
    """All scenes, and the examples of the three pipelines: one input picture, two, none."""

    records: list[scenes.Scene]
    edits: list[Example]
    pairs: list[Example]
    texts: list[Example]

    def kinds(self) -> dict[str, list[Example]]:
        """The examples by kind."""
        return {"edits": self.edits, "pairs": self.pairs, "texts": self.texts}


def curriculum(recipe: Recipe) -> Curriculum:
    """Choose scenes and examples; a function of the recipe alone."""
    rng = random.Random(recipe.seed + 1)
    records = [scene for _ in range(recipe.families) for scene in scenes.family(rng, recipe.members)]
    edits = []
    for first in range(0, len(records), recipe.members):
        found = _edits(records[first : first + recipe.members], first)
        edits += rng.sample(found, min(len(found), recipe.edits // recipe.families))
    texts = defaultdict(list)
    for number, scene in enumerate(records):
        if not scene.night:
            texts[scenes.caption(scene)].append(number)
    pairs = []
    for _ in range(recipe.pairs):
        possible = scenes.transfers(scenes.random_scene(rng), scenes.random_scene(rng))
        for transfer in possible[-1:]:  # the hat's where there is one
            pairs.append(Example((len(records), len(records) + 1), transfer.prompt, (len(records) + 2,)))
            records += [transfer.first, transfer.second, transfer.answer]
    return Curriculum(records, edits, pairs, [Example((), prompt, tuple(found)) for prompt, found in texts.items()])


def _edits(members: Sequence[scenes.Scene], offset: int) -> list[Example]:
    """Every (picture, prompt, picture) of a family in which the last rightly answers the prompt about the first."""
    return [
        Example((offset + i,), asked.prompt, (offset + j,))
        for (i, start), (j, end) in permutations(enumerate(members), 2)
        for asked in scenes.instructions(start)
        if end in scenes.answers(start, asked)
    ]


def draw_all(records: Sequence[scenes.Scene], style: scenes.Style = "plain") -> torch.Tensor:
    """The drawings, uint8 (n, SIDE, SIDE, 3), by as many processes as there are cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(partial(_pixels, style=style), records, chunksize=64))))


def _pixels(scene: scenes.Scene, style: scenes.Style) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(scenes.draw(scene, SIDE, style))
