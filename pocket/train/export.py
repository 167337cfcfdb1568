"""The trained parts as files: a diffusers repository and LoRAs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from pocket import drawings, model
from pocket.train import style

if TYPE_CHECKING:
    from collections.abc import Mapping

LORAS = {
    "v1": "pocket-lightning-4steps-v1.safetensors",
    "v2": "pocket-lightning-4steps-v2.safetensors",
    "pastel": "pocket-pastel.safetensors",
}
SHARD_SIZE = "3MB"  # two shards, as the real transformer has several

# Say which library wrote a file: true of the writing, not of the model.
VERSION_KEYS = {"_diffusers_version", "transformers_version"}


def export(out: Path, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write ``model/`` and ``lora/`` in float16 and bfloat16, and the drawn ``inputs/``, under `out`.

    Args:
        out: gets the folders; other files there stay.
        parts: `decoder` (the whole VAE), `base`, `latents` (its `mean` and `std`), and the LoRAs of `LORAS`.
    """
    folder = out / "model"
    model.save_frame(folder)
    transformer, vae = model.transformer(), model.vae()
    transformer.load_state_dict(dict(parts["base"]))
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
    scaling = {"r": style.RANK, "lora_alpha": style.ALPHA, "target_modules": list(style.TARGETS)}
    save_file(
        {f"transformer.{key}": value for key, value in parts["pastel"].items()},
        out / "lora" / LORAS["pastel"],
        metadata={"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in scaling.items()})},
    )
    drawings.draw_inputs(out / "inputs")


def without_versions(folder: Path) -> None:
    """Rewrite every JSON file of `folder` without the versions of the libraries that wrote it."""
    for path in sorted(folder.rglob("*.json")):
        model.write_json(path, _without_versions(json.loads(path.read_text(encoding="utf-8"))))


def _without_versions(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_versions(item) for key, item in value.items() if key not in VERSION_KEYS}
