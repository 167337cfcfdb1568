"""Wan 2.1: one transformer of 1.3B or 14B, text or a picture to video."""

from lora_fuse.models.family import Family, KnownBase, within
from lora_fuse.models.pipeline_call import CFG, PipelineCall

_RATE = 16  # frames a second: diffusers 0.42.1's examples, pipelines/wan
_EXPERTS = ("transformer", "transformer_2")  # Wan 2.2 has the same classes; 2.1 has no second

# The repository ids are those of the examples in diffusers 0.42.1, pipelines/wan.
_BLOCK = (
    "self_attn.q self_attn.k self_attn.v self_attn.o self_attn.norm_q self_attn.norm_k "
    "cross_attn.q cross_attn.k cross_attn.v cross_attn.o cross_attn.norm_q cross_attn.norm_k "
    "cross_attn.k_img cross_attn.v_img cross_attn.norm_k_img norm3 ffn.0 ffn.2"
)

FAMILY = Family(
    name="Wan 2.1",
    bases=(
        KnownBase("Wan-AI/Wan2.1-T2V-14B-Diffusers", "WanPipeline"),
        KnownBase("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline"),
        KnownBase("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "WanImageToVideoPipeline"),
    ),
    components={"transformer": "WanTransformer3DModel"},
    converter="convert_wan_transformer_to_diffusers",
    originals=(
        *within("blocks.{}", _BLOCK),
        *within("vace_blocks.{}", f"{_BLOCK} before_proj after_proj"),
        *("patch_embedding", "vace_patch_embedding", "text_embedding.0", "text_embedding.2"),
        *("time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"),
        *("img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4"),
    ),
    original_parameters=("blocks.{}.modulation", "vace_blocks.{}.modulation", "head.modulation"),
    pipelines=(
        PipelineCall("WanPipeline", CFG, frames_per_second=_RATE, takes_sigmas=False, denoisers=_EXPERTS),
        PipelineCall(
            "WanImageToVideoPipeline",
            CFG,
            pictures=range(1, 2),
            frames_per_second=_RATE,
            takes_sigmas=False,
            denoisers=_EXPERTS,
            needs=("ftfy",),
        ),
    ),
)
