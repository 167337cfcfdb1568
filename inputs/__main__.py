"""``python -m inputs`` writes every picture of `inputs/pictures` anew."""

from __future__ import annotations

from inputs.drawings import PICTURES, draw_inputs
from inputs.photo import cut_photo

if __name__ == "__main__":
    draw_inputs(PICTURES)
    cut_photo(PICTURES)
    print(f"{PICTURES} written")
