"""Measure the pocket model on held-out scenes and draw its contact sheet: ``python -m pocket.evaluate [--sheet FILE]``.

Every figure is a PSNR in dB, the mean over scenes: to the nearest right answer, and to the picture that the base makes
in its own 40 steps from the same noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from lora_fuse.machine import interrupts
from pocket import LORAS, POCKET, SIDE, tasks
from pocket.bench import EIGHT, FEW, GUIDED, MANY, MERGED, OWN_SCHEDULER, SCALES, Bench, Setting, nearest, psnr

INTRODUCTION = """PSNR in dB: to the nearest right answer (mean, worst, instructions with one answer, with several),
to the base's picture in 40 steps; share of scenes better than the base in 4 steps; seconds a picture"""
HEAD = f"{'':30} {'answer':>7} {'worst':>7} {'exact':>7} {'open':>7} {'to 40':>7} {'better':>7} {'s each':>7}"
WITH_ALL = (GUIDED[-1], next(setting for setting in SCALES if setting.scale == 1.0))  # worse, and the same as merged

COLUMNS = ("input", "40 steps", "4 steps, no LoRA", "4 steps, merged")  # of the contact sheet
GAP = 6  # pixels
LINE = 20
ACROSS = 2  # rows side by side


class Table:
    """Measures settings on one set of tasks and prints a row for each."""

    def __init__(self, made_by: Bench, chosen: Sequence[tasks.Task]) -> None:
        self.bench = made_by
        self.chosen = chosen
        self.exact = np.array([len(task.answers) == 1 for task in chosen])
        self.many: list[Image.Image] = []
        self.few: npt.NDArray[np.float64] = np.full(len(chosen), np.inf)

    def row(self, setting: Setting) -> None:
        """Make the pictures of a setting and print what they come to."""
        begun = time.perf_counter()
        pictures = self.bench.pictures(setting, self.chosen)
        seconds = (time.perf_counter() - begun) / len(self.chosen)
        best = to_answers(pictures, self.chosen)
        if setting == MANY:
            self.many = pictures
        if setting == FEW:
            self.few = best
        to_many = np.mean([psnr(picture, many) for picture, many in zip(pictures, self.many, strict=True)])
        cells = (best.mean(), best.min(), _mean(best[self.exact]), _mean(best[~self.exact]))
        print(
            f"{setting.name:30}" + "".join(f" {cell:7.2f}" for cell in cells),
            f"{'' if setting == MANY else f'{to_many:.2f}':>7}",
            f"{'' if np.isinf(self.few).any() or setting == FEW else f'{np.mean(best > self.few):.0%}':>7}",
            f"{seconds:7.3f}",
            flush=True,
        )


def to_answers(pictures: Sequence[Image.Image], chosen: Sequence[tasks.Task]) -> npt.NDArray[np.float64]:
    """PSNR in dB of each picture to the nearest right answer of its task."""
    return np.array([nearest(picture, task) for picture, task in zip(pictures, chosen, strict=True)])


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, draw the sheet if asked to."""
    parser = argparse.ArgumentParser(prog="python -m pocket.evaluate", description="measure the pocket model, in dB")
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes (default: 100)")
    parser.add_argument("--pocket", type=Path, default=POCKET, help="folder with model/ and lora/")
    parser.add_argument("--lora", default=LORAS["v2"], help="Lightning file in lora/")
    parser.add_argument("--all", action="store_true", help="also CFG 4, and the LoRA at 1.0 beside the base")
    parser.add_argument("--sheet", type=Path, help="draw the contact sheet into this file")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Bench(options.pocket, options.lora, device) as made_by:
        chosen = tasks.held_out(options.scenes)
        trips = made_by.round_trip(chosen)
        print(f"{len(chosen)} held-out scenes; the VAE's round trip {np.mean(trips):.2f} dB, at worst {min(trips):.2f}")
        print(INTRODUCTION, HEAD, sep="\n")
        table = Table(made_by, chosen)
        for setting in (MANY, *GUIDED, FEW, MERGED, *SCALES, OWN_SCHEDULER, EIGHT):
            if options.all or setting not in WITH_ALL:
                table.row(setting)
        print("\nPrompts that pair an animal with a colour that training never showed on it")
        table = Table(made_by, tasks.unseen(max(1, options.scenes // 4)))
        for setting in (MANY, FEW, MERGED):
            table.row(setting)
        _measure_others(made_by, max(1, options.scenes // 5))
        if options.sheet:
            contact_sheet(made_by).save(options.sheet, optimize=True)
            print(f"\ncontact sheet: {options.sheet}")
    print(f"{time.perf_counter() - started:.0f} s on {device}")
    return 0


def _measure_others(made_by: Bench, count: int) -> None:
    """Measure the same weights in the sibling pipeline, and with the style LoRA fused in."""
    pairs = tasks.transfers(count)
    both = to_answers(made_by.run(made_by.merged_plus, MERGED, pairs), pairs)
    print(f"\nmerged, Edit-Plus, {count} pairs of pictures, 4 steps: {both.mean():.2f} dB to the right answer")
    edits = tasks.held_out(count)
    pastel = tasks.held_out(count, "pastel")
    styled = to_answers(made_by.run(made_by.styled, MERGED, edits), pastel).mean()
    plain = to_answers(made_by.pictures(MERGED, edits), pastel).mean()
    print(f"merged with the style LoRA, 4 steps: {styled:.2f} dB to pastel answers; without it {plain:.2f}")


def contact_sheet(made_by: Bench) -> Image.Image:
    """A picture of every kind of instruction: what the base makes in 40 and 4 steps, and the merged model in 4.

    The drawn rabbit comes first, then the first held-out scene of every other kind.
    """
    first = {task.kind: task for task in reversed(tasks.held_out(100))}
    chosen = [tasks.rabbit(), *(task for kind, task in sorted(first.items()) if kind != "coat"), first["coat"]]
    columns = [[task.images[0] for task in chosen], *(made_by.pictures(s, chosen) for s in (MANY, FEW, MERGED))]
    return _sheet([task.prompt for task in chosen], list(zip(*columns, strict=True)))


def _sheet(prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    font = ImageFont.load_default(14)
    cell = SIDE + GAP
    block = len(COLUMNS) * cell + 2 * GAP
    height = SIDE + LINE + GAP
    down = -(-len(rows) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * block - GAP, LINE + down * height), "white")
    pen = ImageDraw.Draw(sheet)
    for across in range(ACROSS):
        for column, head in enumerate(COLUMNS):
            pen.text((GAP + across * block + column * cell, 2), head, fill="gray", font=font)
    for number, (prompt, pictures) in enumerate(zip(prompts, rows, strict=True)):
        left = GAP + number // down * block
        top = LINE + number % down * height
        pen.text((left, top + 1), prompt, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (left + column * cell, top + LINE))
    return sheet


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
