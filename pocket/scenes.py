"""Cartoon scenes, an instruction grammar and exact edits: the pocket model's input pictures and training data.

A `Scene` is a small record and `draw` a pure function of it, so the right answer to an instruction is the drawing of
an edited record. Some instructions are open: they name several right answers, as real ones do, and then `answers`
returns them all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image, ImageDraw

Color = tuple[int, int, int]
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
    pairs = [(a, c) for a in ANIMALS for c in COATS if ((a, c) not in UNSEEN) == seen]
    animal, coat = rng.choice(pairs)
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
    """Whether training may show this scene."""
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
    """What a scene shows, as a prompt for the text-to-image pipeline."""
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
    who, out = first.animal, []
    if second.coat != first.coat:
        prompt = f"The {who} in Picture 1 gets the color of the {second.animal} in Picture 2."
        out.append(Transfer(first, second, prompt, replace(first, coat=second.coat)))
    if second.hat and second.hat != first.hat:
        prompt = f"The {who} in Picture 1 wears the hat from Picture 2."
        out.append(Transfer(first, second, prompt, replace(first, hat=second.hat)))
    return [t for t in out if is_seen(t.answer) == is_seen(first)]


def prompts() -> list[str]:
    """Every prompt of the grammar, for one, two and no input pictures."""
    pairs = [(a, c) for a in ANIMALS for c in COATS]
    hats = [None, *HATS]
    shown = [Scene(a, c, "", 0, 0, 1, hat) for a, c in pairs for hat in hats]
    found = {option.prompt for scene in shown for option in instructions(scene)} | {caption(scene) for scene in shown}
    return sorted(found | {t.prompt for one in shown[:: len(hats)] for two in shown for t in transfers(one, two)})


def draw(scene: Scene, side: int, style: Style = "plain") -> Image.Image:
    """The picture of a scene, `side` x `side` pixels, RGB."""
    pen = _Pen(side * SUPERSAMPLING, NIGHT if scene.night else BACKS[scene.back], style)
    _sky(pen, scene)
    _animal(pen, scene)
    if scene.hat:
        _hat(pen, scene, scene.hat)
    return pen.image.reduce(SUPERSAMPLING)


class _Pen:
    """Draws in units of the picture's side."""

    def __init__(self, side: int, ground: Color, style: Style) -> None:
        self.side, self.pale = side, 0.5 if style == "pastel" else 0.0
        self.image = Image.new("RGB", (side, side), self.tint(ground))
        self.pen = ImageDraw.Draw(self.image)
        self.width = round(side * (0.03 if style == "pastel" else 0.014))

    def tint(self, color: Color) -> Color:
        return _mix(color, WHITE, self.pale)

    def edge(self, fill: Color) -> Color:
        return _mix(fill, INK, 0.5)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Color, outline: bool = False) -> None:
        box = [v * self.side for v in (x - rx, y - ry, x + rx, y + ry)]
        self.pen.ellipse(box, fill=self.tint(fill), outline=self.edge(fill) if outline else None, width=self.width)

    def polygon(self, points: Sequence[tuple[float, float]], fill: Color) -> None:
        corners = [(x * self.side, y * self.side) for x, y in points]
        self.pen.polygon(corners, fill=self.tint(fill))
        self.pen.line([*corners, *corners[:2]], fill=self.edge(fill), width=self.width, joint="curve")

    def arc(self, x: float, y: float, r: float, start: float, end: float) -> None:
        box = [v * self.side for v in (x - r, y - r, x + r, y + r)]
        self.pen.arc(box, start, end, fill=INK, width=self.width * 3 // 4)


def _mix(a: Color, b: Color, share: float) -> Color:
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def _sky(pen: _Pen, scene: Scene) -> None:
    if scene.night:
        pen.oval(0.15, 0.17, 0.09, 0.09, (250, 240, 190))  # moon
        for x, y in ((0.80, 0.12), (0.91, 0.26), (0.83, 0.40)):
            pen.oval(x, y, 0.02, 0.02, WHITE)  # star
    pen.oval(0.5, 1.35, 0.95, 0.52, (40, 80, 60) if scene.night else (120, 190, 95))


def _animal(pen: _Pen, scene: Scene) -> None:
    s, x, y, coat = scene.size, scene.x, scene.y, COATS[scene.coat]
    pen.oval(x, y + 0.30 * s, 0.155 * s, 0.185 * s, coat, outline=True)  # body
    pen.oval(x, y + 0.33 * s, 0.08 * s, 0.11 * s, _mix(coat, WHITE, 0.6))
    for side in (-1, 1):
        _ear(pen, scene, side)
        pen.oval(x + side * 0.09 * s, y + 0.46 * s, 0.07 * s, 0.04 * s, coat, outline=True)  # foot
    pen.oval(x, y, 0.185 * s, 0.165 * s, coat, outline=True)  # head
    for side in (-1, 1):
        pen.oval(x + side * 0.075 * s, y - 0.02 * s, 0.03 * s, 0.038 * s, (20, 20, 28))
        pen.oval(x + side * 0.075 * s - 0.01 * s, y - 0.034 * s, 0.01 * s, 0.012 * s, WHITE)
        pen.arc(x + side * 0.026 * s, y + 0.075 * s, 0.026 * s, 20, 160)  # mouth
    pen.oval(x, y + 0.05 * s, 0.028 * s, 0.02 * s, (225, 90, 110))


def _ear(pen: _Pen, scene: Scene, side: int) -> None:
    s, x, y, coat = scene.size, scene.x, scene.y, COATS[scene.coat]
    inner = _mix(coat, (255, 190, 200), 0.5)
    match scene.animal:
        case "rabbit":
            pen.oval(x + side * 0.085 * s, y - 0.24 * s, 0.052 * s, 0.165 * s, coat, outline=True)
            pen.oval(x + side * 0.085 * s, y - 0.24 * s, 0.024 * s, 0.11 * s, inner)
        case "cat":
            tip, outer, near = (0.165, -0.25), (0.17, -0.02), (0.02, -0.12)
            pen.polygon([(x + side * px * s, y + py * s) for px, py in (tip, outer, near)], coat)
        case _:
            pen.oval(x + side * 0.14 * s, y - 0.13 * s, 0.07 * s, 0.07 * s, coat, outline=True)
            pen.oval(x + side * 0.14 * s, y - 0.13 * s, 0.035 * s, 0.035 * s, inner)


def _hat(pen: _Pen, scene: Scene, color: str) -> None:
    s, x, top, fill = scene.size, scene.x, scene.y - 0.13 * scene.size, HATS[color]

    def points(*corners: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + px * s, top + py * s) for px, py in corners]

    if color in PARTY_HATS:
        pen.polygon(points((-0.11, 0.02), (0, -0.24), (0.11, 0.02)), fill)
        pen.oval(x, top - 0.24 * s, 0.03 * s, 0.03 * s, WHITE, outline=True)
        return
    pen.polygon(points((-0.085, -0.19), (0.085, -0.19), (0.085, 0), (-0.085, 0)), fill)
    pen.polygon(points((-0.16, -0.03), (0.16, -0.03), (0.16, 0.03), (-0.16, 0.03)), _mix(fill, (0, 0, 0), 0.2))
