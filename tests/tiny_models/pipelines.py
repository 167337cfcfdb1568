"""Pipelines of every family in diffusers' own classes, of 100 kB to 2 MB, each a complete repository."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from tests.tiny_models import texts
from tests.tiny_models.denoisers import DENOISERS, fill

Parts = dict[str, Any]
BOUNDARY = 0.875  # Wan 2.2 T2V A14B's boundary_ratio; its I2V has 0.9


def _flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def _unipc() -> Any:
    """Wan's scheduler, as its repositories have it."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def _kl(channels: int, **more: Any) -> Any:
    """AutoencoderKL, 8 pixels a latent."""
    sizes = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return fill(diffusers.AutoencoderKL(**sizes, **blocks, latent_channels=channels, **more))


def _causal(kind: str) -> Any:
    """AutoencoderKLQwenImage or AutoencoderKLWan: 8 pixels and 4 frames a latent."""
    return fill(getattr(diffusers, kind)(base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1))


def _qwen_image() -> Parts:
    return {
        "text_encoder": fill(texts.qwen25_vl()),
        "tokenizer": texts.qwen_tokenizer(),
        "vae": _causal("AutoencoderKLQwenImage"),
        "scheduler": _flow(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "transformer": DENOISERS["qwen_image"].make(),
    }


def _qwen_image_21() -> Parts:
    return {
        "text_encoder": fill(texts.qwen3_vl(head=True)),
        "vae": fill(diffusers.AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4, num_res_blocks=1)),
        "scheduler": _flow(use_dynamic_shifting=True, shift_terminal=0.02),
        "transformer": DENOISERS["qwen_image_21"].make(),
    }


def _wan(name: str) -> Parts:
    made: Parts = {
        "tokenizer": texts.t5_tokenizer(),
        "text_encoder": fill(texts.t5(per_layer_bias=True)),
        "vae": _causal("AutoencoderKLWan"),
        "scheduler": _unipc(),
        "transformer": DENOISERS[name].make(),
    }
    if name.startswith("wan_22"):
        second = DENOISERS[name].make()
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(0.97)  # another one, and still near
        made["transformer_2"] = second
    if name == "wan_21_i2v":
        vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        vision.image_size, vision.patch_size = 16, 8
        made["image_encoder"] = fill(CLIPVisionModel(vision))
        made["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    return made


def _flux_1() -> Parts:
    return {
        "tokenizer": texts.clip_tokenizer(),
        "text_encoder": fill(texts.clip(projection=False)),
        "tokenizer_2": texts.t5_tokenizer(),
        "text_encoder_2": fill(texts.t5()),
        "vae": _kl(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.36),
        "scheduler": _flow(use_dynamic_shifting=True, shift=3.0),
        "transformer": DENOISERS["flux_1"].make(),
    }


def _flux_2(name: str, layers: int) -> Parts:
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=4)
    return {
        "tokenizer": texts.qwen_tokenizer(),
        "text_encoder": fill(texts.qwen3(layers)),
        "vae": fill(vae),
        "scheduler": _flow(use_dynamic_shifting=True, shift=3.0),
        "transformer": DENOISERS[name].make(),
    }


def _z_image() -> Parts:
    return {
        "tokenizer": texts.qwen_tokenizer(),
        "text_encoder": fill(texts.qwen3()),
        "vae": _kl(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.36),
        "scheduler": _flow(shift=3.0),
        "transformer": DENOISERS["z_image"].make(),
    }


def _krea_2() -> Parts:
    return {
        "tokenizer": texts.qwen_tokenizer(),
        "text_encoder": fill(texts.qwen3_vl(head=False)),
        "vae": _causal("AutoencoderKLQwenImage"),
        "scheduler": _flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400),
        "transformer": DENOISERS["krea_2"].make(),
    }


def _sdxl() -> Parts:
    return {
        "tokenizer": texts.clip_tokenizer(),
        "text_encoder": fill(texts.clip(projection=False)),
        "tokenizer_2": texts.clip_tokenizer(),
        "text_encoder_2": fill(texts.clip(projection=True)),
        "vae": _kl(4, force_upcast=False),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        "unet": DENOISERS["sdxl"].make(),
    }


# A pipeline's class, what it is made of, and its own settings in model_index.json.
PIPELINES: Mapping[str, tuple[str, Callable[[], Parts], Parts]] = {
    "qwen_image": ("QwenImagePipeline", _qwen_image, {}),
    "qwen_image_21": ("QwenImage21Pipeline", _qwen_image_21, {"processor": ["transformers", "Qwen3VLProcessor"]}),
    "wan_21": ("WanPipeline", lambda: _wan("wan_21"), {"transformer_2": [None, None], "boundary_ratio": None}),
    "wan_21_i2v": (
        "WanImageToVideoPipeline",
        lambda: _wan("wan_21_i2v"),
        {"transformer_2": [None, None], "boundary_ratio": None},
    ),
    "wan_22": ("WanPipeline", lambda: _wan("wan_22"), {"boundary_ratio": BOUNDARY}),
    "wan_22_i2v": (
        "WanImageToVideoPipeline",
        lambda: _wan("wan_22_i2v"),
        {"boundary_ratio": 0.9, "image_encoder": [None, None], "image_processor": [None, None]},
    ),
    "flux_1": ("FluxPipeline", _flux_1, {"image_encoder": [None, None], "feature_extractor": [None, None]}),
    "flux_2": ("Flux2Pipeline", lambda: _flux_2("flux_2", 30), {}),
    "flux_2_klein": ("Flux2KleinPipeline", lambda: _flux_2("flux_2_klein", 27), {"is_distilled": False}),
    "z_image": ("ZImagePipeline", _z_image, {}),
    "krea_2": ("Krea2Pipeline", _krea_2, {"text_encoder_select_layers": [1, 2], "is_distilled": True, "patch_size": 2}),
    "sdxl": (
        "StableDiffusionXLPipeline",
        _sdxl,
        {
            "force_zeros_for_empty_prompt": True,
            "image_encoder": [None, None],
            "feature_extractor": [None, None],
        },
    ),
}


def tiny(name: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the pipeline of a family to `folder`, all of it in `dtype`, and give the folder."""
    kind, make, more = PIPELINES[name]
    index: Parts = {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    for part, made in make().items():
        library = type(made).__module__.partition(".")[0]
        index[part] = [library, _class_name(made)]
        stored: Any = made.to(dtype) if isinstance(made, torch.nn.Module) else made
        stored.save_pretrained(folder / part)
        if isinstance(made, CLIPTextModel):
            _as_published(folder / part / "model.safetensors")
    if "processor" in more:
        texts.save_processor(folder / "processor", more["processor"][1].removesuffix("Processor"))
    (folder / "model_index.json").write_text(json.dumps(index | more, indent=2) + "\n")
    return folder


def _as_published(path: Path) -> None:
    """Give CLIP's weights the names that published repositories have; transformers 5 saves them without the first."""
    save_file({f"{texts.TOWER}{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def _class_name(part: Any) -> str:
    """The class as repositories name it, by which a loaded part is checked."""
    return {"T5Tokenizer": "T5TokenizerFast", "CLIPImageProcessorPil": "CLIPImageProcessor"}.get(
        type(part).__name__, type(part).__name__
    )


def call(name: str) -> Parts:
    """Arguments of a call that gives a picture of 64 x 64, or a clip of five, in two steps."""
    kind, _, _ = PIPELINES[name]
    made: Parts = {"prompt": "a purple rabbit", "num_inference_steps": 2, "height": 64, "width": 64}
    if "Wan" in kind:
        made |= {"num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 32}
    if kind == "WanImageToVideoPipeline":
        made["image"] = Image.new("RGB", (64, 64), (90, 140, 30))
    if kind.startswith(("Flux", "ZImage", "Krea2")):
        made |= {"max_sequence_length": 64}
    if kind.startswith("Krea2") or kind == "StableDiffusionXLPipeline":
        made |= {"guidance_scale": 0.0}
    return made
