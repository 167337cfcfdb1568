"""Qwen-Image 2.1: one stream, and other names and widths than Qwen-Image of 20B."""

from lora_fuse.models.family import Family, KnownBase, within
from lora_fuse.models.pipeline_call import UP_TO_TEN, PipelineCall

FAMILY = Family(
    name="Qwen-Image-2.1",
    bases=(KnownBase("Qwen/Qwen-Image-2.1", "QwenImage21Pipeline"),),
    components={"transformer": "QwenImage21Transformer2DModel"},
    converter="convert_qwen_image21_transformer_checkpoint_to_diffusers",
    originals=(
        *within("transformer_blocks.{}.attn", "to_q to_k to_v to_out.0 norm_q norm_k"),
        *within("transformer_blocks.{}.img_mlp", "gate_up out"),
        *within("time_text_embed.timestep_embedder", "linear_1 linear_2"),
        *("txt_in.text_norm", "txt_in.in_layer", "txt_in.out_layer", "img_in", "modulation.1"),
        *("norm_out.linear", "proj_out"),
    ),
    pipelines=(PipelineCall("QwenImage21Pipeline", pictures=UP_TO_TEN, has_templates=True),),
)
