"""Laws of the verdicts."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fuse.pictures.metrics import METRICS
from lora_fuse.regression.review import flat_metrics
from lora_fuse.regression.verdicts import Comparison, Golden, Limits, Rules, Verdict, beyond, worst
from tests.support.judgements import GOLDEN, RULES, SAME, UNFUSED, brighter, latents, look, noisy, scene, with_floor


def apart(psnr_db: float, max_abs: float) -> Comparison:
    """Pictures that far apart, and equal by every other metric."""
    return Comparison({**SAME.values, "psnr_db": psnr_db, "max_abs": max_abs})


def limited(psnr_db: float, max_abs: float) -> Limits:
    return Limits({"psnr_db": psnr_db, "max_abs": max_abs})


comparisons = st.builds(apart, st.just(math.inf) | st.floats(0, 120), st.integers(0, 255))
limits = st.builds(limited, st.floats(0, 100), st.integers(0, 255))
shifts = st.integers(0, 60)
seldom = settings(deadline=None, max_examples=40)  # two comparisons each take a moment


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


@given(comparisons, limits)
def test_a_sentence_stands_for_each_limit_that_does_not_hold(comparison: Comparison, limit: Limits) -> None:
    values, bounds = comparison.values, limit.bounds
    broken = [values["psnr_db"] < bounds["psnr_db"], values["max_abs"] > bounds["max_abs"]]
    assert len(beyond(comparison, limit, "the golden")) == sum(broken)


@seldom
@given(st.none() | shifts, shifts, shifts)
def test_a_pass_has_a_golden_of_here_and_both_pairs_within_their_limits(
    golden: int | None, merged: int, unfused: int
) -> None:
    result = look(brighter(merged), brighter(unfused), None if golden is None else brighter(golden))
    assert result.vs_unfused is not None
    assert result.agrees == (not beyond(result.vs_unfused, UNFUSED, ""))
    near = result.vs_golden is not None and not beyond(result.vs_golden, GOLDEN, "")
    assert result.verdict.passed == (result.agrees and near)


@seldom
@given(shifts, shifts, st.floats(0, 50), st.integers(0, 100))
def test_a_wider_limit_never_makes_a_verdict_worse(merged: int, golden: int, psnr: float, levels: int) -> None:
    wider = Rules(UNFUSED, limited(GOLDEN.bounds["psnr_db"] - psnr, GOLDEN.bounds["max_abs"] + levels))
    before, after = (look(brighter(merged), golden=brighter(golden), rules=rules) for rules in (RULES, wider))
    assert after.verdict.severity <= before.verdict.severity


@seldom
@given(st.none() | shifts, st.booleans())
def test_a_failure_within_the_run_is_a_regression_whatever_the_golden_says(golden: int | None, here: bool) -> None:
    held = () if golden is None else (Golden(brighter(golden), name="a.png", elsewhere=None if here else "elsewhere"),)
    result = look(scene(), scene(5), held)
    assert (result.verdict, result.agrees) == (Verdict.REGRESSION, False)
    assert "the unfused picture of this run" in result.reasons[0]


def test_a_reason_has_the_value_and_the_limit() -> None:
    assert beyond(apart(31.234, 40), GOLDEN, "the golden") == [
        "PSNR to the golden is 31.23 dB, below 50 dB.",
        "Largest difference to the golden is 40 levels, above 8 levels.",
    ]


@pytest.mark.parametrize("name", METRICS)
def test_a_value_that_is_no_number_is_within_no_limit(name: str) -> None:
    values = Comparison({**SAME.values, name: math.nan})
    assert len(beyond(values, Limits({name: 0.0}), "the golden")) == 1


# Pictures


def test_verdicts_rank_from_exact_to_invalid_and_the_worst_speaks_for_all() -> None:
    ranked = [Verdict(name) for name in ["exact", "drift", "review", "no-golden", "regression", "invalid"]]
    assert ranked == list(Verdict)
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
    measured = flat_metrics([with_floor(latents(0.01), latents(0.01))])
    assert list(with_golden) == list(without) == list(measured)
    assert measured["rabbit.over_floor"] == pytest.approx(1)
    assert (with_golden["rabbit.agrees"], with_golden["rabbit.over_floor"]) == (True, None)
    assert (with_golden["passed"], with_golden["verdict"]) == (True, "exact")
    assert with_golden["rabbit.golden.psnr_db"] is None
    assert (with_golden["rabbit.golden.identical"], without["rabbit.golden.identical"]) == (True, False)
    assert (without["rabbit.unfused.max_abs"], without["rabbit.golden.max_abs"]) == (0, None)
    assert "approved" in str(without["rabbit.reasons"])
