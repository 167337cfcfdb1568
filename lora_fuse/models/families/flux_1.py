"""FLUX.1: dev, schnell, Kontext."""

from lora_fuse.models.family import Family, KnownBase, within
from lora_fuse.models.pipeline_call import EMBEDDED, PipelineCall

_STREAM = "STREAM_attn.qkv STREAM_attn.proj STREAM_mlp.0 STREAM_mlp.2"

# FluxLoraLoaderMixin of diffusers 0.42.1: the transformer and CLIP, not T5.
FAMILY = Family(
    name="FLUX.1",
    bases=(
        KnownBase("black-forest-labs/FLUX.1-dev", "FluxPipeline", ("ByteDance/Hyper-SD/Hyper-FLUX.1-dev-*",)),
        KnownBase("black-forest-labs/FLUX.1-schnell", "FluxPipeline"),
        KnownBase("black-forest-labs/FLUX.1-Kontext-dev", "FluxKontextPipeline"),
    ),
    components={"transformer": "FluxTransformer2DModel", "text_encoder": "CLIPTextModel"},
    converter="convert_flux_transformer_checkpoint_to_diffusers",
    originals=(
        *within("double_blocks.{}", _STREAM.replace("STREAM", "img")),
        *within("double_blocks.{}", _STREAM.replace("STREAM", "txt")),
        *within("double_blocks.{}", "img_mod.lin txt_mod.lin"),
        *within("single_blocks.{}", "linear1 linear2 modulation.lin"),
        *("img_in", "txt_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer"),
        *("guidance_in.in_layer", "guidance_in.out_layer", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    ),
    original_parameters=(
        *within("double_blocks.{}.img_attn.norm", "query_norm.scale key_norm.scale"),
        *within("double_blocks.{}.txt_attn.norm", "query_norm.scale key_norm.scale"),
        *within("single_blocks.{}.norm", "query_norm.scale key_norm.scale"),
    ),
    pipelines=(
        PipelineCall("FluxPipeline", EMBEDDED),
        PipelineCall("FluxKontextPipeline", EMBEDDED, pictures=range(1, 2)),
    ),
)
