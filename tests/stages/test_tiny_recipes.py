"""Laws of recipes of several components: built, verified, drawn and approved by the commands of a user, at random."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir

import pytest
import torch

from stages.config import load
from stages.download import download
from stages.fuse import fuse
from stages.gate import gate
from stages.goldens import goldens
from stages.regress import regress
from stages.verify import verify
from tests.support.workspace import METRICS, STAGES, Workspace, ran
from tests.tiny_models import tiny
from tests.tiny_models.loras import write_loras


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace.checkout(tmp_path_factory.mktemp("tiny") / "checkout")


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads as it was, which a stage sets for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(checkout: Workspace, components: set[str], loras: Sequence[str]) -> None:
    """All results are of these components and LoRAs, and only an approval is missing."""
    metrics = checkout.read(METRICS)
    assert (metrics["verdict"], metrics["rabbit.agrees"]) == ("no-golden", True)
    assert metrics["rabbit.unfused.psnr_db"] < 100  # two runs, and not one
    manifest = checkout.read("artifacts/merged.manifest.json")
    assert set(manifest["components"]) == components
    assert [lora["name"] for lora in manifest["loras"]] == loras
    verified = checkout.read("artifacts/verify.json")
    assert verified["passed"]
    assert {target.partition("/")[0] for target in verified["changes"]} == components


def pictures(checkout: Workspace) -> set[str]:
    return {path.suffix for path in (checkout.root / "artifacts/regression/images").iterdir()}


@pytest.mark.usefixtures("threads")
def test_a_recipe_of_two_denoisers_goes_from_a_clone_to_the_gate_and_its_clip_is_approved(checkout: Workspace) -> None:
    root = checkout.root / "build/tiny/wan_22"  # as `python -m tests.tiny_models` does
    write_loras("wan_22", tiny("wan_22", root / "model"), root / "lora")
    checkout.config("recipe=tiny_wan_22")
    done = checkout.run("dvc", "repro", code=255)
    assert ran(done.stdout + done.stderr) == STAGES
    assert "exited with 3" in done.stderr, done.stdout + done.stderr  # nobody has approved its picture
    check(checkout, {"transformer", "transformer_2"}, ["high_noise", "low_noise"])
    assert ".webp" in pictures(checkout)
    checkout.stage("approve", "--reason", "what this checkout makes")  # a clip is compared with itself, as a file
    checkout.commit("goldens")
    with chdir(checkout.root):
        assert [stage(load()) for stage in (goldens, regress, gate)] == [0, 0, 0]


@pytest.mark.usefixtures("threads")
def test_a_recipe_of_a_denoiser_and_text_encoders_goes_through_all_stages(checkout: Workspace) -> None:
    checkout.run(sys.executable, "-m", "tests.tiny_models", "sdxl", "build/tiny/sdxl")
    checkout.config("recipe=tiny_sdxl")
    with chdir(checkout.root):
        recipe = load()
        assert [stage(recipe) for stage in (download, fuse, verify, goldens, regress, gate)] == [0, 0, 0, 0, 0, 3]
    check(checkout, {"unet", "text_encoder", "text_encoder_2"}, ["kohya"])
    assert ".webp" not in pictures(checkout)
