"""FLUX.2: dev and klein."""

from lora_fuse.models.family import Family, KnownBase

# Repository ids: the examples in diffusers 0.42.1, pipelines/flux2.
FAMILY = Family(
    name="FLUX.2",
    bases=(
        KnownBase("black-forest-labs/FLUX.2-dev", "Flux2Pipeline"),
        KnownBase("black-forest-labs/FLUX.2-klein-base-9B", "Flux2KleinPipeline"),
    ),
    components={"transformer": "Flux2Transformer2DModel"},
    converter="convert_flux2_transformer_checkpoint_to_diffusers",
)
