"""Laws of the real models' cases: their pictures are what the code draws, can be opened, and have a licence."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from inputs import drawings, photo
from lora_fuse.pictures.render import PICTURES, Case, open_picture
from lora_fuse.recipe.recipe import Recipe
from stages.config import compose

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))
REAL = [recipe for recipe in RECIPES if not recipe.startswith("pocket")]
NOTES = {"inputs/pictures": "inputs/README.md", "pocket/inputs": "pocket/inputs/LICENSE.md"}


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parameters(recipe: str) -> Recipe:
    return Recipe.parse(compose([f"recipe={recipe}"]), recipe)


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    drawings.draw_inputs(folder)
    photo.cut_photo(folder)
    return folder


def test_python_m_inputs_writes_every_picture_that_is_kept(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {path.name for path in drawings.PICTURES.iterdir()}


@pytest.mark.parametrize("name", [*drawings.DRAWINGS, photo.NAME])
def test_a_kept_picture_is_what_the_code_writes(name: str, written: Path) -> None:
    np.testing.assert_array_equal(pixels(written / name), pixels(drawings.PICTURES / name))
    assert (drawings.PICTURES / name).stat().st_size < (400_000 if name == photo.NAME else 150_000)


def test_the_photograph_is_of_the_file_that_the_note_names() -> None:
    source = files("skimage") / "data" / photo.NAME
    assert hashlib.sha256(source.read_bytes()).hexdigest() in Path("inputs/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_case_can_open_its_pictures_and_each_has_a_licence(recipe: str) -> None:
    params = parameters(recipe)
    for name, case in params.regress.cases.items():
        assert len(case.images) in PICTURES[params.base.pipeline]
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
def test_a_real_model_is_compared_on_six_cases_or_more(recipe: str) -> None:
    params = parameters(recipe)
    cases = params.regress.cases.values()
    assert len(cases) >= 6
    assert len({case.prompt for case in cases}) == len(cases)
    assert any("\u4e00" <= letter <= "\u9fff" for case in cases for letter in case.prompt)
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
    edits = [parameters(recipe) for recipe in REAL if parameters(recipe).base.pipeline != "QwenImagePipeline"]
    assert edits
    for params in edits:
        rabbit = params.regress.cases["rabbit"]
        assert (rabbit.prompt, rabbit.seed) == ("Change the rabbit's color to purple", 0)


def test_every_kept_picture_is_used_and_its_row_says_by_which_cases() -> None:
    used: dict[str, set[str]] = {path.name: set() for path in drawings.PICTURES.iterdir()}
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
