"""Pocket's merge and its pictures on a GPU, in bfloat16."""

from pathlib import Path

from lora_fuse.checkpoint.diffusers_layout import diffusers_files
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import Plan, make_plan
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.pairs import Setup

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "pocket/model"
LORA = ROOT / "pocket/lora/pocket-lightning-4steps-v2.safetensors"
SCHEDULER = {
    "base_shift": 1.0986122886681098,
    "max_shift": 1.0986122886681098,
    "shift_terminal": None,
    "use_dynamic_shifting": True,
}

CASES = [Case("rabbit", "Change the rabbit's color to purple", 0, (ROOT / "pocket/inputs/rabbit.png",), 128, 128)]
SETUP = Setup("QwenImageEditPipeline", Sampling(4, 1.0, " ", 128 * 128), SCHEDULER, "cuda", "bfloat16")


def plan(scale: float = 1.0) -> Plan:
    return make_plan(open_checkpoint(BASE), [LoraInput("l", LORA, scale)])


def merge(out: Path, scale: float = 1.0) -> Path:
    generated = diffusers_files(BASE, pipeline=SETUP.pipeline, scheduler=SCHEDULER)
    write_merged(plan(scale), out, device="cuda", generated=generated, known={}, progress=lambda _: None)
    return out
