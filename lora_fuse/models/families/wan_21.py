"""Wan 2.1: one transformer of 1.3B or 14B, text or a picture to video."""

from lora_fuse.models.family import Family, KnownBase

# The repository ids are those of the examples in diffusers 0.42.1, pipelines/wan.
FAMILY = Family(
    name="Wan 2.1",
    bases=(
        KnownBase("Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanPipeline"),
        KnownBase("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline"),
        KnownBase("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "WanImageToVideoPipeline"),
    ),
    components={"transformer": "WanTransformer3DModel"},
    converter="convert_wan_transformer_to_diffusers",
)
