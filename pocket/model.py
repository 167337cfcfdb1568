"""The pocket checkpoint: the real diffusers and transformers classes of Qwen-Image-Edit, a few channels wide.

Geometry that others rely on is the real one (16 latent channels, 8 pixels a latent, 2x2 latents a token, the two
attention streams of each block, their twelve LoRA targets); everything else is as small as it can be.
"""

from __future__ import annotations

import inspect
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

from pocket.tokenizer import train
from pocket.weights import fill, uniform

if TYPE_CHECKING:
    from collections.abc import Mapping

PIPELINES = (QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline)

# Words that the templates lack and that the recipes' prompts use.
PROMPTS = (
    "Change the rabbit's color to purple",
    "Picture 1: Picture 2: The rabbit in Picture 1 wears the hat from Picture 2.",
    "Make the cat's fur blue and turn the background into a night sky",
    "A red cat with a blue hat in a green garden, cartoon",
)

# Qwen-Image-Edit's own. A Lightning LoRA wants another, and a merged repository must carry that one.
SCHEDULER: dict[str, Any] = {
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

TEXT_WIDTH = 32
BLOCKS = 2

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
LORA_RANK = 8
LORA_ALPHA = 4.0
LORA_STRENGTH = 1.0  # size of the delta beside the weight that it is added to

# Each component's weights are a function of its seed and of the parameters' names. The VAE's is the one among the
# first hundred whose decoder gives all three colours a mean near mid-grey and a like spread.
SEEDS: Mapping[str, int] = {"text_encoder": 0, "transformer": 0, "vae": 86, "lora": 0}

# Factors on weights of unit gain, by the end of the name. They make a picture depend on everything that it should
# (LoRA, scale, scheduler, prompt, pictures, seed) without amplifying rounding; README.md has the figures.
TRANSFORMER_GAINS: Mapping[str, float] = {
    "img_mod.1.weight": 2.5,
    "txt_mod.1.weight": 2.5,
    "norm_added_k.weight": 3.5,  # some twenty words hold their own beside thousands of picture tokens
    "proj_out.weight": 1.5,
}
VAE_GAINS: Mapping[str, float] = {"decoder.conv_out.weight": 0.6}  # contrast: a spread of some 50 levels of 255


def tokenizer() -> Qwen2Tokenizer:
    """One tokenizer for all three pipelines."""
    return train([*(_template(pipeline) for pipeline in PIPELINES), *PROMPTS])


def _template(pipeline: Any) -> str:
    """The prompt template is set in `__init__`: read it off an instance without components."""
    parts = dict.fromkeys(inspect.signature(pipeline).parameters)
    return str(pipeline(**parts).prompt_template_encode)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The base's own scheduler."""
    return FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)


def image_processor() -> Qwen2VLImageProcessorPil:
    """The picture as the text encoder sees it: at most 4 x 56 x 56 pixels, 16 tokens."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 4 * 56 * 56})


def text_encoder(words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL, 2 text layers and 2 vision layers, bfloat16."""
    token = words.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": TEXT_WIDTH,
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
    return _filled(Qwen2_5_VLForConditionalGeneration(config), "text_encoder", {})


def transformer() -> QwenImageTransformer2DModel:
    """Two double-stream blocks, 2 heads of 16, bfloat16."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=BLOCKS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return _filled(model, "transformer", TRANSFORMER_GAINS)


def vae() -> AutoencoderKLQwenImage:
    """Real geometry, 4 channels at full resolution, bfloat16."""
    model = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    return _filled(model, "vae", VAE_GAINS)


def lora(model: QwenImageTransformer2DModel) -> dict[str, torch.Tensor]:
    """A LoRA on every target of every block, in the key format of the published Lightning files, float32.

    With entries of `down` of variance 1 and of `up` of variance u, (alpha/rank) up @ down has entries of variance
    (alpha/rank)^2 rank u; u is chosen to make that LORA_STRENGTH^2 / fan_in, the weight's own times the strength.
    """
    state = {}
    weights = dict(model.named_parameters())
    for name in (f"transformer_blocks.{block}.{target}" for block in range(BLOCKS) for target in LORA_TARGETS):
        rows, columns = weights[f"{name}.weight"].shape
        spread = LORA_STRENGTH * LORA_RANK**0.5 / LORA_ALPHA / columns**0.5
        state[f"{name}.lora_down.weight"] = uniform(f"lora:{SEEDS['lora']}.{name}.down", (LORA_RANK, columns), 1.0)
        state[f"{name}.lora_up.weight"] = uniform(f"lora:{SEEDS['lora']}.{name}.up", (rows, LORA_RANK), spread)
        state[f"{name}.alpha"] = torch.tensor(LORA_ALPHA)
    return state


def _filled(model: Any, component: str, gains: Mapping[str, float]) -> Any:
    fill(model, f"{component}:{SEEDS[component]}", gains)
    return model.to(torch.bfloat16).eval()
