"""Z-Image and Z-Image-Turbo."""

from lora_fuse.models.family import Family, KnownBase, within
from lora_fuse.models.pipeline_call import CFG_FROM_ZERO, PipelineCall

_BLOCK = (
    "attention.qkv attention.out attention.q_norm attention.k_norm feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "attention_norm1 attention_norm2 ffn_norm1 ffn_norm2 adaLN_modulation.0"
)

FAMILY = Family(
    name="Z-Image",
    bases=(
        KnownBase("Tongyi-MAI/Z-Image", "ZImagePipeline", ("alibaba-pai/Z-Image-Fun-Lora-Distill/Z-Image-Fun-Lora-*",)),
        KnownBase("Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline"),
    ),
    components={"transformer": "ZImageTransformer2DModel"},
    converter="convert_z_image_transformer_checkpoint_to_diffusers",
    originals=(
        *within("layers.{}", _BLOCK),
        *within("noise_refiner.{}", _BLOCK),
        *within("context_refiner.{}", _BLOCK),
        *within("siglip_refiner.{}", _BLOCK),
        *("x_embedder", "cap_embedder.0", "cap_embedder.1", "siglip_embedder.0", "siglip_embedder.1"),
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    ),
    original_parameters=("x_pad_token", "cap_pad_token", "siglip_pad_token"),
    pipelines=(PipelineCall("ZImagePipeline", CFG_FROM_ZERO, has_templates=True),),
)
