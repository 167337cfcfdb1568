"""Laws of the gate: nothing wrong passes, and every answer names the one command that comes next."""

from typing import Any

import pytest

from lora_fuse.recipe.paths import HERE
from lora_fuse.regression.consistency import Results
from lora_fuse.regression.gate import EXIT_CODES, MEANINGS, Decision, decision_of, next_step
from lora_fuse.regression.verdicts import Verdict
from stages.run import command
from tests.support.approved import weight_check


def decide(metrics: dict[str, Any], **verify: Any) -> Decision:
    return decision_of(Results(weight_check(**verify), metrics, ()), HERE)


def metrics(verdict: str, **cases: str) -> dict[str, Any]:
    """What a run says whose cases have these verdicts; a verdict that ends in "!" is of sides that do not agree."""
    found: dict[str, Any] = {
        "passed": Verdict(verdict).passed,
        "verdict": verdict,
        "recipe": "pocket",
        "manifest_sha256": "m",
    }
    for name, case in (cases or {"a": verdict}).items():
        found |= {f"{name}.verdict": case.rstrip("!"), f"{name}.agrees": not case.endswith("!") and case != "invalid"}
    return found


@pytest.mark.parametrize(
    ("verdict", "code"),
    [("exact", 0), ("drift", 0), ("review", 4), ("no-golden", 3), ("regression", 1), ("invalid", 1)],
)
def test_every_verdict_has_its_exit_code_and_names_one_next_command(verdict: str, code: int) -> None:
    decision = decide(metrics(verdict))
    assert decision.code == code
    assert decision.reason.startswith(f"{verdict}: {MEANINGS[verdict]}")
    assert ("report.html" in decision.reason) == (code != 0)
    then = command(decision.then)
    assert then.startswith(("dvc repro ", "python -m stages."))
    assert then.count("python -m") + then.count("dvc ") == 1


def test_an_export_that_fails_fails_the_gate_by_its_name_and_is_made_again() -> None:
    decision = decide(metrics("regression", a="exact") | {"exports.fp8_scaled.verdict": "regression"})
    assert (decision.code, command(decision.then)) == (1, "dvc repro -f export")
    assert decision.reason.startswith("regression: what was exported as fp8_scaled is not the merge, see ")
    assert decide(metrics("exact") | {"exports.fp8_scaled.verdict": "drift"}).code == 0


def test_only_what_passes_has_exit_code_0() -> None:
    assert {verdict for verdict in Verdict if EXIT_CODES[verdict] == 0} == {v for v in Verdict if v.passed}
    assert EXIT_CODES.keys() == set(Verdict)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_wrong_weights_fail_whatever_the_pictures_are(verdict: str) -> None:
    decision = decide(metrics(verdict), passed=False, problem_count=2)
    assert (decision.code, "2 problems" in decision.reason) == (1, True)
    assert command(decision.then) == "dvc repro -f fuse"


@pytest.mark.parametrize(
    ("found", "then"),
    [
        (metrics("exact"), "dvc repro publish/dvc.yaml"),
        (metrics("drift", a="exact", b="drift"), "dvc repro publish/dvc.yaml"),
        (metrics("review", a="exact", b="review"), 'python -m stages.approve --reason "…"'),
        (metrics("no-golden", a="review", b="no-golden"), 'python -m stages.approve --reason "…"'),
    ],
)
def test_what_comes_next(found: dict[str, Any], then: str) -> None:
    assert command(next_step(found)) == then


def test_a_regression_of_sides_that_agree_can_be_approved_case_by_case() -> None:
    found = metrics("regression", a="exact", b="regression", c="no-golden", d="regression")
    step = command(next_step(found))
    assert step.startswith("python -m stages.approve --case b --case d --reason ")
    assert "--case a" not in step
    assert "if it is meant" in step


@pytest.mark.parametrize(
    "found",
    [
        metrics("regression", a="exact", b="regression!"),
        metrics("regression", a="regression", b="regression!"),
        metrics("invalid", a="regression", b="invalid"),
        metrics("invalid"),
    ],
)
def test_a_regression_of_sides_that_do_not_agree_sends_to_the_weights_and_never_to_approval(
    found: dict[str, Any],
) -> None:
    assert command(next_step(found)) == "python -m stages.verify recipe=pocket verify.rows=all"
    assert "approve" not in command(decide(found).then)
