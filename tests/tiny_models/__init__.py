"""Every family without its weights: tiny pipelines that run, and files of true shapes that can be planned against.

`tiny(name, folder)` writes a pipeline in diffusers' own classes, `tiny_transformer(name)` makes what LoRAs change in
it, `call(name)` has arguments for a run of it, and `headers(name, folder)` writes the same components of true shapes,
without weights. Names are keys of `FAMILIES`.
"""

import torch

from tests.tiny_models.denoisers import DENOISERS
from tests.tiny_models.headers import headers, write_hole
from tests.tiny_models.pipelines import PIPELINES, call, tiny

__all__ = ["FAMILIES", "call", "headers", "tiny", "tiny_transformer", "write_hole"]

FAMILIES = tuple(PIPELINES)


def tiny_transformer(name: str) -> torch.nn.Module:
    """The tiny transformer, or UNet, of a family in float32: the same values every time."""
    return DENOISERS[name].make()
