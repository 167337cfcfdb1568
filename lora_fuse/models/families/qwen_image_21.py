"""Qwen-Image 2.1: one stream, and other names and widths than Qwen-Image of 20B."""

from lora_fuse.models.family import Family, KnownBase

FAMILY = Family(
    name="Qwen-Image-2.1",
    bases=(KnownBase("Qwen/Qwen-Image-2.1", "QwenImage21Pipeline"),),
    components={"transformer": "QwenImage21Transformer2DModel"},
    converter="convert_qwen_image21_transformer_checkpoint_to_diffusers",
)
