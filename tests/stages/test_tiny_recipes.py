"""Laws of recipes of several components: built, verified, drawn and approved by the commands of a user, at random."""

import sys

import pytest

from tests.support.workspace import METRICS, STAGES, Workspace, ran
from tests.tiny_models import tiny
from tests.tiny_models.loras import write_loras

COMPONENTS = {
    "sdxl": ({"unet", "text_encoder", "text_encoder_2"}, ["kohya"]),
    "wan_22": ({"transformer", "transformer_2"}, ["high_noise", "low_noise"]),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace.checkout(tmp_path_factory.mktemp("tiny") / "checkout")


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_recipe_of_several_components_goes_from_a_clone_to_the_gate(checkout: Workspace, name: str) -> None:
    components, loras = COMPONENTS[name]
    if name == "sdxl":
        checkout.run(sys.executable, "-m", "tests.tiny_models", name, f"build/tiny/{name}")
    else:  # the same, in this process, which has torch already
        root = checkout.root / f"build/tiny/{name}"
        write_loras(name, tiny(name, root / "model"), root / "lora")
    checkout.config(f"recipe=tiny_{name}")
    done = checkout.run("dvc", "repro", code=255)
    assert ran(done.stdout + done.stderr) == STAGES
    assert "exited with 3" in done.stderr, done.stdout + done.stderr  # nobody has approved its picture
    metrics = checkout.read(METRICS)
    assert (metrics["verdict"], metrics["rabbit.agrees"]) == ("no-golden", True)
    assert metrics["rabbit.unfused.psnr_db"] < 100  # two runs, and not one
    manifest = checkout.read("artifacts/merged.manifest.json")
    assert set(manifest["components"]) == components
    assert [lora["name"] for lora in manifest["loras"]] == loras
    verified = checkout.read("artifacts/verify.json")
    assert verified["passed"]
    assert {target.partition("/")[0] for target in verified["changes"]} == components
    pictures = {path.suffix for path in (checkout.root / "artifacts/regression/images").iterdir()}
    assert (".webp" in pictures) == (name == "wan_22")
    if name == "wan_22":  # a clip is compared with itself, as a file
        checkout.stage("approve", "--reason", "what this checkout makes")
        checkout.commit("goldens")
        assert ran(checkout.repro()) == ["regress", "gate"]
