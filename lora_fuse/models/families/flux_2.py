"""FLUX.2: dev and klein."""

from lora_fuse.models.family import Family, KnownBase, within
from lora_fuse.models.pipeline_call import CFG_ALONE, EMBEDDED, UP_TO_TEN, PipelineCall

# The base's converter swaps scale and shift of the last modulation, the one for LoRAs does not.
_MISREAD = {"norm_out.linear.*": "the scale and shift of the last modulation keep their original order"}

# Repository ids: the examples in diffusers 0.42.1, pipelines/flux2; github.com/black-forest-labs/flux2.
FAMILY = Family(
    name="FLUX.2",
    bases=(
        KnownBase("black-forest-labs/FLUX.2-dev", "Flux2Pipeline"),
        KnownBase("black-forest-labs/FLUX.2-klein-base-9B", "Flux2KleinPipeline"),
        KnownBase("black-forest-labs/FLUX.2-klein-4B", "Flux2KleinPipeline"),
    ),
    components={"transformer": "Flux2Transformer2DModel"},
    converter="convert_flux2_transformer_checkpoint_to_diffusers",
    originals=(
        *within("double_blocks.{}", "img_attn.qkv img_attn.proj img_mlp.0 img_mlp.2"),
        *within("double_blocks.{}", "txt_attn.qkv txt_attn.proj txt_mlp.0 txt_mlp.2"),
        *within("single_blocks.{}", "linear1 linear2"),
        *("img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "guidance_in.in_layer", "guidance_in.out_layer"),
        *("double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin"),
        *("final_layer.linear", "final_layer.adaLN_modulation.1"),
    ),
    original_parameters=(
        *within("double_blocks.{}.img_attn.norm", "query_norm.scale key_norm.scale"),
        *within("double_blocks.{}.txt_attn.norm", "query_norm.scale key_norm.scale"),
        *within("single_blocks.{}.norm", "query_norm.scale key_norm.scale"),
    ),
    pipelines=(
        PipelineCall("Flux2Pipeline", EMBEDDED, pictures=UP_TO_TEN, has_templates=True, misread=_MISREAD),
        PipelineCall("Flux2KleinPipeline", CFG_ALONE, pictures=UP_TO_TEN, has_templates=True, misread=_MISREAD),
    ),
)
