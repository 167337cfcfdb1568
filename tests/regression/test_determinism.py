"""The law that goldens rest on: the same machine, twice, gives the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_fuse.checkpoint.diffusers_layout import diffusers_files
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.inputs import LoraInput
from tests.support.composed import tree_of

ROOT = Path(__file__).resolve().parents[2]
LORA = ROOT / "pocket/lora/pocket-lightning-4steps-v2.safetensors"

RENDER = """
import hashlib, json, sys
from pathlib import Path
from lora_fuse.pictures.environment import environment, make_deterministic
make_deterministic(2)
from lora_fuse.pictures.weights_in_place import jitter
from lora_fuse.pictures.pairs import render_all
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.render import load_pipeline
import torch
pipe = load_pipeline(Path(sys.argv[1]), "QwenImagePipeline", dtype="float32")
cases = [Case("cat", "a purple cat with a red hat", seed, (), 128, 96) for seed in (0, 1)]
made = render_all(pipe, cases, Sampling(4, 1.0, " "), "cpu")
jitter(pipe.transformer, dict(pipe.transformer.named_parameters()), [torch.float16])
made += render_all(pipe, cases[:1], Sampling(4, 1.0, " "), "cpu")
files = [content for one in made for content in (one.latents.tobytes(), one.png)]
print(json.dumps([str(environment("cpu", "float32").key), *(hashlib.sha256(file).hexdigest() for file in files)]))
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "merged"
    scheduler = tree_of()["scheduler"]
    generated = diffusers_files(ROOT / "pocket/model", pipeline="QwenImagePipeline", scheduler=scheduler)
    plan = make_plan(open_checkpoint(ROOT / "pocket/model"), [LoraInput("l", LORA, 1.0)])
    write_merged(plan, out, device="cpu", generated=generated, known={}, progress=lambda _: None)
    return out


def rendered(merged: Path) -> list[str]:
    """Key and hashes of what a process of its own makes: latents and picture of two seeds, and of a jittered one."""
    command = [sys.executable, "-c", RENDER, str(merged)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_two_processes_make_the_same_latents_pictures_and_floor_bit_for_bit(merged: Path) -> None:
    first = rendered(merged)
    assert rendered(merged) == first
    key, *hashes = first
    assert "-2threads-float32-" in key
    assert (
        len({*hashes[:4], hashes[4]}) == 5
    )  # another seed, or moved weights, are something else: the law says something
