"""LoRAs for the tiny pipelines, as small changes in the names that trainers write."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 2
STRENGTH = 0.3  # of a change, in times of the weight's own size
KOHYA = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
WAN = {"attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v"}


def write_loras(name: str, pipeline: Path, folder: Path) -> None:
    """Write the LoRAs of attention's matrices for a tiny pipeline; Wan 2.2 has one file for each noise."""
    folder.mkdir(parents=True)
    if name.startswith("wan_22"):
        for noise, component in (("high", "transformer"), ("low", "transformer_2")):
            weights = load_file(pipeline / component / "diffusion_pytorch_model.safetensors")
            made = {f"diffusion_model.{_original(key)}": value for key, value in _factors(weights).items()}
            save_file(made, folder / f"{name}_{noise}_noise.safetensors")
        return
    made = {}
    for component, prefix in KOHYA.items():
        for path in sorted((pipeline / component).glob("*.safetensors")) if (pipeline / component).is_dir() else []:
            for key, value in _factors(load_file(path)).items():
                module, _, part = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
                role = f"lora_{part}" if ".lora_" in key else part
                made[f"{prefix}{module.replace('.', '_')}.{role}"] = value
    save_file(made, folder / f"{name}.safetensors")


def _factors(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(len(weights))
    made: dict[str, torch.Tensor] = {}
    for key in sorted(weights):
        if "attn" in key and key.endswith(".weight") and weights[key].ndim == 2:
            rows, columns = weights[key].shape
            module = key.removesuffix(".weight")
            made[f"{module}.lora_down.weight"] = torch.randn(RANK, columns, generator=stream) / columns**0.5
            made[f"{module}.lora_up.weight"] = STRENGTH * torch.randn(rows, RANK, generator=stream)
            made[f"{module}.alpha"] = torch.tensor(float(RANK))
    return made


def _original(key: str) -> str:
    for ours, theirs in WAN.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key
