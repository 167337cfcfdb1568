"""The tiny pipelines are whole, small and give pictures; files of true shapes take no room."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import MissingExtra
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora import LoraInput
from lora_fuse.pictures.render import pipeline_class
from tests.tiny_models import FAMILIES, call, headers, tiny, tiny_transformer, write_hole

# Of each family one weight of a published checkpoint: shapes that its cards, trainers and LoRAs give.
TRUE_SHAPES = {
    "qwen_image": ("transformer/transformer_blocks.0.attn.to_q.weight", (3072, 3072)),
    "qwen_image_21": ("transformer/transformer_blocks.0.img_mlp.proj.weight", (12288, 4096)),
    "wan_21": ("transformer/blocks.0.ffn.net.0.proj.weight", (13824, 5120)),
    "wan_21_i2v": ("transformer/blocks.0.attn2.add_k_proj.weight", (5120, 5120)),
    "wan_22": ("transformer_2/blocks.0.attn1.to_q.weight", (5120, 5120)),
    "wan_22_i2v": ("transformer_2/patch_embedding.weight", (5120, 36, 1, 2, 2)),
    "flux_1": ("transformer/single_transformer_blocks.0.proj_out.weight", (3072, 15360)),
    "flux_2": ("transformer/single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", (55296, 6144)),
    "flux_2_klein": ("transformer/context_embedder.weight", (3072, 7680)),
    "z_image": ("transformer/layers.0.feed_forward.w1.weight", (10240, 3840)),
    "krea_2": ("transformer/transformer_blocks.0.ff.up.weight", (16384, 6144)),
    "sdxl": ("unet/down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", (640, 2048)),
}

# Modules of LoRAs as trainers write them for the published checkpoints, with their shapes, and the targets in the base.
PUBLISHED = {
    "qwen_image": ({"transformer_blocks.0.attn.to_q": (3072, 3072)}, 1),
    "qwen_image_21": ({"transformer_blocks.0.img_mlp.gate_up": (24576, 4096)}, 2),
    "wan_21": ({"blocks.0.self_attn.q": (5120, 5120), "blocks.0.ffn.0": (13824, 5120)}, 2),
    "wan_21_i2v": ({"blocks.0.cross_attn.k_img": (5120, 5120)}, 1),
    "wan_22": ({"blocks.0.ffn.2": (5120, 13824)}, 1),
    "wan_22_i2v": ({"blocks.0.cross_attn.o": (5120, 5120)}, 1),
    "flux_1": ({"double_blocks.0.img_attn.qkv": (9216, 3072), "single_blocks.0.linear1": (21504, 3072)}, 7),
    "flux_2": ({"double_blocks.0.img_attn.qkv": (18432, 6144), "single_blocks.0.linear1": (55296, 6144)}, 4),
    "flux_2_klein": ({"double_blocks.0.txt_attn.qkv": (9216, 3072)}, 3),
    "z_image": ({"layers.0.attention.qkv": (11520, 3840), "layers.0.feed_forward.w1": (10240, 3840)}, 4),
    "krea_2": ({"blocks.0.attn.wq": (6144, 6144), "blocks.0.mlp.up": (16384, 6144)}, 2),
    "sdxl": ({"input_blocks.4.1.transformer_blocks.0.attn2.to_k": (640, 2048)}, 1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_pipeline_is_loaded_by_its_own_index_and_gives_pictures(name: str, tmp_path: Path) -> None:
    tiny(name, tmp_path)
    kind = json.loads((tmp_path / "model_index.json").read_text())["_class_name"]
    if name.endswith("i2v") and importlib.util.find_spec("ftfy") is None:
        with pytest.raises(MissingExtra, match=r"WanImageToVideoPipeline needs ftfy.*lora-fuse\[video\]"):
            pipeline_class(kind)
        return
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 100_000 < size < 2_000_000
    pipeline = pipeline_class(kind).from_pretrained(tmp_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(**call(name), generator=torch.Generator().manual_seed(0), output_type="np")
    pictures = np.asarray(made.frames if name.startswith("wan") else made.images)
    assert pictures.shape[-3:-1] == (64, 64)
    assert np.isfinite(pictures).all()
    assert pictures.std() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_true_shapes_is_a_header_and_a_hole(name: str, tmp_path: Path) -> None:
    place, shape = TRUE_SHAPES[name]
    component, _, parameter = place.partition("/")
    checkpoint = open_checkpoint(headers(name, tmp_path), component=component)
    assert checkpoint.tensors()[parameter].shape == shape
    files = list(tmp_path.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > 100e6
    assert sum(path.stat().st_blocks for path in files) * 512 < 1e6
    kinds = {re.sub(r"\d+", "{}", key) for key in tiny_transformer(name).state_dict()}
    assert kinds == {re.sub(r"\d+", "{}", key) for key in checkpoint.tensors()}
    modules, targets = PUBLISHED[name]
    shapes = {f"diffusion_model.{module}.lora_A.weight": (16, columns) for module, (_, columns) in modules.items()}
    shapes |= {f"diffusion_model.{module}.lora_B.weight": (rows, 16) for module, (rows, _) in modules.items()}
    lora = LoraInput("lora", write_hole(tmp_path / "lora.safetensors", shapes), 1.0)
    assert len(make_plan(checkpoint, [lora]).targets) == targets
