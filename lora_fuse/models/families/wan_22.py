"""Wan 2.2 A14B: a transformer for high noise and one for low noise, with the names of Wan 2.1."""

from lora_fuse.models.families import wan_21
from lora_fuse.models.family import Family, KnownBase

_DISTILLED = "lightx2v/Wan2.2-Distill-Loras"

# WanLoraLoaderMixin of diffusers 0.42.1 has both components.
FAMILY = Family(
    name="Wan 2.2",
    bases=(
        KnownBase("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "WanPipeline", (f"{_DISTILLED}/wan2.2_t2v_A14b_*",)),
        KnownBase("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "WanImageToVideoPipeline", (f"{_DISTILLED}/wan2.2_i2v_A14b_*",)),
    ),
    components={"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel"},
    converter="convert_wan_transformer_to_diffusers",
    originals=tuple(
        name for name in wan_21.FAMILY.originals if not name.endswith("_img") and not name.startswith("img_emb.")
    ),
    original_parameters=wan_21.FAMILY.original_parameters,
)
