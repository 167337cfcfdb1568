"""The three pipelines without transformer and VAE: what encodes prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lora_fuse.pictures import render
from pocket import model
from pocket.train.runtime import DEVICE

if TYPE_CHECKING:
    from pathlib import Path


def encoders(folder: Path) -> dict[int, Any]:
    """Pipelines by the number of input pictures, loaded from a repository that is written to `folder` first."""
    render.quiet_libraries()
    render.allow_missing_torchvision()
    model.save_frame(folder)
    parts = {"transformer": None, "vae": None, "dtype": torch.float32, "local_files_only": True}
    return {
        count: kind.from_pretrained(folder, **parts).to(DEVICE)
        for count, kind in zip((1, 2, 0), model.PIPELINES, strict=True)
    }
