"""Held-out edits: pictures, prompts and right answers that training never saw."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from pocket import SIDE, scenes

HELD_OUT = 10_000_000  # seeds from here on are not training's
UNSEEN = 11_000_000
TRANSFERS = 12_000_000


@dataclass(frozen=True, slots=True)
class Task:
    """Input pictures, a prompt, every right answer, and the seed of the noise."""

    images: tuple[Image.Image, ...]
    prompt: str
    answers: tuple[Image.Image, ...]
    seed: int
    kind: str = ""


def held_out(count: int, style: scenes.Style = "plain") -> list[Task]:
    """Edits of one picture, of every kind; the answers are drawn in `style`."""
    out = []
    for seed in range(HELD_OUT, HELD_OUT + count):
        rng = random.Random(seed)
        scene = scenes.random_scene(rng)
        out.append(_edit(scene, scenes.choose(rng, scenes.instructions(scene)), seed, style))
    return out


def unseen(count: int) -> list[Task]:
    """Prompts and answers that pair an animal with a colour that training never showed on it."""
    out = []
    for seed in range(UNSEEN, UNSEEN + count):
        rng = random.Random(seed)
        animal, coat = rng.choice(sorted(scenes.UNSEEN))
        start = rng.choice([c for c in scenes.COATS if (animal, c) not in scenes.UNSEEN])
        scene = replace(scenes.random_scene(rng), animal=animal, coat=start)
        out.append(_edit(scene, scenes.Instruction(f"Change the {animal}'s color to {coat}", "coat", coat), seed))
    return out


def transfers(count: int) -> list[Task]:
    """Edits of one picture after another, for Edit-Plus."""
    out: list[Task] = []
    seed = TRANSFERS
    while len(out) < count:
        seed += 1
        rng = random.Random(seed)
        for transfer in scenes.transfers(scenes.random_scene(rng), scenes.random_scene(rng))[-1:]:
            first, second, answer = (scenes.draw(s, SIDE) for s in (transfer.first, transfer.second, transfer.answer))
            out.append(Task((first, second), transfer.prompt, (answer,), seed, "transfer"))
    return out


def rabbit() -> Task:
    """The drawn rabbit of the `pocket` recipe."""
    asked = scenes.Instruction("Change the rabbit's color to purple", "coat", "purple")
    return _edit(scenes.INPUTS["rabbit.png"], asked, 0)


def _edit(scene: scenes.Scene, asked: scenes.Instruction, seed: int, style: scenes.Style = "plain") -> Task:
    answers = tuple(scenes.draw(answer, SIDE, style) for answer in scenes.answers(scene, asked))
    return Task((scenes.draw(scene, SIDE),), asked.prompt, answers, seed, asked.kind)
