"""The trained parts as files: a diffusers repository and LoRAs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pocket import LORAS
from pocket.scenes import draw_inputs
from pocket.train import loras, model

SHARD_SIZE = "3MB"  # two shards, as the real transformer has several

# Say which library wrote a file: true of the writing, not of the model.
VERSION_KEYS = {"_diffusers_version", "transformers_version"}


def export(out: Path, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write ``model/`` and ``lora/`` in float16 and bfloat16, and the drawn ``inputs/``, under `out`; other files stay.

    `parts` are `decoder` (the whole VAE), `base`, `latents` (its `mean` and `std`), and the LoRAs of `LORAS`.
    """
    folder = out / "model"
    model.save_frame(folder)
    transformer = model.transformer()
    transformer.load_state_dict(dict(parts["base"]))
    vae = model.vae()
    vae.load_state_dict(dict(parts["decoder"]))
    scale = {f"latents_{key}": [round(v, 5) for v in parts["latents"][key].tolist()] for key in ("mean", "std")}
    vae.register_to_config(**scale)
    transformer.half().save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
    vae.half().save_pretrained(folder / "vae")
    without_versions(folder)
    (out / "lora").mkdir(parents=True, exist_ok=True)
    for version in ("v1", "v2"):
        save_file(dict(parts[version]), out / "lora" / LORAS[version])
    # As diffusers' save_lora_weights names keys and scaling; it adds a second entry to the header's metadata, and
    # safetensors writes two in any order, so that the bytes would change from run to run.
    scaling = {"r": loras.STYLE_RANK, "lora_alpha": loras.STYLE_ALPHA, "target_modules": list(loras.STYLE_TARGETS)}
    save_file(
        {f"transformer.{key}": value for key, value in parts["pastel"].items()},
        out / "lora" / LORAS["pastel"],
        metadata={"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in scaling.items()})},
    )
    draw_inputs(out / "inputs")


def without_versions(folder: Path) -> None:
    """Rewrite every JSON file of `folder` without the versions of the libraries that wrote it."""
    for path in sorted(folder.rglob("*.json")):
        model.write_json(path, json.loads(path.read_text(encoding="utf-8"), object_hook=_without_version_keys))


def _without_version_keys(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in VERSION_KEYS}
