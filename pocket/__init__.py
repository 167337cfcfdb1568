"""The embedded model, a diffusers repository of a few MB: its data, its training, its measurements, its controls.

Here is what all of these agree on; `pocket.train` makes the model, the rest uses what was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fuse.machine import interrupts
from lora_fuse.models import LIGHTNING

interrupts.install(interrupts.KEPT)

POCKET = Path(__file__).resolve().parent
LORAS = {
    "v1": "pocket-lightning-4steps-v1.safetensors",
    "v2": "pocket-lightning-4steps-v2.safetensors",
    "pastel": "pocket-pastel.safetensors",
}
SIDE = 128  # pixels: of the pictures that it was trained on, in and out

# Qwen-Image-Edit's own. A Lightning LoRA wants another, and a merged repository must carry that one.
SCHEDULER: Mapping[str, Any] = {**LIGHTNING, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}

# The 12 linears per block that the published rank-64 Lightning LoRAs cover.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
LORA_TARGETS = (*(f"attn.{linear}" for linear in ATTENTION), *FEED_FORWARD)
