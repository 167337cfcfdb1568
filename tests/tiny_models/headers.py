"""Checkpoints of true shapes without weights: a safetensors header, and after it a hole in the file."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from tests.tiny_models.denoisers import DENOISERS, text_encoder_shapes

Shapes = Mapping[str, tuple[int, ...]]
COMPONENTS = {"sdxl": ("unet", "text_encoder", "text_encoder_2"), "wan_22": ("transformer", "transformer_2")}
COMPONENTS["wan_22_i2v"] = COMPONENTS["wan_22"]


def headers(name: str, folder: Path) -> Path:
    """Write the components of a family that LoRAs change, of true shapes, in bfloat16: a pipeline folder.

    A file takes no more room than its header, and reads as zeros.
    """
    from tests.tiny_models.pipelines import PIPELINES

    index = {"_class_name": PIPELINES[name][0]}
    for component in COMPONENTS.get(name, ("transformer",)):
        texts = component.startswith("text_encoder")
        kind = ("CLIPTextModelWithProjection" if component.endswith("2") else "CLIPTextModel") if texts else ""
        kind = kind or DENOISERS[name].kind
        shapes = text_encoder_shapes(second=component.endswith("2")) if texts else DENOISERS[name].shapes()
        at = folder / component
        at.mkdir(parents=True)
        (at / "config.json").write_text(json.dumps({"_class_name": kind}) + "\n")
        write_hole(at / ("model.safetensors" if texts else "diffusion_pytorch_model.safetensors"), shapes)
        index[component] = ["transformers" if texts else "diffusers", kind]  # type: ignore[assignment]
    (folder / "model_index.json").write_text(json.dumps(index) + "\n")
    return folder


def write_hole(path: Path, shapes: Shapes, *, dtype: str = "BF16", size: int = 2) -> Path:
    """Write a safetensors file of these shapes whose weights are a hole; `size` is the bytes of one value."""
    at = 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, shape in sorted(shapes.items()):
        end = at + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + at)
    return path
