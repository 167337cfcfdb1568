"""Every number of the training: sizes, step counts, rates and the seed. The defaults gave the committed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Recipe:
    """Step counts are fixed, so that a run does not depend on the machine's speed."""

    seed: int = 0

    families: int = 2000  # scenes with their edits; `members` pictures each
    members: int = 8
    edits: int = 20000  # examples of one input picture
    pairs: int = 1000  # examples of two input pictures

    vae_steps: int = 4000
    vae_batch: int = 8
    vae_rate: float = 2e-3
    kl: float = 1e-4
    decoder_steps: int = 3500
    decoder_rate: float = 1e-3
    decoder_noise: float = 0.15  # on latents of unit spread: what the transformer gets wrong

    path: Literal["straight", "curved"] = "curved"
    straight: float = 0.5  # share of the base's steps that go along straight paths first, where it learns faster
    wrong: float = 0.0  # share of examples whose answer follows another instruction than the prompt
    dropped: float = 0.1  # share of examples whose prompt is " "
    base_steps: int = 5800
    base_batch: int = 64
    base_rate: float = 2e-3
    matrix_rate: float = 6e-3  # Muon's, for the matrices of the blocks; 0: AdamW for everything

    cfg: float = 1.0  # the teacher's guidance
    trajectories: int = 3000
    lora_rank: int = 8
    lora_alpha: float = 4.0
    lora_rate: float = 3e-3
    v1_steps: int = 400  # each Lightning step alone
    v2_steps: int = 500  # from v1 on, all four steps unrolled

    style_steps: int = 250
    style_rate: float = 3e-3
