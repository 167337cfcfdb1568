"""The pocket checkpoint: the real diffusers and transformers classes of Qwen-Image-Edit, a few channels wide.

Geometry that others rely on is the real one (16 latent channels, 8 pixels a latent, 2x2 latents a token, the two
attention streams of each block, their twelve LoRA targets); everything else is as small as it can be.
"""

from __future__ import annotations

import inspect
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from pocket import tokenizer as bpe
from pocket.scenes import prompts
from pocket.weights import fill

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SIDE = 128  # pixels: of the pictures that it was trained on, in and out

PIPELINES = (QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline)

# Qwen-Image-Edit's own. A Lightning LoRA wants another, and a merged repository must carry that one.
SCHEDULER: Mapping[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
LIGHTNING_SCHEDULER = {**SCHEDULER, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}

# The 12 linears per block that the published rank-64 Lightning LoRAs cover.
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)

TEXT_WIDTH = 64
CHANNELS = 16  # of a latent
PATCH = 16  # pixels: side of what a latent covers
MODEL_INDEX = {
    "_class_name": "QwenImageEditPipeline",
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def tokenizer() -> Qwen2Tokenizer:
    """One tokenizer for all three pipelines; every word of their templates and of the grammar is one token."""
    return bpe.train([*(_template(pipeline) for pipeline in PIPELINES), *prompts()])


def _template(pipeline: Any) -> str:
    """The prompt template is set in `__init__`: read it off an instance without components."""
    parts = dict.fromkeys(inspect.signature(pipeline).parameters)
    return str(pipeline(**parts).prompt_template_encode)


def text_encoder(words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL, 2 text layers and 2 vision layers, never trained: its outputs tell the words apart, which is enough.

    Every weight is a function of its name, see `pocket.weights`.
    """
    token = words.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [1],
            "window_size": 112,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        vision_token_id=token("<|vision_pad|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    fill(model, "text_encoder")
    return model.eval()


def vae() -> AutoencoderKLQwenImage:
    """An untrained VAE of 1.5 M parameters, 16 pixels a latent."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 6, 6],
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def transformer() -> QwenImageTransformer2DModel:
    """An untrained transformer of 2.6 M parameters whose blocks start as the identity and whose output starts at 0.

    Source: adaLN-Zero, Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2.
    """
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=5,
        attention_head_dim=24,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 10, 10),
    )
    zeroed = [layer for block in model.transformer_blocks for layer in (block.img_mod[1], block.txt_mod[1])]
    with torch.no_grad():
        for layer in (*zeroed, model.proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def save_frame(folder: Path) -> None:
    """Write a diffusers repository without its two trained parts, the transformer and the VAE."""
    words = tokenizer()
    text_encoder(words).half().save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler.from_config(dict(SCHEDULER)).save_pretrained(folder / "scheduler")
    words.save_pretrained(folder / "tokenizer")
    # The parts, not a Qwen2VLProcessor: that one cannot be made without torchvision, and with it writes more files.
    words.save_pretrained(folder / "processor")
    pixels = 56 * 56  # 4 tokens: the picture itself reaches the transformer through the VAE
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(folder / "processor")
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}  # looked for where torchvision is installed
    write_json(folder / "processor" / "video_preprocessor_config.json", video)
    write_json(folder / "model_index.json", MODEL_INDEX)


def write_json(path: Path, value: Any) -> None:
    """Write sorted, indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
