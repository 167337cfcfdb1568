"""What LoRAs change: the classes of every family, as its checkpoints configure them and as small as they can be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers

from tests.tiny_models.texts import TOWER

SEED = 20261
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A class of diffusers with the settings of a family.

    `real` is the checkpoint's own configuration as far as it differs from the class's defaults, with one block of each
    kind; `tiny` has the same kinds of blocks at a few channels.
    """

    kind: str
    tiny: Mapping[str, Any]
    real: Mapping[str, Any] = field(default_factory=dict)

    def make(self, **more: Any) -> torch.nn.Module:
        """The tiny model, each of its values at random, the same every time."""
        model: torch.nn.Module = getattr(diffusers, self.kind)(**{**self.tiny, **more})
        return fill(model)

    def shapes(self, **more: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the checkpoint's own widths, by name."""
        with torch.device("meta"):
            model = getattr(diffusers, self.kind)(**{**self.real, **more})
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_WAN = {**_HEADS, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}
_WAN_I2V = {**_WAN, "in_channels": 36}

DENOISERS: Mapping[str, Denoiser] = {
    "qwen_image": Denoiser(
        "QwenImageTransformer2DModel",
        {**_HEADS, "num_layers": 2, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)},
        {"num_layers": 1},
    ),
    "qwen_image_21": Denoiser(
        "QwenImage21Transformer2DModel",
        {**_HEADS, "num_layers": 2, "context_in_dim": 16, "axes_dims_rope": (2, 2, 4), "in_channels": 64},
        {"num_layers": 1},
    ),
    "wan_21": Denoiser("WanTransformer3DModel", _WAN, {"num_layers": 1}),
    "wan_21_i2v": Denoiser(
        "WanTransformer3DModel",
        {**_WAN_I2V, "image_dim": 16, "added_kv_proj_dim": 16},
        {"num_layers": 1, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "wan_22": Denoiser("WanTransformer3DModel", _WAN, {"num_layers": 1}),
    "wan_22_i2v": Denoiser("WanTransformer3DModel", _WAN_I2V, {"num_layers": 1, "in_channels": 36}),
    "flux_1": Denoiser(
        "FluxTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    ),
    "flux_2": Denoiser(
        "Flux2Transformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 48,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        {"num_layers": 1, "num_single_layers": 1},
    ),
    "flux_2_klein": Denoiser(
        "Flux2Transformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 48,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
            "guidance_embeds": False,
        },
        {  # klein 4B
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "z_image": Denoiser(
        "ZImageTransformer2DModel",
        {
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [2, 2, 4],
            "axes_lens": [1024, 64, 64],
        },
        {"n_layers": 1, "n_refiner_layers": 1},
    ),
    "krea_2": Denoiser(
        "Krea2Transformer2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 24,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (2, 2, 4),
        },
        {"num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    ),
    "ltx_2": Denoiser(
        "LTX2VideoTransformer3DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "caption_channels": 16,
        },
        {"num_layers": 1},
    ),
    "sdxl": Denoiser(
        "UNet2DConditionModel",
        {
            **SDXL,
            "sample_size": 8,
            "block_out_channels": (8, 16, 16),
            "norm_num_groups": 4,
            "attention_head_dim": (1, 2, 2),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 32,  # both text encoders
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,  # 6 times addition_time_embed_dim, and the second's pooled
        },
        {
            **SDXL,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


def text_encoder_shapes(*, second: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of SDXL's text encoders: CLIP-L, which FLUX.1 has too, and OpenCLIP bigG with its projection."""
    kind = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
    sizes = {**CLIP_G, "projection_dim": 1280} if second else CLIP_L
    with torch.device("meta"):
        model = kind(transformers.CLIPTextConfig(**{**sizes, "num_hidden_layers": 1}))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes if second else {f"{TOWER}{name}": shape for name, shape in shapes.items()}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Set every parameter at random: matrices by 1 / sqrt(fan_in), biases and tables small, norms about 1."""
    stream = torch.Generator().manual_seed(SEED)
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=stream)
            if parameter.ndim > 1 and "table" not in name:
                fan_in = 1 if id(parameter) in embeddings else parameter[0].numel()
                parameter.copy_(values / fan_in**0.5)
            else:
                middle = 1.0 if "norm" in name and name.endswith(("weight", "gamma")) else 0.0
                parameter.copy_(middle + 0.1 * values)
    return model.eval()
