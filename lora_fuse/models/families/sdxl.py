"""Stable Diffusion XL: a UNet and two text encoders."""

from lora_fuse.models.family import Family, KnownBase
from lora_fuse.models.pipeline_call import CFG, PipelineCall

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
)
