"""FLUX.1: dev, schnell, Kontext."""

from lora_fuse.models.family import Family, KnownBase

# FluxLoraLoaderMixin of diffusers 0.42.1: the transformer and CLIP, not T5.
FAMILY = Family(
    name="FLUX.1",
    bases=(
        KnownBase("black-forest-labs/FLUX.1-dev", "FluxPipeline"),
        KnownBase("black-forest-labs/FLUX.1-schnell", "FluxPipeline"),
        KnownBase("black-forest-labs/FLUX.1-Kontext-dev", "FluxKontextPipeline"),
    ),
    components={"transformer": "FluxTransformer2DModel", "text_encoder": "CLIPTextModel"},
    converter="convert_flux_transformer_checkpoint_to_diffusers",
)
