"""The pocket checkpoint: the real diffusers and transformers classes of Qwen-Image-Edit, a few channels wide.

Geometry that others rely on is the real one (16 latent channels, 8 pixels a latent, 2x2 latents a token, the two
attention streams of each block, their twelve LoRA targets); everything else is as small as it can be.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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

from pocket import SCHEDULER
from pocket.scenes import prompts
from pocket.train import tokenizer as bpe

PIPELINES = (QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline)

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

    Every weight is a function of its name, see `uniform`.
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


def uniform(name: str, shape: Sequence[int], std: float) -> torch.Tensor:
    """Uniform values in [-std sqrt 3, std sqrt 3), so with standard deviation `std`: a float32 tensor of `shape`.

    Every value is a function of the name, and of nothing else: the bits come from SHAKE-128, as the streams of random
    generators change between versions, and the arithmetic up to the final rounding is exact or correctly rounded by
    IEEE 754. So the same name and shape give the same bytes on every machine.
    """
    count = math.prod(shape)
    bits = np.frombuffer(hashlib.shake_128(name.encode()).digest(4 * count), dtype="<u4")
    unit = (bits >> 8).astype(np.float64) / 2**23 - 1.0  # 24 bits: exact in [-1, 1)
    return torch.from_numpy((unit * (std * math.sqrt(3.0))).astype(np.float32)).reshape(*shape)


def fill(module: torch.nn.Module, prefix: str) -> None:
    """Set every parameter of `module`: matrices by `uniform`, biases to 0, norm weights to 1.

    A matrix has the standard deviation 1 / sqrt(fan_in), an embedding, whose rows are looked up and not summed, 1.
    The prefix goes before each parameter's name, so that equal names in two components differ.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if sum(size > 1 for size in parameter.shape) < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                fan_in = 1 if id(parameter) in embeddings else math.prod(parameter.shape[1:])
                parameter.copy_(uniform(f"{prefix}.{name}", parameter.shape, 1 / math.sqrt(fan_in)))


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
