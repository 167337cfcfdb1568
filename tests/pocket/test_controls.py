"""The gate's controls: what is wrong is caught with its verdict, what is harmless passes, and a hole is reported."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_fuse.regression.verdicts import Limits, Rules, Verdict
from pocket.controls.__main__ import CONTROLS, judge_all, main
from pocket.controls.benign import BENIGN
from pocket.controls.control import GOLDEN, UNFUSED, WEIGHTS, Control, Outcome
from pocket.controls.faults import FAULTS
from pocket.controls.rig import Built, Rig
from pocket.controls.table import write_markdown

ROOT = Path(__file__).resolve().parents[2]
GATES_OF_PICTURES = {UNFUSED, GOLDEN}
# Of what differs in size or place alone, one is judged here; `make controls` judges all.
LEFT_OUT = {"scale 0", "scale .5", "scale .97", "other LoRA", "default scheduler", "base's scheduler"} | {
    "img_mlp.net.2 missing",
    "model_index.json",
    "LoRA backwards",
    "VAE slicing, tiling",
    "cases backwards",
    "warm-up",
}
JUDGED = {name: control for name, control in CONTROLS.items() if name not in LEFT_OUT}
NOT_IN_THE_WEIGHTS = ("8 steps", "seed + 1", "patch", "grid of 16", "grid of 8", "NaN")
LOOSE = Rules(Limits({"psnr_db": 0.0}), Limits({"psnr_db": 0.0}))
IMPOSSIBLE = Rules(Limits({"psnr_db": 200.0}), Limits({"psnr_db": 200.0}))


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Outcome]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield {outcome.control.name: outcome for outcome in judge_all([*JUDGED.values()])}


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS if fault.name in JUDGED])
def test_a_fault_is_caught_with_its_verdict(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.as_expected
    assert outcome.verdict is (Verdict.INVALID if name == "NaN" else Verdict.REGRESSION)
    assert set(outcome.seen_by) == GATES_OF_PICTURES | (set() if name in NOT_IN_THE_WEIGHTS else {WEIGHTS})


@pytest.mark.parametrize("name", [change.name for change in BENIGN if change.name in JUDGED])
def test_a_benign_change_passes_every_gate(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.as_expected
    assert outcome.seen_by == ()
    assert outcome.verdict in {Verdict.EXACT, Verdict.DRIFT}


@pytest.mark.parametrize(
    ("name", "metric"),
    [("grid of 16", "Comb of a grid"), ("grid of 8", "Comb of a grid"), ("patch", "FLIP of the worst")],
)
def test_the_metric_that_is_made_for_a_damage_sees_it(outcomes: dict[str, Outcome], name: str, metric: str) -> None:
    for result in outcomes[name].results:
        for other in ("the unfused picture", "the golden"):
            assert any(reason.startswith(f"{metric}") and other in reason for reason in result.reasons)


def test_the_golden_sees_a_grid_by_its_comb_alone(outcomes: dict[str, Outcome]) -> None:
    """Another limit would have to be as tight as drift is."""
    assert all(reason.startswith("Comb") for reason in outcomes["grid of 16"].beyond_golden)


@pytest.mark.parametrize(
    ("name", "rules", "result"),
    [("scale .5", LOOSE, "0 of 1 faults caught"), ("again", IMPOSSIBLE, "0 of 1 benign changes passed")],
)
def test_a_gate_that_does_not_hold_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, rules: Rules, result: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([name], rules) == 1
    printed = capsys.readouterr().out
    assert f"{name}: WRONG" in printed
    assert result in printed


def test_tensors_in_other_shards_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rig: Rig, folder: Path) -> Built:
        return rig.built(rig.merge(folder, rig.plan(scale=0.5)), same_files=False)

    monkeypatch.chdir(ROOT)
    (outcome,) = judge_all([Control("wrong", "half", wrong)], LOOSE)
    assert outcome.seen_by == (WEIGHTS,)
    assert not outcome.as_expected


def test_the_tables_go_between_the_markers_of_a_document(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    document = tmp_path / "regression.md"
    document.write_text("before\n<!-- controls -->\nearlier tables\n<!-- /controls -->\nafter\n")
    for _ in range(2):
        write_markdown(document, list(outcomes.values()))
    text = document.read_text()
    assert text.startswith("before\n<!-- controls -->\n`weights`")
    assert text.endswith("\n<!-- /controls -->\nafter\n")
    assert "earlier tables" not in text
    assert text.count("| scale .9 |") == 1
    judged = [sum(control.name in JUDGED for control in controls) for controls in (FAULTS, BENIGN)]
    assert "{0} of {0} faults caught, {1} of {1} benign".format(*judged) in text
