"""Laws of the judgement of a case: by its goldens, its sigmas, the pictures themselves, and the noise floor."""

import json
import math
import multiprocessing

import numpy as np
import pytest

from lora_fuse.pictures.cases import Case
from lora_fuse.pictures.pairs import Pair
from lora_fuse.pictures.picture import Levels, Picture, Rendered
from lora_fuse.pictures.render_progress import Cost
from lora_fuse.regression import case_judgement
from lora_fuse.regression.case_judgement import Comparisons, examine, judge_pairs
from lora_fuse.regression.review import flat_metrics
from lora_fuse.regression.verdicts import CaseResult, Comparison, Golden, Rules, Values, Verdict, compare
from tests.support.judgements import (
    CASE,
    GOLDEN,
    RULES,
    SAME,
    UNFUSED,
    brighter,
    latents,
    look,
    noisy,
    scene,
    with_floor,
)

SIGMAS = (1.0, 0.9, 0.75, 0.5)
ELSEWHERE = "cpu-arm64-neon (isa there)"


def test_within_the_limits_of_a_golden_of_another_environment_a_person_has_to_look() -> None:
    for merged in (scene(), brighter(1)):
        result = look(merged, golden=[Golden(scene(), name="rabbit.png", elsewhere=ELSEWHERE)])
        assert (result.verdict, result.verdict.passed, result.agrees) == (Verdict.REVIEW, False, True)
        assert ELSEWHERE in result.reasons[0]


def test_beyond_the_limits_of_a_golden_of_another_environment_there_is_none() -> None:
    result = look(brighter(30), golden=[Golden(scene(), name="rabbit.png", elsewhere=ELSEWHERE)])
    assert (result.verdict, result.agrees) == (Verdict.NO_GOLDEN, True)
    assert ELSEWHERE in result.reasons[0]
    assert any("largest difference to the golden is 30 levels" in reason.lower() for reason in result.reasons[1:])


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_goldens_the_nearest_decides(order: int) -> None:
    goldens = [Golden(brighter(shift), name=f"{shift}.png") for shift in (40, 1, 20)][::order]
    result = look(scene(), golden=goldens)
    assert result.golden is not None
    assert (result.verdict, result.golden.name) == (Verdict.DRIFT, "1.png")
    assert result.vs_golden == compare(Picture(scene()), Picture(brighter(1)))
    assert look(brighter(20), golden=goldens).verdict is Verdict.EXACT
    assert look(scene(3), golden=goldens).verdict is Verdict.REGRESSION


def test_a_golden_of_another_size_counts_only_where_there_is_no_other() -> None:
    small = Golden(scene(0, 32, 48), name="small.png")
    assert look(scene(), golden=[small, Golden(scene(), name="same.png")]).verdict is Verdict.EXACT


def test_a_golden_of_another_size_is_a_regression_that_can_be_approved_anew() -> None:
    result = look(scene(), golden=scene(0, 32, 48))
    assert (result.verdict, result.agrees, result.vs_golden) == (Verdict.REGRESSION, True, None)
    assert all(size in result.reasons[0] for size in ("64x64", "48x32", "rabbit.png"))
    other = look(scene(), golden=[Golden(scene(0, 32, 48), name="rabbit.png", elsewhere=ELSEWHERE)])
    assert (other.verdict, other.agrees) == (Verdict.NO_GOLDEN, True)


def visited(merged: tuple[float, ...], unfused: tuple[float, ...] | None = None) -> CaseResult:
    other = Picture(scene(), sigmas=merged if unfused is None else unfused)
    return examine(
        CASE,
        Picture(scene(), sigmas=merged),
        other,
        [Golden(scene(), name="rabbit.png")],
        Rules(UNFUSED, GOLDEN, sigmas=SIGMAS),
    )


def test_the_recipe_s_sigmas_and_their_rounding_pass() -> None:
    assert visited((*SIGMAS, 0.0)).verdict is Verdict.EXACT
    assert visited((1.0, 0.90000004, 0.75, 0.49999, 0.0)).verdict is Verdict.EXACT
    assert look(scene(), golden=scene()).verdict is Verdict.EXACT  # left open


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ((1.0, 0.9, 0.75, 0.48, 0.0), "1, 0.9, 0.75, 0.48"),
        ((1.0, 0.9, 0.75, 0.0), "1, 0.9, 0.75"),
        ((1.0, 0.9, 0.75, 0.5, 0.3, 0.0), "1, 0.9, 0.75, 0.5, 0.3"),
        ((math.nan, 0.9, 0.75, 0.5, 0.0), "nan, 0.9, 0.75, 0.5"),
    ],
)
def test_other_sigmas_are_a_regression_that_names_both_lists(wrong: tuple[float, ...], shown: str) -> None:
    for merged, unfused in ((wrong, (*SIGMAS, 0.0)), ((*SIGMAS, 0.0), wrong)):
        result = visited(merged, unfused)
        assert (result.verdict, result.agrees) == (Verdict.REGRESSION, False)
        assert f"visited the sigmas {shown}, the recipe's are 1, 0.9, 0.75, 0.5." in result.reasons[0]


def test_a_change_as_of_a_wrong_scale_regresses() -> None:
    """The LoRA's effect at half strength: a smooth change of some levels all over the picture."""
    effect = np.linspace(0, 40, 64)[None, :, None]
    full, half = ((scene() + effect * share).astype(np.uint8) for share in (1.0, 0.5))
    result = look(half, unfused=full, golden=full)
    assert result.verdict is Verdict.REGRESSION
    assert any("the unfused picture of this run" in reason for reason in result.reasons)


def test_a_small_patch_regresses_though_its_psnr_is_high() -> None:
    patched = scene(0, 512, 512)
    patched[100:104, 100:104] += 60
    result = look(patched, golden=scene(0, 512, 512))
    assert result.vs_golden is not None
    assert (result.vs_golden.values["psnr_db"] or 0) > 45
    assert result.verdict is Verdict.REGRESSION


def test_a_flat_picture_is_invalid_even_if_the_unfused_and_the_golden_are_as_flat() -> None:
    flat = np.full((64, 64, 3), 128, dtype=np.uint8)
    result = look(flat, golden=flat)
    assert result.verdict is Verdict.INVALID
    assert (len(result.reasons), result.agrees) == (2, False)


def test_a_broken_unfused_picture_is_invalid_too() -> None:
    assert look(scene(), unfused=np.zeros((64, 64, 3), dtype=np.uint8)).verdict is Verdict.INVALID


def test_one_nan_is_invalid_though_the_levels_match() -> None:
    result = look(scene(), golden=scene(), nonfinite=1)
    assert result.verdict is Verdict.INVALID
    assert "1 of 12288 values" in result.reasons[0]


@pytest.mark.parametrize("which", ["unfused", "asked"])
def test_a_wrong_size_is_invalid_and_both_sizes_are_named(which: str) -> None:
    small = scene(0, 32, 48)
    result = examine(
        Case("rabbit", "", 0, (), *((32, 48) if which == "asked" else (None, None))),
        Picture(scene()),
        Picture(small if which == "unfused" else scene()),
        [Golden(scene(), name="rabbit.png")],
        RULES,
    )
    assert (result.verdict, result.agrees) == (Verdict.INVALID, False)
    assert "64x64" in result.reasons[0]
    assert "48x32" in result.reasons[0]


def test_the_size_that_was_asked_for_is_width_by_height() -> None:
    wide = scene(0, 32, 48)
    case = Case("rabbit", "", 0, (), 32, 48)
    result = examine(case, Picture(wide), Picture(wide), [Golden(wide, name="rabbit.png")], RULES)
    assert (result.verdict, result.facts.size) == (Verdict.EXACT, (48, 32))


def test_what_is_judged_is_what_was_measured() -> None:
    merged, golden = noisy(scene(), 2), scene()
    result = look(merged, golden=golden)
    assert result.vs_golden == compare(Picture(merged), Picture(golden))
    assert result.vs_unfused == SAME


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


QUIET = {"psnr_db": 80.0, "max_abs": 1.0}
LOUD = {"psnr_db": 35.0, "max_abs": 8.0}
ANYTHING = {"psnr_db": 0.0, "max_abs": 255.0}


@pytest.mark.parametrize(
    ("then", "here", "verdict"),
    [
        (LOUD, 8, Verdict.DRIFT),
        (QUIET, 8, Verdict.REGRESSION),  # a model that has become noisier does not loosen its own limits
        (None, 8, Verdict.REGRESSION),
        ({"max_abs": 8.0}, 8, Verdict.REGRESSION),
        (LOUD, 1, Verdict.REGRESSION),  # nor does a record that says so of itself
        (ANYTHING, 1, Verdict.REGRESSION),
        (ANYTHING, 0, Verdict.REGRESSION),  # of a run that rounding does not move at all
        (ANYTHING, 8, Verdict.DRIFT),
    ],
)
def test_against_a_golden_the_lower_of_two_floors_counts(
    then: dict[str, float] | None, here: int, verdict: Verdict
) -> None:
    latents = np.ones(8, np.float32)
    merged = Picture(noisy(scene(), 8), latents=latents)
    floor = Picture(noisy(merged.levels, here), latents=latents)
    golden = Golden(scene(), name="g.png", floor=then)
    assert examine(CASE, merged, merged, [golden], Rules(UNFUSED, GOLDEN, 2.0), floor).verdict is verdict


@pytest.mark.parametrize("beside", [True, False])
def test_large_pictures_are_compared_by_other_processes_as_small_ones_are_here(
    beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {"merged": brighter(1), "unfused": scene(), "floor": noisy(scene(), 8)}
    sides |= {"export a": scene(0, 32, 48), "export b": brighter(1)}  # of another size, and the same
    cost = Cost(1.0, None, None, 1)
    made = {side: Rendered(levels, latents=latents(), cost=cost) for side, levels in sides.items()}
    exports = {"a": made["export a"], "b": made["export b"]}
    pair = Pair(CASE, made["merged"], made["unfused"], made["floor"], "diffusers", exports=exports)
    goldens = {CASE.name: [Golden(brighter(9), name="g.png"), Golden(brighter(2), name="h.png")]}
    (here,) = judge_pairs([pair], goldens, RULES)
    monkeypatch.setattr(case_judgement, "LARGE", 0)
    with Comparisons(goldens, beside=beside) as compared:
        for side, rendered in made.items():
            compared.while_made(side, CASE.name, rendered)
        assert bool(multiprocessing.active_children()) == beside
        monkeypatch.setattr(case_judgement, "compare", of_other_processes)
        (there,) = compared.judge([pair], RULES)
    assert (there.result, there.exports) == (here.result, here.exports)
    assert list(there.exports) == ["a", "b"]
    assert there.exports["a"] is None


def of_other_processes(a: Picture, b: Picture, of_levels: Values | None = None) -> Comparison:
    """Refuse to compare here what is not the same."""
    assert of_levels is not None or (a.levels == b.levels).all()
    return compare(a, b, of_levels)
