"""Laws of the verdicts."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fuse.regression.metrics import Levels
from lora_fuse.regression.verdicts import (
    CaseResult,
    Comparison,
    Facts,
    Limits,
    Picture,
    Subject,
    Verdict,
    compare,
    examine,
    flat_metrics,
    judge,
    worst,
)

UNFUSED = Limits({"psnr_db": 38, "max_abs": 64})
GOLDEN = Limits({"psnr_db": 50, "max_abs": 8})
SUBJECT = Subject("rabbit", "make it purple", seed=0)
FINE = Facts((64, 64), nonfinite=0, flat=False)
FACTS = {"merged": FINE, "unfused": FINE, "golden": FINE}


def apart(psnr_db: float | None, max_abs: float) -> Comparison:
    """Pictures that far apart, and equal by every other metric."""
    return Comparison({**SAME.values, "psnr_db": psnr_db, "max_abs": max_abs})


def limited(psnr_db: float, max_abs: float) -> Limits:
    return Limits({"psnr_db": psnr_db, "max_abs": max_abs})


comparisons = st.builds(apart, st.none() | st.floats(0, 120), st.integers(0, 255))
limits = st.builds(limited, st.floats(0, 100), st.integers(0, 255))


def scene(seed: int = 0, height: int = 64, width: int = 64) -> Levels:
    """A picture with contrast that no change below pushes over the edge of the range."""
    return np.random.default_rng(seed).integers(60, 190, (height, width, 3), dtype=np.uint8)


SAME = compare(scene(), scene())


def noisy(picture: Levels, levels: int) -> Levels:
    noise = np.random.default_rng(1).integers(-levels, levels + 1, picture.shape)
    return (picture + noise).astype(np.uint8)


def look(merged: Levels, unfused: Levels | None = None, golden: Levels | None = None, nonfinite: int = 0) -> CaseResult:
    other = merged if unfused is None else unfused
    return examine(
        SUBJECT,
        Picture(merged, nonfinite),
        Picture(other),
        golden,
        unfused_limits=UNFUSED,
        golden_limits=GOLDEN,
    )


def decide(unfused: Comparison | None, golden: Comparison | None, limit: Limits = GOLDEN) -> Verdict:
    return judge(FACTS, unfused, golden, asked=None, unfused_limits=UNFUSED, golden_limits=limit)[0]


def test_the_golden_itself_is_exact() -> None:
    result = look(scene(), noisy(scene(), 1), scene())
    assert (result.verdict, result.reasons) == (Verdict.EXACT, ())
    assert result.vs_golden == SAME


def test_one_level_from_the_golden_is_drift_and_the_sentence_has_the_numbers() -> None:
    drifted = scene()
    drifted[::8] += 1
    result = look(drifted, golden=scene())
    assert result.verdict is Verdict.DRIFT
    assert "largest difference 1 levels" in result.reasons[0]


def test_without_a_golden_nothing_passes() -> None:
    assert look(scene()).verdict is Verdict.NO_GOLDEN
    assert not Verdict.NO_GOLDEN.passed


@given(comparisons, comparisons, limits)
def test_a_pass_has_a_golden_and_both_pairs_within_their_limits(
    unfused: Comparison, golden: Comparison, limit: Limits
) -> None:
    verdict = decide(unfused, golden, limit)
    within = all(
        value is None or (value >= bound if name == "psnr_db" else value <= bound)
        for pair, limits in ((unfused, UNFUSED), (golden, limit))
        for name, bound in limits.bounds.items()
        for value in [pair.values[name]]
    )
    assert verdict.passed == within
    assert not decide(unfused, None, limit).passed
    assert not decide(None, golden, limit).passed


@given(comparisons, st.none() | comparisons, st.floats(0, 50), st.integers(0, 100))
def test_a_wider_limit_never_makes_a_verdict_worse(
    unfused: Comparison, golden: Comparison | None, psnr: float, levels: int
) -> None:
    wider = limited(GOLDEN.bounds["psnr_db"] - psnr, GOLDEN.bounds["max_abs"] + levels)
    assert decide(unfused, golden, wider).severity <= decide(unfused, golden).severity


@given(st.none() | comparisons)
def test_a_failure_within_the_run_is_a_regression_whatever_the_golden_says(golden: Comparison | None) -> None:
    assert decide(apart(20.0, 90), golden) is Verdict.REGRESSION
    assert decide(apart(20.0, 90), SAME) is Verdict.REGRESSION


def test_a_reason_has_the_value_and_the_limit() -> None:
    _, reasons = judge(FACTS, SAME, apart(31.234, 40), asked=None, unfused_limits=UNFUSED, golden_limits=GOLDEN)
    assert reasons == (
        "PSNR to the golden is 31.23 dB, below 50 dB.",
        "Largest difference to the golden is 40 levels, above 8 levels.",
    )


def test_a_psnr_that_is_no_number_is_within_no_limit() -> None:
    assert decide(SAME, apart(math.nan, 0)) is Verdict.REGRESSION


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
    assert len(result.reasons) == 3


def test_a_broken_unfused_picture_is_invalid_too() -> None:
    assert look(scene(), unfused=np.zeros((64, 64, 3), dtype=np.uint8)).verdict is Verdict.INVALID


def test_one_nan_is_invalid_though_the_levels_match() -> None:
    result = look(scene(), golden=scene(), nonfinite=1)
    assert result.verdict is Verdict.INVALID
    assert "1 of 12288 values" in result.reasons[0]


@pytest.mark.parametrize("which", ["unfused", "golden", "asked"])
def test_a_wrong_size_is_invalid_and_both_sizes_are_named(which: str) -> None:
    small = scene(0, 32, 48)
    result = examine(
        Subject("rabbit", "", 0, (48, 32) if which == "asked" else None),
        Picture(scene()),
        Picture(small if which == "unfused" else scene()),
        small if which == "golden" else scene(),
        unfused_limits=UNFUSED,
        golden_limits=GOLDEN,
    )
    assert result.verdict is Verdict.INVALID
    assert "64x64" in result.reasons[0]
    assert "48x32" in result.reasons[0]


def test_the_size_that_was_asked_for_is_width_by_height() -> None:
    wide = scene(0, 32, 48)
    result = examine(
        Subject("rabbit", "", 0, (48, 32)),
        Picture(wide),
        Picture(wide),
        wide,
        unfused_limits=UNFUSED,
        golden_limits=GOLDEN,
    )
    assert (result.verdict, result.facts.size) == (Verdict.EXACT, (48, 32))


def test_verdicts_rank_from_exact_to_invalid_and_the_worst_speaks_for_all() -> None:
    ranked = [Verdict.EXACT, Verdict.DRIFT, Verdict.NO_GOLDEN, Verdict.REGRESSION, Verdict.INVALID]
    for better, worse in pairwise(ranked):
        assert worst([worse, better]) is worst([better, worse]) is worse
    assert [verdict for verdict in Verdict if verdict.passed] == [Verdict.EXACT, Verdict.DRIFT]


def test_a_run_without_cases_does_not_pass() -> None:
    assert not worst([]).passed
    assert flat_metrics([])["passed"] is False


def test_a_regression_is_not_hidden_behind_a_case_without_a_golden() -> None:
    results = [look(scene()), look(scene(1), golden=scene())]
    assert flat_metrics(results)["verdict"] == "regression"


def test_metrics_are_flat_json_without_infinities_and_have_the_same_keys_for_every_case() -> None:
    with_golden = flat_metrics([look(scene(), golden=scene())])
    without = flat_metrics([look(scene())])
    assert json.loads(json.dumps(with_golden, allow_nan=False)) == with_golden
    assert list(with_golden) == list(without)
    assert (with_golden["passed"], with_golden["verdict"]) == (True, "exact")
    assert with_golden["rabbit.golden.psnr_db"] is None
    assert (with_golden["rabbit.golden.identical"], without["rabbit.golden.identical"]) == (True, False)
    assert (without["rabbit.unfused.max_abs"], without["rabbit.golden.max_abs"]) == (0, None)
    assert "approved" in str(without["rabbit.reasons"])


def test_what_is_judged_is_what_was_measured() -> None:
    merged, golden = noisy(scene(), 2), scene()
    assert look(merged, golden=golden).vs_golden == compare(merged, golden)
