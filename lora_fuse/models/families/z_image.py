"""Z-Image and Z-Image-Turbo."""

from lora_fuse.models.family import Family, KnownBase

FAMILY = Family(
    name="Z-Image",
    bases=(
        KnownBase("Tongyi-MAI/Z-Image", "ZImagePipeline"),
        KnownBase("Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline"),
    ),
    components={"transformer": "ZImageTransformer2DModel"},
    converter="convert_z_image_transformer_checkpoint_to_diffusers",
)
