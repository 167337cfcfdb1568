"""Stable Diffusion XL: a UNet and two text encoders."""

from lora_fuse.models.family import Family, KnownBase, within
from lora_fuse.models.pipeline_call import CFG, PipelineCall

# The original UNet numbers its layers through, as stability-ai/generative-models does (SGM).
_RESNETS = (
    *(f"input_blocks.{number}.0" for number in (1, 2, 4, 5, 7, 8)),
    *("middle_block.0", "middle_block.2"),
    *(f"output_blocks.{number}.0" for number in range(9)),
)
_TRANSFORMERS = (
    *(f"input_blocks.{number}.1" for number in (4, 5, 7, 8)),
    "middle_block.1",
    *(f"output_blocks.{number}.1" for number in range(6)),
)
_RESNET = "in_layers.0 in_layers.2 emb_layers.1 out_layers.0 out_layers.3 skip_connection"
_ATTENTION = "to_q to_k to_v to_out.0"

# StableDiffusionXLLoraLoaderMixin of diffusers 0.42.1 has all three.
FAMILY = Family(
    name="SDXL",
    bases=(KnownBase("stabilityai/stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline"),),
    components={
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
    converter="convert_ldm_unet_checkpoint",
    pipelines=(PipelineCall("StableDiffusionXLPipeline", CFG, denoisers=("unet",)),),
    originals=(
        *(name for resnet in _RESNETS for name in within(resnet, _RESNET)),
        *(name for one in _TRANSFORMERS for name in within(one, "norm proj_in proj_out")),
        *(
            name
            for one in _TRANSFORMERS
            for attention in ("attn1", "attn2")
            for name in within(f"{one}.transformer_blocks.{{}}.{attention}", _ATTENTION)
        ),
        *(
            name
            for one in _TRANSFORMERS
            for name in within(f"{one}.transformer_blocks.{{}}", "norm1 norm2 norm3 ff.net.0.proj ff.net.2")
        ),
        *("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2"),
        *("input_blocks.3.0.op", "input_blocks.6.0.op", "output_blocks.2.2.conv", "output_blocks.5.2.conv"),
    ),
)
