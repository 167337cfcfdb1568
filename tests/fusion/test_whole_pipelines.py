"""Whole in, whole out: whatever a base holds, diffusers loads OUT as it loads BASE, but for the sum; or it is refused.

The pipelines are real and tiny, written by diffusers and transformers themselves, and loaded by them.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import lora_fuse
from lora_fuse.errors import BadCheckpoint
from lora_fuse.lora.inputs import LoraInput

WORDS = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
TARGET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FP16: dict[str, Any] = {"variant": "fp16"}
CODE: dict[str, Any] = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion as diffusers saves it, and a LoRA for one linear of its UNet beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole")
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps(WORDS))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    blocks: dict[str, Any] = {"block_out_channels": (8,), "norm_num_groups": 2, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=4,
        sample_size=8,
        **blocks,
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(latent_channels=4, **blocks),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), projection_dim=16, **size)),
        tokenizer=CLIPTokenizer(str(vocabulary), str(folder / "merges.txt")),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "base")
    factors = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(8, 2)}
    save_file({f"unet.{TARGET}.{name}.weight": part for name, part in factors.items()}, folder / "lora.safetensors")
    return folder


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code of a repository is copied here, and not to the user's cache."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in ("diffusers_modules", "diffusers_modules.local"):
        sys.modules.pop(name, None)


def as_variant(base: Path, *parts: str, keep: bool) -> None:
    """Save components as fp16 variants, beside the plain weights or in their place."""
    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for part in parts:
        model = classes[part].from_pretrained(base / part)
        if not keep:
            next((base / part).glob("*.safetensors")).unlink()
        model.half().save_pretrained(base / part, variant="fp16")


def in_shards(base: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(base / "unet")
    next((base / "unet").glob("*.safetensors")).unlink()
    model.save_pretrained(base / "unet", max_shard_size="20KB")


def linked(base: Path) -> None:
    for part in ("unet", "vae"):
        elsewhere = base.parent / f"elsewhere-{part}"
        (base / part).rename(elsewhere)
        (base / part).symlink_to(elsewhere)
    (base / "tokenizer" / "loop").symlink_to(base)


def strays(base: Path) -> None:
    for name in (
        "LICENSE",
        "README.md",
        "model.ckpt",
        "vae/flax_model.msgpack",
        "pipeline.py",
        "ema/model.safetensors",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("stray")
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    shutil.copy(next((base / "unet").glob("*.safetensors")), base / "whole-model.safetensors")


def of_own_code(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["own_scheduler", "OwnScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    imports = "from diffusers import DDIMScheduler\nfrom .helper import Helper\n"
    code = f"{imports}\n\nclass OwnScheduler(DDIMScheduler, Helper):\n    pass\n"
    (base / "scheduler" / "own_scheduler.py").write_text(code)
    (base / "scheduler" / "helper.py").write_text("class Helper:\n    pass\n")


def own_pipeline(base: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "OwnPipeline"]
    (base / "model_index.json").write_text(json.dumps(index))
    code = "from diffusers import StableDiffusionPipeline\n\n\nclass OwnPipeline(StableDiffusionPipeline):\n    pass\n"
    (base / "pipeline.py").write_text(code)


# A change of the base, and the ways in which it and what is merged into it are loaded.
KINDS: dict[str, tuple[Callable[[Path], object], list[dict[str, Any]]]] = {
    "plain": (lambda _: None, [{}]),
    "variants beside": (lambda base: as_variant(base, "unet", "text_encoder", keep=True), [{}]),
    "variants alone": (lambda base: as_variant(base, "unet", "vae", "text_encoder", keep=False), [FP16]),
    "the fused component as a variant alone": (lambda base: as_variant(base, "unet", keep=False), [FP16]),
    "another component as a variant alone": (lambda base: as_variant(base, "text_encoder", keep=False), [FP16]),
    "shards": (in_shards, [{}]),
    "linked folders": (linked, [{}]),
    "strays": (strays, [{}]),
    "a component's own code": (of_own_code, [CODE]),
    "a pipeline's own code": (own_pipeline, [CODE]),
}


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_out_loads_as_the_base_does_but_for_the_sum(tmp_path: Path, whole: Path, kind: str) -> None:
    change, ways = KINDS[kind]
    base = shutil.copytree(whole / "base", tmp_path / "base")
    out = tmp_path / "out"
    change(base)
    given = [LoraInput("lora", whole / "lora.safetensors", 1.0)]
    with warnings.catch_warnings(record=True, action="always") as said:
        lora_fuse.fuse(lora_fuse.plan(base, given, component="unet"), out)
    assert bool(said) == (ways != [{}]), "what has to be asked for is said, and nothing else"
    for way in ways:
        before, after = (DiffusionPipeline.from_pretrained(folder, **way) for folder in (base, out))
        assert type(before).__name__ == type(after).__name__
        assert before.config.keys() == after.config.keys()
        ours, theirs = weights(after), weights(before)
        assert ours.keys() == theirs.keys()
        changed = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert changed == [f"unet.{TARGET}.weight"]
        assert after.tokenizer("a b").input_ids == before.tokenizer("a b").input_ids == [0, 2, 3, 1]
    found = lora_fuse.verify(out, base, given, component="unet")
    assert found.passed, found.problems


def test_a_component_of_pickles_is_refused_and_the_way_out_works(tmp_path: Path, whole: Path) -> None:
    base = shutil.copytree(whole / "base", tmp_path / "base")
    folder = base / "text_encoder"
    model = CLIPTextModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    given = [LoraInput("lora", whole / "lora.safetensors", 1.0)]
    with pytest.raises(
        BadCheckpoint, match=r"pickles \(text_encoder/pytorch_model\.bin\).* transformers\.CLIPTextModel"
    ):
        lora_fuse.plan(base, given, component="unet")
    CLIPTextModel.from_pretrained(folder).save_pretrained(folder)
    lora_fuse.fuse(lora_fuse.plan(base, given, component="unet"), tmp_path / "out")
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").text_encoder is not None
