"""What the embedded model exists to show: the Lightning LoRA matters, and getting its use wrong shows."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from pocket import tasks
from pocket.bench import EIGHT, FEW, MANY, MERGED, OWN_SCHEDULER, SCALES, Bench, Setting, nearest, psnr
from pocket.evaluate import contact_sheet

SCENES = 8
Pictures = dict[str, list[Image.Image]]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


@pytest.fixture(scope="module")
def made(bench: Bench) -> Pictures:
    settings = (MANY, FEW, MERGED, *SCALES, OWN_SCHEDULER, EIGHT)
    return {setting.name: bench.pictures(setting, tasks.held_out(SCENES)) for setting in settings}


def to_answer(made: Pictures, setting: Setting) -> list[float]:
    return [nearest(picture, task) for picture, task in zip(made[setting.name], tasks.held_out(SCENES), strict=True)]


def to_many(made: Pictures, setting: Setting) -> float:
    return float(np.mean([psnr(*pair) for pair in zip(made[setting.name], made[MANY.name], strict=True)]))


def test_few_steps_without_the_lora_are_worse_and_with_it_as_good_as_many(made: Pictures) -> None:
    many, few, merged = (np.mean(to_answer(made, setting)) for setting in (MANY, FEW, MERGED))
    assert few < many - 2
    assert merged > many - 1


def test_merged_weights_and_the_unfused_lora_give_the_same_picture(made: Pictures) -> None:
    unfused = next(setting for setting in SCALES if setting.scale == 1.0)
    assert min(psnr(*pair) for pair in zip(made[MERGED.name], made[unfused.name], strict=True)) > 50


def test_the_right_scale_is_one(made: Pictures) -> None:
    by_scale = {setting.scale: to_many(made, setting) for setting in SCALES}
    assert max(by_scale, key=lambda scale: by_scale[scale]) == 1.0


@pytest.mark.parametrize("wrong", [FEW, OWN_SCHEDULER, EIGHT], ids=lambda setting: setting.name)
def test_a_wrong_use_is_farther_from_the_many_step_picture(made: Pictures, wrong: Setting) -> None:
    assert to_many(made, wrong) < to_many(made, MERGED) - 1


def test_the_rabbit_turns_purple(bench: Bench) -> None:
    picture = np.asarray(bench.pictures(MERGED, [tasks.rabbit()])[0]).astype(int)
    red, green, blue = picture[56, 64]  # the forehead
    assert blue > green + 40
    assert red > green + 20


def test_the_contact_sheet_shows_every_kind_of_instruction(bench: Bench) -> None:
    sheet = contact_sheet(bench)
    assert sheet.width > 1000
    assert np.asarray(sheet).std() > 30
