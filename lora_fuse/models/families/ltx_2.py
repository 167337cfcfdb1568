"""LTX-2: video and audio in one transformer; LoRAs alone, no pictures: its pipelines want more than a prompt."""

from lora_fuse.models.family import Family, KnownBase, within

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_EMBEDDERS = (
    *("adaln_single", "audio_adaln_single"),
    *("av_ca_video_scale_shift_adaln_single", "av_ca_a2v_gate_adaln_single"),
    *("av_ca_audio_scale_shift_adaln_single", "av_ca_v2a_gate_adaln_single"),
)

# The repository id is that of the examples in diffusers 0.42.1, pipelines/ltx2. LTX2LoraLoaderMixin has the connectors
# too.
FAMILY = Family(
    name="LTX-2",
    bases=(KnownBase("Lightricks/LTX-2", "LTX2Pipeline"),),
    components={"transformer": "LTX2VideoTransformer3DModel", "connectors": "LTX2TextConnectors"},
    converter="convert_ltx2_transformer_to_diffusers",
    originals=(
        *(
            name
            for attention in _ATTENTIONS
            for name in within(f"transformer_blocks.{{}}.{attention}", "to_q to_k to_v to_out.0 q_norm k_norm")
        ),
        *within("transformer_blocks.{}", "ff.net.0.proj ff.net.2 audio_ff.net.0.proj audio_ff.net.2"),
        *(
            name
            for embedder in _EMBEDDERS
            for name in within(embedder, "emb.timestep_embedder.linear_1 emb.timestep_embedder.linear_2 linear")
        ),
        *within("caption_projection", "linear_1 linear_2"),
        *within("audio_caption_projection", "linear_1 linear_2"),
        *("patchify_proj", "proj_out", "audio_patchify_proj", "audio_proj_out"),
    ),
    original_parameters=(
        *within("transformer_blocks.{}", "scale_shift_table audio_scale_shift_table"),
        *within("transformer_blocks.{}", "scale_shift_table_a2v_ca_video scale_shift_table_a2v_ca_audio"),
        *("scale_shift_table", "audio_scale_shift_table"),
    ),
)
