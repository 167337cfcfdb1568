"""Qwen-Image, text to image and edits, of 20B."""

from lora_fuse.models.family import Family, KeptLayers, KnownBase, within
from lora_fuse.models.pipeline_call import PipelineCall

_LIGHTNING = "lightx2v/Qwen-Image-Lightning"
_ALPHA = 8.0  # at rank 64: the headers of lightx2v's files

FAMILY = Family(
    name="Qwen-Image",
    bases=(
        KnownBase(
            "Qwen/Qwen-Image",
            "QwenImagePipeline",
            (f"{_LIGHTNING}/Qwen-Image-Lightning-*",),
            _ALPHA,
            fp8_loras=(f"{_LIGHTNING}/Qwen-Image-fp8-e4m3fn-Lightning-*",),
        ),
        KnownBase(
            "Qwen/Qwen-Image-Edit",
            "QwenImageEditPipeline",
            (f"{_LIGHTNING}/Qwen-Image-Edit-Lightning-*",),
            _ALPHA,
        ),
        KnownBase(
            "Qwen/Qwen-Image-Edit-2509",
            "QwenImageEditPlusPipeline",
            (f"{_LIGHTNING}/Qwen-Image-Edit-2509/*",),
            _ALPHA,
        ),
        KnownBase(
            "Qwen/Qwen-Image-Edit-2511",
            "QwenImageEditPlusPipeline",
            ("lightx2v/Qwen-Image-Edit-2511-Lightning/*",),
            _ALPHA,
        ),
        KnownBase("Qwen/Qwen-Image-2512", "QwenImagePipeline", ("lightx2v/Qwen-Image-2512-Lightning/*",), _ALPHA),
    ),
    components={"transformer": "QwenImageTransformer2DModel"},
    keep={
        "QwenImageTransformer2DModel": (
            KeptLayers(
                ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out"),
                "entry, time and output layers: vllm-project/vllm-omni#2795, where Qwen-Image in fp8 is right only so",
            ),
            KeptLayers(
                ("transformer_blocks.*.img_mod.*", "transformer_blocks.*.txt_mod.*"),
                "modulation: the same; int8 in ComfyUI 1.75e-2 off instead of 2.11e-2, fp8 4.19e-2 instead of 4.98e-2, "
                "nvfp4 1.46e-1 instead of 1.90e-1, two blocks of real shapes",
            ),
            KeptLayers(
                ("transformer_blocks.*.img_mlp.net.2",),
                "sgl-project/sglang#23155, by an ablation on Qwen-Image and Qwen-Image-Edit; vllm-project/"
                "vllm-omni#1034 leaves out all of img_mlp; fp8 3.91e-2 instead of 4.19e-2, as above",
                coarse=True,
            ),
        ),
    },
    pipelines=(
        PipelineCall("QwenImagePipeline"),
        PipelineCall("QwenImageEditPipeline", pictures=range(1, 2)),
        PipelineCall("QwenImageEditPlusPipeline", pictures=range(1, 4)),
    ),
    originals=(
        *within("transformer_blocks.{}.attn", "to_q to_k to_v to_out.0 norm_q norm_k"),
        *within("transformer_blocks.{}.attn", "add_q_proj add_k_proj add_v_proj to_add_out norm_added_q norm_added_k"),
        *within("transformer_blocks.{}", "img_mod.1 img_mlp.net.0.proj img_mlp.net.2"),
        *within("transformer_blocks.{}", "txt_mod.1 txt_mlp.net.0.proj txt_mlp.net.2"),
        *within("time_text_embed.timestep_embedder", "linear_1 linear_2"),
        *("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out"),
    ),
)
