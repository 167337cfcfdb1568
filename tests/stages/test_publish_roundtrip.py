"""What is published is what was judged: pushed by DVC, loaded by its tag elsewhere, it draws the same picture."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.hub_server import LoopbackHub
from tests.support.workspace import Workspace, hub_environment

DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from lora_fuse.pictures.environment import make_deterministic
from lora_fuse.pictures.render import allow_missing_torchvision, condition_area
make_deterministic(2, on_gpu=False)
allow_missing_torchvision()
pipe = DiffusionPipeline.from_pretrained("alice/pocket-merged", revision="v1", dtype=torch.float32)
with condition_area(16384):
    picture = pipe(image=load_image("pocket/inputs/rabbit.png"), prompt="Change the rabbit's color to purple",
        negative_prompt=" ", num_inference_steps=4, true_cfg_scale=1.0, height=128, width=128,
        generator=torch.Generator("cpu").manual_seed(0)).images[0]
picture.save(sys.argv[1])
"""


def test_what_is_pushed_draws_the_picture_that_was_judged(
    workspace: Workspace, hub: LoopbackHub, tmp_path: Path
) -> None:
    env = hub_environment()
    workspace.config("publish.enabled=true", "publish.repo_id=alice/pocket-merged", "publish.tag=v1")
    workspace.repro("publish/dvc.yaml", env=env)
    receipt = workspace.read("artifacts/publish.json")
    assert (receipt["status"], receipt["tag"], receipt["pull_request"]) == ("published", "v1", 1)
    assert hub.registry.repos["alice/pocket-merged"].tags == {"v1": receipt["commit"]}
    drawn = tmp_path / "drawn.png"
    workspace.run(sys.executable, "-c", DRAW, str(drawn), env={**env, "HF_HOME": str(tmp_path / "empty")})
    judged = workspace.root / "artifacts/regression/images/rabbit.merged.png"
    np.testing.assert_array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(judged)))
    before = hub.uploaded()
    workspace.repro("-f", "-s", "publish/dvc.yaml:publish", env=env)
    assert workspace.read("artifacts/publish.json") == receipt
    assert hub.uploaded() == before
