"""Laws of the noise floor: what is within it is no fault, what is beyond it is."""

import json
import math

import numpy as np
import pytest

from lora_fuse.pictures.picture import Levels, Picture
from lora_fuse.regression.case_judgement import examine
from lora_fuse.regression.review import flat_metrics
from lora_fuse.regression.verdicts import CaseResult, Golden, Rules, Verdict
from tests.support.judgements import CASE, GOLDEN, UNFUSED, latents, noisy, scene, with_floor


def test_latents_of_three_times_the_floor_are_a_regression_though_the_picture_is_the_golden() -> None:
    result = with_floor(latents(0.03), latents(0.01))
    assert result.over_floor == pytest.approx(3, rel=1e-3)
    assert (result.verdict, result.agrees) == (Verdict.REGRESSION, False)
    assert "3 times the noise floor" in result.reasons[0]
    assert "above 2 times" in result.reasons[0]


@pytest.mark.parametrize(("noise", "over_floor"), [(0.01, 2.0), (0.0, 2.0), (0.03, 4.0), (0.03, None)])
def test_latents_within_the_times_of_the_floor_pass(noise: float, over_floor: float | None) -> None:
    result = with_floor(latents(noise), latents(0.01), over_floor)
    assert (result.verdict, result.agrees) == (Verdict.EXACT, True)


def test_a_floor_below_what_float32_can_tell_is_no_floor_to_be_judged_by() -> None:
    result = with_floor(latents(1e-6), latents())
    assert result.over_floor is not None
    assert result.over_floor < 1
    assert result.verdict is Verdict.EXACT
    assert with_floor(latents(1e-3), latents()).verdict is Verdict.REGRESSION


@pytest.mark.parametrize("broken", ["merged", "floor"])
def test_latents_that_are_no_numbers_hold_nothing(broken: str) -> None:
    nan = latents()
    nan[1, 2] = math.nan
    result = with_floor(nan if broken == "merged" else latents(), nan if broken == "floor" else latents(0.01))
    assert (result.verdict, result.agrees) == (Verdict.REGRESSION, False)
    json.dumps(flat_metrics([result]), allow_nan=False)


@pytest.mark.parametrize("missing", ["floor", "merged"])
def test_a_floor_that_was_not_measured_is_a_regression_where_the_recipe_asks_for_it(missing: str) -> None:
    merged, floor = (None if missing == name else latents() for name in ("merged", "floor"))
    result = with_floor(merged, floor)
    assert result.verdict is Verdict.REGRESSION
    assert ("regress.over_floor" in result.reasons[0]) == (missing == "floor")
    assert with_floor(merged, floor, over_floor=None).verdict is Verdict.EXACT


NOISY = Picture(noisy(scene(), 20))  # about 27 dB from the scene


def in_noise(merged: Levels, floor: Picture, times: float | None) -> CaseResult:
    """Limits of 38 dB and 64 levels, where rounding alone does what `floor` shows."""
    latents = np.ones(8, np.float32)
    side, other = (Picture(levels, latents=latents * scale) for levels, scale in ((merged, 1.01), (scene(), 1)))
    moved = Picture(floor.levels, latents=latents * 1.01)
    return examine(CASE, side, other, (), Rules(UNFUSED, GOLDEN, times), moved)


def test_no_limit_is_tighter_than_twice_the_noise_floor() -> None:
    chaotic = (scene() + np.random.default_rng(2).integers(-20, 21, scene().shape)).astype(np.uint8)
    assert in_noise(chaotic, NOISY, 2.0).agrees
    assert not in_noise(chaotic, NOISY, None).agrees
    assert not in_noise(chaotic, Picture(noisy(scene(), 1)), 2.0).agrees  # of a quiet floor no limit is moved


def test_beyond_twice_the_floor_a_noisy_case_is_a_regression_as_well() -> None:
    assert in_noise(noisy(scene(), 55), NOISY, 2.0).verdict is Verdict.REGRESSION


def test_a_golden_brings_the_floor_of_its_own_run() -> None:
    apart = noisy(scene(), 8)
    quiet, loud = (Golden(scene(), name="g.png", floor={"psnr_db": psnr, "max_abs": 8.0}) for psnr in (80.0, 35.0))
    rules = Rules(UNFUSED, GOLDEN, 2.0)
    latents = np.ones(8, np.float32)
    for golden, verdict in ((quiet, Verdict.REGRESSION), (loud, Verdict.DRIFT)):
        merged = Picture(apart, latents=latents)
        assert examine(CASE, merged, merged, [golden], rules, merged).verdict is verdict
