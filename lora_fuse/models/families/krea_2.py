"""Krea 2: Raw, which is trained on, and Turbo, which runs."""

from lora_fuse.models.family import Family, KnownBase, within
from lora_fuse.models.pipeline_call import CFG_FROM_ZERO, PipelineCall

_BLOCK = "attn.wq attn.wk attn.wv attn.wo attn.gate mlp.gate mlp.up mlp.down"
_NORMS = "attn.qknorm.qnorm.scale attn.qknorm.knorm.scale prenorm.scale postnorm.scale"

FAMILY = Family(
    name="Krea 2",
    bases=(
        KnownBase("krea/Krea-2-Raw", "Krea2Pipeline"),
        # github.com/krea-ai/krea-2: "You train LoRAs on RAW and apply them on Turbo".
        KnownBase("krea/Krea-2-Turbo", "Krea2Pipeline", loras_of=("krea/Krea-2-Raw",)),
    ),
    components={"transformer": "Krea2Transformer2DModel"},
    converter="convert_krea2_transformer_checkpoint_to_diffusers",
    originals=(
        *within("blocks.{}", _BLOCK),
        *within("txtfusion.layerwise_blocks.{}", _BLOCK),
        *within("txtfusion.refiner_blocks.{}", _BLOCK),
        *("txtfusion.projector", "first", "tmlp.0", "tmlp.2", "tproj.1", "txtmlp.1", "txtmlp.3", "last.linear"),
    ),
    original_parameters=(
        *within("blocks.{}", f"{_NORMS} mod.lin"),
        *within("txtfusion.layerwise_blocks.{}", _NORMS),
        *within("txtfusion.refiner_blocks.{}", _NORMS),
        *("txtmlp.0.scale", "last.norm.scale", "last.modulation.lin"),
    ),
    pipelines=(PipelineCall("Krea2Pipeline", CFG_FROM_ZERO),),
)
