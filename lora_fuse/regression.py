"""Renders each case twice in one process: from the merged checkpoint, and from the base with the LoRAs unfused.

The two transformers are never in memory together; text encoder, VAE, tokenizer and processor are loaded once.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.lora import LoraInput
from lora_fuse.lora_file import open_lora
from lora_fuse.render import (
    Case,
    LoraSpec,
    Pipeline,
    Rendered,
    Sampling,
    load_loras,
    load_pipeline,
    render,
    shared_components,
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What both sides share: pipeline class, sampling, scheduler settings (empty: the folder's own), device, dtype."""

    pipeline: str
    sampling: Sampling
    scheduler: Mapping[str, object]
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One case, rendered from the merged checkpoint and from base + LoRA."""

    case: Case
    merged: Rendered
    unfused: Rendered


def render_pairs(
    merged: Path, base: Path, loras: Sequence[LoraInput], cases: Sequence[Case], setup: Setup
) -> list[Pair]:
    """Render every case from both sides.

    The merged side is loaded as a user would load it, with the scheduler that lies in the repository; the unfused side
    gets the recipe's scheduler, so a wrong scheduler in the repository shows.

    Raises:
        RenderFailed: a side cannot be loaded or run, or not every LoRA module was attached.
    """
    pipe = load_pipeline(merged, setup.pipeline, device=setup.device, dtype=setup.dtype)
    ours = [render(pipe, case, setup.sampling) for case in cases]
    shared = shared_components(pipe)
    _drop_transformer(pipe)
    pipe = load_pipeline(
        base, setup.pipeline, device=setup.device, dtype=setup.dtype, scheduler=setup.scheduler or None, shared=shared
    )
    specs = [LoraSpec(lora.name, lora.path, lora.scale) for lora in loras]
    load_loras(pipe, specs, sum(len(open_lora(lora.path).updates) for lora in loras))
    theirs = [render(pipe, case, setup.sampling) for case in cases]
    return [Pair(case, mine, other) for case, mine, other in zip(cases, ours, theirs, strict=True)]


def _drop_transformer(pipe: Pipeline) -> None:
    """Give the memory back before the other transformer is loaded."""
    pipe.register_modules(transformer=None)
    gc.collect()
