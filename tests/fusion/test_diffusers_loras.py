"""Laws against diffusers' own LoRA loader, in float64: its `load_lora_weights` and `fuse_lora` give what we merge.

Its converters of LoRA files are not those of checkpoints, and some disagree with these. Where one does, the parameters
are listed: what is merged there is what the converter of checkpoints makes of the LoRA's modules (see
`test_other_names`), as base and LoRA have to be read alike.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_pipeline

from tests.support import tiny
from tests.support.key_styles import Tensors, fused
from tests.support.original_names import family_of, original, random_lora, spelt, weights
from tests.tiny_models import tiny_transformer

QKV = {f"attention.to_{part}" for part in "qkv"}
Z_IMAGE_ENDS = {"all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"}
MODULATIONS = {f"{name}.linear" for name in ("double_stream_modulation_img", "double_stream_modulation_txt")}
GUIDANCE = {f"time_guidance_embed.guidance_embedder.linear_{number}" for number in (1, 2)}

# By family and spelling: the modules that are given, and the ends of those that diffusers 0.42.1 changes in another way
# or not at all.
CASES: dict[tuple[str, str], tuple[str, set[str]]] = {
    **{(name, "diffusers"): (".*", set()) for name in ("flux_1", "flux_2", "z_image", "krea_2", "qwen_image_21")},
    ("wan_21_i2v", "diffusers"): (".*", set()),
    ("wan_22", "diffusers"): (".*", set()),
    ("sdxl", "diffusers"): (".*", set()),
    ("sdxl", "kohya"): (".*", set()),
    # The base's last modulation is swapped, the LoRA's is not.
    ("flux_2", "dotted"): (".*", {"norm_out.linear"}),
    ("flux_2", "kohya"): (
        ".*",
        {"norm_out.linear", "single_stream_modulation.linear"} | MODULATIONS | GUIDANCE,
    ),
    ("z_image", "dotted"): (".*", QKV | Z_IMAGE_ENDS | {"attention.to_out.0"}),
    ("z_image", "kohya"): (".*", Z_IMAGE_ENDS),
    ("krea_2", "dotted"): (".*", set()),
    ("qwen_image_21", "dotted"): (".*", {"img_mlp.gate_layer", "img_mlp.proj"}),
    # A LoRA with a patch_embedding raises there; so do names with underscores outside of the blocks.
    ("wan_21_i2v", "dotted"): (r"(?!patch_embedding).*", set()),
    ("wan_22", "dotted"): (r"(?!patch_embedding).*", set()),
    ("wan_22", "kohya"): (r"blocks\..*", set()),
    # Widths of linear1 are those of the published model there.
    ("flux_1", "kohya"): (r"double_blocks\..*(attn|mlp|mod).*", set()),
}
LOADERS = {"wan_21_i2v": "Wan", "wan_22": "Wan", "flux_1": "Flux", "flux_2": "Flux2", "z_image": "ZImage"}
LOADERS |= {"krea_2": "Krea2", "qwen_image_21": "QwenImage", "sdxl": "StableDiffusionXL"}


def by_diffusers(name: str, lora: Tensors) -> Tensors:
    """The tiny transformer in float64 with a LoRA fused by diffusers."""
    mixin: Any = getattr(lora_pipeline, f"{LOADERS[name]}LoraLoaderMixin")
    model: Any = tiny_transformer(name).double()
    part = "unet" if name == "sdxl" else "transformer"
    others = dict.fromkeys(("text_encoder", "text_encoder_2", "hf_device_map"))
    pipe = type("Denoiser", (mixin,), {**others, part: model, "components": {part: model}})()
    pipe.load_lora_weights({key: torch.from_numpy(np.array(part)) for key, part in lora.items()}, adapter_name="a")
    model.double()
    pipe.fuse_lora(components=[part])
    pipe.unload_lora_weights()
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


def written(factors: Tensors, spelling: str) -> Tensors:
    """The keys that trainers write for a spelling."""
    if spelling == "kohya":
        return spelt(factors, "lora_unet_", flat=True)
    own = "unet." if any(key.startswith("down_blocks") for key in factors) else "transformer."
    made = spelt(factors, own if spelling == "diffusers" else "diffusion_model.")
    half = {key: part * (0.5 if "lora_up" in key else 1.0) for key, part in made.items() if not key.endswith(".alpha")}
    return {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): part for key, part in half.items()}


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_a_lora_that_diffusers_reads_is_merged_as_it_fuses_it(name: str, spelling: str, tmp_path: Path) -> None:
    chosen, differing = CASES[name, spelling]
    base = weights(name)
    source = base if spelling == "diffusers" else original(family_of(name), base)
    factors, _ = random_lora({key: part for key, part in source.items() if re.fullmatch(chosen, key)})
    lora = written(factors, spelling)
    file = tiny.write_lora(tmp_path / "l.safetensors", lora)
    ours = fused(tiny.write_component(tmp_path / "base", base, 1), file, 1.0, tmp_path / "out")
    theirs = by_diffusers(name, lora)
    other = {
        key for key, part in ours.items() if not np.allclose(part.numpy(), theirs[key], rtol=2.0**-23, atol=2.0**-40)
    }
    assert other == {key for key in ours if key.removesuffix(".weight").endswith(tuple(differing))}
    changed = {key for key, part in ours.items() if not np.array_equal(part.numpy(), base[key])}
    assert len(changed) > 5
