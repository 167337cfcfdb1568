"""Cartoon scenes, an instruction grammar and exact edits: the pocket model's input pictures and training data.

A `Scene` is a small record and `draw` a pure function of it, so the right answer to an instruction is the drawing of
an edited record. Some instructions are open: they name several right answers, as real ones do, and then `answers`
returns them all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

Color = tuple[int, ...]  # red, green, blue
Kind = Literal["coat", "any coat", "back", "any back", "night", "animal", "hat", "any hat", "no hat"]

Style = Literal["plain", "pastel"]  # pastel: pale colours and thick outlines, what the style LoRA learns

SUPERSAMPLING = 2

COATS: dict[str, Color] = {
    "white": (245, 243, 238),
    "brown": (139, 90, 48),
    "gray": (140, 144, 150),
    "orange": (240, 140, 30),
    "pink": (250, 130, 170),
    "purple": (130, 60, 190),
    "blue": (50, 110, 225),
    "green": (60, 165, 75),
}
BACKS: dict[str, Color] = {
    "blue": (160, 210, 250),
    "pink": (252, 205, 220),
    "yellow": (252, 235, 150),
    "green": (185, 232, 180),
    "purple": (212, 190, 245),
    "gray": (210, 212, 216),
    "orange": (252, 205, 155),
}
HATS: dict[str, Color] = {"red": (215, 35, 45), "yellow": (250, 205, 40), "black": (35, 35, 40), "blue": (40, 80, 200)}
PARTY_HATS = frozenset({"red", "yellow"})  # the others are top hats
ANIMALS = ("rabbit", "cat", "bear")
NIGHT: Color = (24, 28, 74)
INK: Color = (45, 35, 40)
WHITE: Color = (255, 255, 255)

# Combinations that training never shows, neither as a picture nor in a prompt.
UNSEEN = frozenset({("cat", "green"), ("bear", "pink"), ("rabbit", "orange")})

# How often each kind of instruction is asked.
WEIGHTS: dict[Kind, float] = {
    "coat": 4.0, "any coat": 1.5, "back": 2.0, "any back": 1.0, "night": 2.0, "animal": 1.5,
    "hat": 2.0, "any hat": 2.0, "no hat": 1.5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scene:
    """One animal on a meadow. Lengths are in units of the picture's side."""

    animal: str
    coat: str
    back: str
    x: float  # centre of the head
    y: float
    size: float
    hat: str | None = None  # its colour
    night: bool = False  # the background's colour is kept, unseen


@dataclass(frozen=True, slots=True)
class Instruction:
    """A prompt and what it means: `value` names a colour or an animal, and is empty where the prompt names none."""

    prompt: str
    kind: Kind
    value: str = ""


def random_scene(rng: random.Random, seen: bool = True) -> Scene:
    """A scene; with `seen` one that training may show, otherwise one of the `UNSEEN` combinations."""
    animal, coat = rng.choice([(a, c) for a in ANIMALS for c in COATS if ((a, c) not in UNSEEN) == seen])
    return Scene(
        animal=animal,
        coat=coat,
        back=rng.choice(list(BACKS)),
        x=rng.uniform(0.46, 0.54),
        y=rng.uniform(0.505, 0.535),
        size=rng.uniform(0.97, 1.03),
        hat=rng.choice(list(HATS)) if rng.random() < 0.35 else None,
    )


def instructions(scene: Scene) -> list[Instruction]:
    """Every instruction that applies to a scene."""
    who = scene.animal
    out = [Instruction(f"Change the {who}'s color to {c}", "coat", c) for c in COATS if c != scene.coat]
    out += [Instruction(f"Make the background {b}", "back", b) for b in BACKS if b != scene.back or scene.night]
    out += [Instruction(f"Turn the {who} into a {a}", "animal", a) for a in ANIMALS if a != who]
    out += [Instruction(f"Change the {who}'s color", "any coat"), Instruction("Change the background", "any back")]
    if not scene.night:
        out.append(Instruction("Make it night", "night"))
    if scene.hat:
        return [*out, Instruction("Remove the hat", "no hat")]
    out += [Instruction(f"Give the {who} a {h} hat", "hat", h) for h in HATS]
    return [*out, Instruction(f"Give the {who} a hat", "any hat")]


def answers(scene: Scene, asked: Instruction) -> list[Scene]:
    """All right answers: one, or several where the instruction leaves something open."""
    match asked.kind:
        case "coat" | "any coat":
            coats = [asked.value] if asked.value else [c for c in COATS if c != scene.coat]
            return [replace(scene, coat=c) for c in coats]
        case "back" | "any back":
            backs = [asked.value] if asked.value else [b for b in BACKS if b != scene.back]
            return [replace(scene, back=b, night=False) for b in backs]
        case "night":
            return [replace(scene, night=True)]
        case "animal":
            return [replace(scene, animal=asked.value)]
        case "hat" | "any hat":
            return [replace(scene, hat=hat) for hat in ([asked.value] if asked.value else HATS)]
        case "no hat":
            return [replace(scene, hat=None)]


def is_seen(scene: Scene) -> bool:
    """Tell whether training may show a scene."""
    return (scene.animal, scene.coat) not in UNSEEN


def choose(rng: random.Random, options: Sequence[Instruction]) -> Instruction:
    """One of the instructions, its kind by `WEIGHTS`."""
    kinds = sorted({option.kind for option in options})
    kind = rng.choices(kinds, [WEIGHTS[k] for k in kinds])[0]
    return rng.choice([option for option in options if option.kind == kind])


def family(rng: random.Random, pictures: int) -> list[Scene]:
    """A scene and edits of it, all different: each ordered pair that some instruction joins is an example."""
    scenes = [random_scene(rng)]
    while len(scenes) < pictures:
        start = rng.choice(scenes)
        edited = rng.choice(answers(start, choose(rng, instructions(start))))
        if is_seen(edited) and edited not in scenes:
            scenes.append(edited)
    return scenes


def caption(scene: Scene) -> str:
    """A prompt for the text-to-image pipeline that a scene answers."""
    hat = f" with a {scene.hat} hat" if scene.hat else ""
    return f"a {scene.coat} {scene.animal}{hat}"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Two pictures, a prompt that takes something from the second into the first, and the one right answer."""

    first: Scene
    second: Scene
    prompt: str
    answer: Scene


def transfers(first: Scene, second: Scene) -> list[Transfer]:
    """Everything that the first scene's animal can take over from the second's."""
    who = first.animal
    out = []
    if second.coat != first.coat:
        prompt = f"The {who} in Picture 1 gets the color of the {second.animal} in Picture 2."
        out.append(Transfer(first, second, prompt, replace(first, coat=second.coat)))
    if second.hat and second.hat != first.hat:
        prompt = f"The {who} in Picture 1 wears the hat from Picture 2."
        out.append(Transfer(first, second, prompt, replace(first, hat=second.hat)))
    return [t for t in out if is_seen(t.answer) == is_seen(first)]


def prompts() -> list[str]:
    """Every prompt of the grammar, for one, two and no input pictures."""
    hats = [None, *HATS]
    shown = [Scene(animal, coat, "", 0, 0, 1, hat) for animal in ANIMALS for coat in COATS for hat in hats]
    about_one = {option.prompt for scene in shown for option in instructions(scene)}
    about_two = {transfer.prompt for a in shown[:: len(hats)] for b in shown for transfer in transfers(a, b)}
    return sorted(about_one | about_two | {caption(scene) for scene in shown})


def draw(scene: Scene, side: int, style: Style = "plain") -> Image.Image:
    """The picture of a scene, `side` x `side` pixels, RGB."""
    pen = _Pen(side * SUPERSAMPLING, NIGHT if scene.night else BACKS[scene.back], style)
    _sky(pen, scene)
    pen.start_at(scene.x, scene.y, scene.size)
    _animal(pen, scene)
    if scene.hat:
        _hat(pen, scene.hat)
    return pen.image.reduce(SUPERSAMPLING)


INPUT_SIDE = 256  # pixels
INPUTS = {
    "rabbit.png": Scene("rabbit", "white", "blue", x=0.5, y=0.52, size=1.0),
    "hat.png": Scene("bear", "brown", "yellow", x=0.5, y=0.52, size=1.0, hat="red"),
}


def draw_inputs(folder: Path) -> None:
    """Write the recipes' drawn input pictures, `INPUTS`, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in INPUTS.items():
        draw(scene, INPUT_SIDE).save(folder / name, optimize=True)


class _Pen:
    """Draws in units of the picture's side, or, after `start_at`, in an animal's: from its head, by its size."""

    def __init__(self, side: int, ground: Color, style: Style) -> None:
        self.side = side
        self.pale = 0.5 if style == "pastel" else 0.0
        self.image = Image.new("RGB", (side, side), self.tint(ground))
        self.pen = ImageDraw.Draw(self.image)
        self.width = round(side * (0.03 if style == "pastel" else 0.014))
        self.start_at(0.0, 0.0, 1.0)

    def start_at(self, x: float, y: float, size: float) -> None:
        self.x = x
        self.y = y
        self.size = size

    def tint(self, color: Color) -> Color:
        return _mix(color, WHITE, self.pale)

    def edge(self, fill: Color) -> Color:
        return _mix(fill, INK, 0.5)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        return (self.x + x * self.size) * self.side, (self.y + y * self.size) * self.side

    def box(self, x: float, y: float, rx: float, ry: float) -> tuple[float, ...]:
        """Pixels of the corners around a point."""
        return (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Color, outline: bool = False) -> None:
        edge = self.edge(fill) if outline else None
        self.pen.ellipse(self.box(x, y, rx, ry), fill=self.tint(fill), outline=edge, width=self.width)

    def polygon(self, points: Sequence[tuple[float, float]], fill: Color) -> None:
        corners = [self.at(*point) for point in points]
        self.pen.polygon(corners, fill=self.tint(fill))
        self.pen.line([*corners, *corners[:2]], fill=self.edge(fill), width=self.width, joint="curve")

    def arc(self, x: float, y: float, r: float, start: float, end: float) -> None:
        self.pen.arc(self.box(x, y, r, r), start, end, fill=INK, width=self.width * 3 // 4)


def _mix(a: Color, b: Color, share: float) -> Color:
    return tuple(round(of_a + (of_b - of_a) * share) for of_a, of_b in zip(a, b, strict=True))


def _sky(pen: _Pen, scene: Scene) -> None:
    if scene.night:
        pen.oval(0.15, 0.17, 0.09, 0.09, (250, 240, 190))  # moon
        for x, y in ((0.80, 0.12), (0.91, 0.26), (0.83, 0.40)):
            pen.oval(x, y, 0.02, 0.02, WHITE)  # star
    pen.oval(0.5, 1.35, 0.95, 0.52, (40, 80, 60) if scene.night else (120, 190, 95))


def _animal(pen: _Pen, scene: Scene) -> None:
    coat = COATS[scene.coat]
    pen.oval(0, 0.30, 0.155, 0.185, coat, outline=True)  # body
    pen.oval(0, 0.33, 0.08, 0.11, _mix(coat, WHITE, 0.6))
    for side in (-1, 1):
        _ear(pen, scene.animal, coat, side)
        pen.oval(side * 0.09, 0.46, 0.07, 0.04, coat, outline=True)  # foot
    pen.oval(0, 0, 0.185, 0.165, coat, outline=True)  # head
    for side in (-1, 1):
        pen.oval(side * 0.075, -0.02, 0.03, 0.038, (20, 20, 28))
        pen.oval(side * 0.075 - 0.01, -0.034, 0.01, 0.012, WHITE)
        pen.arc(side * 0.026, 0.075, 0.026, 20, 160)  # mouth
    pen.oval(0, 0.05, 0.028, 0.02, (225, 90, 110))


def _ear(pen: _Pen, animal: str, coat: Color, side: int) -> None:
    inner = _mix(coat, (255, 190, 200), 0.5)
    match animal:
        case "rabbit":
            pen.oval(side * 0.085, -0.24, 0.052, 0.165, coat, outline=True)
            pen.oval(side * 0.085, -0.24, 0.024, 0.11, inner)
        case "cat":
            pen.polygon([(side * 0.165, -0.25), (side * 0.17, -0.02), (side * 0.02, -0.12)], coat)
        case _:
            pen.oval(side * 0.14, -0.13, 0.07, 0.07, coat, outline=True)
            pen.oval(side * 0.14, -0.13, 0.035, 0.035, inner)


def _hat(pen: _Pen, color: str) -> None:
    fill = HATS[color]
    if color in PARTY_HATS:
        pen.polygon([(-0.11, -0.11), (0, -0.37), (0.11, -0.11)], fill)
        pen.oval(0, -0.37, 0.03, 0.03, WHITE, outline=True)
        return
    pen.polygon([(-0.085, -0.32), (0.085, -0.32), (0.085, -0.13), (-0.085, -0.13)], fill)
    pen.polygon([(-0.16, -0.16), (0.16, -0.16), (0.16, -0.10), (-0.16, -0.10)], _mix(fill, (0, 0, 0), 0.2))
