"""Krea 2: Raw, which is trained on, and Turbo, which runs."""

from lora_fuse.models.family import Family, KnownBase

FAMILY = Family(
    name="Krea 2",
    bases=(
        KnownBase("krea/Krea-2-Raw", "Krea2Pipeline"),
        # github.com/krea-ai/krea-2: "You train LoRAs on RAW and apply them on Turbo".
        KnownBase("krea/Krea-2-Turbo", "Krea2Pipeline", loras_of=("krea/Krea-2-Raw",)),
    ),
    components={"transformer": "Krea2Transformer2DModel"},
    converter="convert_krea2_transformer_checkpoint_to_diffusers",
)
