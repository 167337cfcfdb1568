"""Laws of the real models' cases: their pictures are unchanged, can be opened, and have a licence."""

import hashlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lora_fuse.models import pipelines
from lora_fuse.pictures.calls.call_arguments import open_picture
from lora_fuse.pictures.cases import Case
from lora_fuse.recipe.recipe import Recipe
from tests.support.composed import recipe_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))
REAL = [recipe for recipe in RECIPES if not recipe.startswith(("pocket", "tiny_"))]
KEPT = ROOT / "inputs/pictures"
PHOTOGRAPH = "astronaut.png"
SHA256 = {
    "astronaut.png": "0e072b9d8702ccfd592bb09bd2b89ccaa3911e61edf8ed7ce7854d0a3e5137d9",
    "engraving.png": "8d1ab9de9ce39edd86f2cf4fa6973556a1384b7249657c62ad46526dfef3e2ea",
    "poster.png": "552d21fb535f267f8e7b43455177a35f009388774d76ca28293923a0a6209a51",
    "shop.png": "dd2b9f2227b2b9c95145ca65cdae6a2afe62a92c4d8b3d452ba6d9ccc00e1a58",
    "table.png": "89620956206d2af9519a002de077526b3291d5aadd4606b0d2a4cf4109f8b62d",
}
NOTES = {"inputs/pictures": "inputs/README.md", "pocket/inputs": "pocket/inputs/LICENSE.md"}


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parameters(recipe: str) -> Recipe:
    return recipe_of(f"recipe={recipe}")


@pytest.mark.parametrize("path", sorted(KEPT.iterdir()), ids=lambda path: path.name)
def test_a_picture_is_small_and_changes_only_together_with_this_list(path: Path) -> None:
    """An approved picture is an edit of these very bytes."""
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[path.name]
    assert path.stat().st_size < (400_000 if path.name == PHOTOGRAPH else 150_000)


def test_the_photograph_is_the_upper_left_of_the_file_that_the_note_names() -> None:
    source = files("skimage") / "data" / PHOTOGRAPH
    assert hashlib.sha256(source.read_bytes()).hexdigest() in Path("inputs/README.md").read_text(encoding="utf-8")
    with source.open("rb") as file, Image.open(file) as whole, Image.open(KEPT / PHOTOGRAPH) as kept:
        cut = whole.convert("RGB").crop((0, 0, *kept.size))
        np.testing.assert_array_equal(np.asarray(cut), np.asarray(kept.convert("RGB")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_case_can_open_its_pictures_and_each_has_a_licence(recipe: str) -> None:
    params = parameters(recipe)
    for name, case in params.regress.cases.items():
        assert len(case.images) in pipelines()[params.base.pipeline].pictures
        for image in map(Path, case.images):
            assert min(open_picture(image, Case(name, case.prompt, case.seed)).size) >= 256
            assert f"`{image.name}`" in Path(NOTES[image.parent.as_posix()]).read_text(encoding="utf-8")


def test_a_changed_picture_makes_dvc_compare_anew() -> None:
    stages = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    images = [
        image for recipe in RECIPES for case in parameters(recipe).regress.cases.values() for image in case.images
    ]
    assert {Path(image).parent.as_posix() for image in images} <= set(stages["regress"]["deps"])


@pytest.mark.parametrize("recipe", REAL)
def test_a_real_model_is_compared_on_six_cases_or_more_and_one_of_clips_on_two(recipe: str) -> None:
    params = parameters(recipe)
    cases = params.regress.cases.values()
    assert len(cases) >= (2 if any(case.frames for case in cases) else 6)
    assert len({case.prompt for case in cases}) == len(cases)
    reads_chinese = recipe.startswith("qwen_image")
    assert any("\u4e00" <= letter <= "\u9fff" for case in cases for letter in case.prompt) == reads_chinese
    two_or_more = [case for case in cases if len(case.images) >= 2]
    assert len(two_or_more) >= (2 if params.base.pipeline == "QwenImageEditPlusPipeline" else 0)


def test_the_sizes_from_text_alone_are_the_authors() -> None:
    sides = {(1328, 1328), (1664, 928), (1472, 1104), (1584, 1056)}
    text = [parameters(recipe) for recipe in REAL if parameters(recipe).base.pipeline == "QwenImagePipeline"]
    assert text
    for case in (case for params in text for case in params.regress.cases.values()):
        assert case.width is not None
        assert case.height is not None
        assert (max(case.width, case.height), min(case.width, case.height)) in sides


def test_the_rabbit_is_the_same_case_everywhere() -> None:
    edits = [parameters(recipe) for recipe in REAL if parameters(recipe).base.pipeline.startswith("QwenImageEdit")]
    assert edits
    for params in edits:
        rabbit = params.regress.cases["rabbit"]
        assert (rabbit.prompt, rabbit.seed) == ("Change the rabbit's color to purple", 0)


def test_every_kept_picture_is_used_and_its_row_says_by_which_cases() -> None:
    used: dict[str, set[str]] = {path.name: set() for path in KEPT.iterdir()}
    for recipe in REAL:
        for name, case in parameters(recipe).regress.cases.items():
            for image in map(Path, case.images):
                if image.parent == Path("inputs/pictures"):
                    used[image.name].add(name)
    rows = [
        line.split("|")
        for line in Path("inputs/README.md").read_text(encoding="utf-8").splitlines()
        if "png` |" in line
    ]
    said = {row[1].strip(" `"): set(row[3].replace("`", "").replace(",", " ").split()) for row in rows}
    assert said == used
