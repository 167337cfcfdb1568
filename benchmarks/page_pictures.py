"""Sizes of a page's pictures, and how they look there: ``python -m benchmarks.page_pictures``. Takes half a minute.

Pictures of a megapixel: a photograph, the same with grain, and noise whose spectrum is a photograph's (1/f), which is
as hard to compress as anything. Each is compared, by SSIMULACRA 2, with the original at the width at which it is shown.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from lora_fuse.machine import interrupts, text
from lora_fuse.pictures import encode, metrics, picture

PHOTOGRAPH = Path(__file__).resolve().parents[1] / "inputs/pictures/astronaut.png"
SIDE = 1024
SHOWN = {"in four columns": 256, "in the slider": 421, "in four columns, twice the pixels": 512}  # of `style.css`
CASES = 7
DIFFERENCE = 44.5  # dB between merged and unfused, as measured on a transformer of full size


def pictures() -> dict[str, picture.Levels]:
    """Three pictures of 1024 x 1024."""
    rng = np.random.default_rng(0)
    photograph = Image.open(PHOTOGRAPH).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    grain = np.asarray(photograph) + rng.normal(0, 4, (SIDE, SIDE, 1))
    axis = np.fft.fftfreq(SIDE)
    frequency = np.maximum(np.hypot(axis[:, None], axis), 1 / SIDE)
    fields = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIDE, SIDE))) / frequency).real for _ in range(4)]
    grey, *colours = [field / field.std() for field in fields]
    noise = np.stack([128 + 45 * grey + 20 * colour for colour in colours], axis=-1)
    return {"photograph": np.asarray(photograph), "with grain": _levels(grain), "noise": _levels(noise)}


def _levels(values: np.typing.NDArray[np.float64]) -> picture.Levels:
    return np.clip(values.round(), 0, 255).astype(np.uint8)


def _at(image: Image.Image, width: int) -> picture.Levels:
    return np.asarray(image.convert("RGB").resize((width, width), Image.Resampling.LANCZOS))


def main() -> None:
    """Encode, compare, print."""
    text.say(f"| {SIDE} x {SIDE} | bytes | " + " | ".join(SHOWN) + " | difference map | page of 7 cases |")
    text.say("|---|---|" + "---|" * (len(SHOWN) + 2))
    sizes = {}
    for name, levels in pictures().items():
        page = encode.encoded(picture.Picture(levels))
        shown = Image.open(io.BytesIO(page.data))
        scores = [metrics.ssimulacra2(_at(shown, side), _at(Image.fromarray(levels), side)) for side in SHOWN.values()]
        other = levels + np.random.default_rng(1).normal(0, 255 * 10 ** (-DIFFERENCE / 20), levels.shape)
        heat = encode.encoded_map(metrics.heat_map(levels, _levels(other), encode.LARGE))
        sizes[name] = len(page.data)
        # Input (a photograph), merged and unfused, and their difference; base64 makes four bytes of three.
        whole = CASES * (sizes["photograph"] + 2 * len(page.data) + len(heat.data)) * 4 / 3
        seen = " | ".join(f"{score:.1f}" for score in scores)
        text.say(f"| {name} | {len(page.data):,} | {seen} | {len(heat.data):,} | {whole / 1e6:.1f} MB |")


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
