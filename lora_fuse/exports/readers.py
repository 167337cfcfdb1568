"""Engines that read the exports: the version that was run on a file of each format, its place, and the way to load it.

``make engines`` runs diffusers, stable-diffusion.cpp, and ComfyUI where there is one. Versions are those that were run,
`since` is by the source alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DIFFUSERS = "0.42.1"
STABLE_DIFFUSION_CPP = "0.4.7"  # of stable-diffusion-cpp-python, whose archive has the source
COMFYUI = "0.29.0 and 0.33.0"
COMFYUI_OLD = "0.3.64"  # of October 2025; 2511 is newer, and its edits are drawn wrongly there


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that reads a format.

    `ran` is the version that drew from such a file, empty where none did; `since` the version or commit from which on
    the source reads it; `place` the folder of the engine that the file goes into, empty where any does. `load` is the
    command or the code, with ``{file}``, ``{repository}`` (the merged one, or its folder) and ``{kind}`` (the
    transformer's class) to fill in, in `language`: Python, a shell's, or in words.
    """

    name: str
    ran: str
    place: str
    language: str
    load: str
    since: str = ""

    def loading(self, file: str, repository: str, kind: str) -> str:
        """The command or the code for a file."""
        return self.load.format(file=file, repository=repository, kind=kind)

    @property
    def versions(self) -> str:
        """The version from which on a file is read, in words."""
        by_source = f"by its source from {self.since} on" if self.since else ""
        return ", ".join(filter(None, [self.ran or "not run", by_source]))


_IN_COMFYUI = 'the node "Load Diffusion Model" with {file}, weight_dtype "default"'
_IN_COMFYUI_GGUF = 'the node "Unet Loader (GGUF)" of ComfyUI-GGUF with {file}'
_IN_SD_CLI = (
    "sd-cli --diffusion-model {file} --vae VAE.safetensors --llm TEXT_ENCODER.safetensors "
    '--sampling-method euler --cfg-scale 1 --steps 4 -p "PROMPT"'
)


def _diffusers(config: str = "") -> Engine:
    """Diffusers, with a configuration class for what is quantised."""
    imports = f"{config}, {{kind}}" if config else "{kind}"
    quantised = f"\n    quantization_config={config}(compute_dtype=torch.bfloat16)," if config else ""
    code = f"""\
import torch
from diffusers import {imports}

transformer = {{kind}}.from_single_file(
    "{{file}}",
    config="{{repository}}",
    subfolder="transformer",
    torch_dtype=torch.bfloat16,{quantised}
)"""
    return Engine("diffusers", DIFFUSERS, "", "python", code)


def _comfyui(ran: str = COMFYUI, since: str = "") -> Engine:
    return Engine("ComfyUI", ran, "models/diffusion_models", "words", _IN_COMFYUI, since)


def _stable_diffusion_cpp(ran: str = STABLE_DIFFUSION_CPP, since: str = "") -> Engine:
    return Engine("stable-diffusion.cpp", ran, "", "sh", _IN_SD_CLI, since)


_GGUF = "gguf"  # all formats whose names begin so
READERS: Mapping[str, tuple[Engine, ...]] = {
    "single_file": (_comfyui(f"{COMFYUI_OLD}, {COMFYUI}"), _stable_diffusion_cpp(), _diffusers()),
    "int8_convrot": (_comfyui(), _stable_diffusion_cpp("", "97d29908 (August 2026)")),
    _GGUF: (
        Engine(
            "ComfyUI-GGUF", f"in ComfyUI {COMFYUI_OLD}, {COMFYUI}", "models/diffusion_models", "words", _IN_COMFYUI_GGUF
        ),
        _stable_diffusion_cpp(),
        _diffusers("GGUFQuantizationConfig"),
    ),
    "fp8_scaled": (_comfyui(since="0.8.0"),),
    "fp8_rows": (_diffusers("BFLQuantizationConfig"),),
    "mxfp8": (_comfyui(),),
    "nvfp4": (_comfyui(since="0.8.0"),),
}


def readers_of(name: str) -> tuple[Engine, ...]:
    """The engines that read a format, by its name in ``export.formats``; none where nothing is known of it."""
    return READERS.get(_GGUF if name.startswith(f"{_GGUF}_") else name, ())
