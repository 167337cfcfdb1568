"""Laws of what a build came to: what follows from something else is not believed, whoever says it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_fuse.errors import BadGolden, BadSource
from lora_fuse.machine.parsing import parse_yaml
from lora_fuse.pictures.cases import Case
from lora_fuse.recipe.paths import GOLDEN, HERE
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import to_json
from lora_fuse.regression.gate import decide
from lora_fuse.regression.goldens import Goldens
from tests.support.approved import APPROVAL, KEY, run_record
from tests.support.machine import ROOT
from tests.support.publications import Place
from tests.support.released import candidate, drawn

NEAR = replace(KEY, torch="2.12")
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.parse(parse_yaml((ROOT / "params.yaml").read_text()), "params.yaml")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of a right build, as `dvc pull` brings them: no record of the run."""
    Place(tmp_path).fill()
    monkeypatch.chdir(tmp_path)


def change(path: Path, how: Change) -> None:
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def everywhere(case: str, **values: object) -> Change:
    """What somebody changes who knows that the verdict of the run is that of its worst case."""
    own = {f"{case}.{name}": value for name, value in values.items()}
    return lambda c: c.update(own | {"verdict": values["verdict"], "passed": False})


def golden(name: str, of: str | None = None, **changes: object) -> Change:
    """The numbers of the distance to the golden: all null, or those of another pair."""
    return lambda c: c.update(
        {key: None if of is None else c[key.replace(".golden.", f".{of}.")] for key in c if f"{name}.golden." in key}
        | {f"{name}.golden.identical": False}
        | changes
    )


METRICS: dict[str, tuple[Change, str]] = {
    "a case that regressed": (
        lambda c: c.update({"hat.verdict": "regression", "hat.agrees": False}),
        "hat.agrees False",
    ),
    "a regression of nothing": (everywhere("hat", verdict="regression"), "hat.verdict regression, and what lies here"),
    "a case that is invalid": (
        lambda c: c.update({"hat.verdict": "invalid"}),
        "exact, and what lies here gives inv",
    ),
    "a verdict alone": (lambda c: c.update(verdict="drift"), "verdict drift, and what lies here gives exact"),
    "a pass alone": (lambda c: c.update(passed=False), "passed False, and what lies here gives True"),
    "a pass in words": (lambda c: c.update(passed="true"), "passed true"),
    "no verdict": (lambda c: c.update({"hat.verdict": ["exact"]}), "which is no verdict"),
    "another picture": (lambda c: c.update({"hat.unfused.psnr_db": 90.0}), "hat.unfused.psnr_db 90.0, and what lies"),
    "another difference": (lambda c: c.update({"hat.unfused.max_abs": 0.0}), "hat.unfused.identical False"),
    "a limit": (
        lambda c: c.update({"hat.unfused.flip_worst": 0.9}),
        "exact, and what lies here gives regression",
    ),
    "latents": (lambda c: c.update({"hat.unfused.latents_l2": 0.9}), "exact, and what lies here gives regression"),
    "a floor": (lambda c: c.update({"hat.floor.latents_l2": 0.9, "hat.over_floor": 0.75e-4 / 0.9}), "noise floor"),
    "times the floor": (
        lambda c: c.update({"hat.over_floor": 0.1}),
        "over_floor 0.1, and what lies here gives 0.75",
    ),
    "not the golden": (golden("hat", of="unfused"), "hat.golden.psnr_db 66.49"),
    "no golden": (golden("hat"), "hat.verdict exact, and what lies here gives no-golden"),
    "one of them": (lambda c: [c.pop(key) for key in list(c) if key.startswith("hat.")], "has the cases rabbit, the r"),
    "one more": (lambda c: c.update({"x.verdict": "exact"}), "has the cases"),
    "a number less": (lambda c: c.pop("hat.floor.flip"), "has no 'hat.floor.flip'"),
    "no number": (lambda c: c.update({"hat.unfused.flip": "0"}), "hat.unfused.flip '0', which is no number"),
    "a number without end": (lambda c: c.update({"hat.unfused.flip": 10**400}), "000, which is no number"),
    "less than no distance": (lambda c: c.update({"hat.unfused.latents_l2": -1.0}), "-1.0, which no two pictures can"),
    "a NaN": (lambda c: c.update({"hat.unfused.flip": float("nan")}), "hat.unfused.flip nan, which is no number"),
    "another recipe": (lambda c: c.update(recipe="x"), "recipe x, and what lies here gives pocket"),
    "another scale": (lambda c: c.update(scale=0.5), "scale 0.5, and what lies here gives 1.0"),
    "another merge": (lambda c: c.update(manifest_sha256="5" * 64), f"manifest_sha256 {'5' * 64}, and what lies here"),
    "another machine": (lambda c: c.update(environment="x"), "hat.verdict exact, and what lies here gives review"),
    "nothing": (lambda c: c.clear(), "has no 'recipe'"),
}
VERIFY: dict[str, tuple[Change, str]] = {
    "a problem": (lambda c: c.update(problems=["a row differs"]), "problem_count 0, and its own list gives 1"),
    "a count": (lambda c: c.update(problem_count=2), "passed True, and its own list gives False"),
    "less than nothing": (lambda c: c.update(problem_count=-1), "passed True, and its own list gives False"),
    "a failure of nothing": (lambda c: c.update(passed=False), "passed False, and its own list gives True"),
    "nothing looked at": (lambda c: c.update(rows_checked=0), "rows_checked 0, and its own list gives 1"),
    "other targets": (lambda c: c.update(targets=3), "targets 3, and the manifest has 12"),
    "another merge": (lambda c: c.update(manifest_sha256="5" * 64), f"{'5' * 64}, and the manifest on disk has"),
    "nothing": (lambda c: c.clear(), "is not a WeightCheck: at passed: Field required"),
}
CANDIDATES: dict[str, tuple[Change, str]] = {
    "sides that disagree": (
        lambda c: c["cases"]["hat"].update(agrees=False),
        "hat.agrees True, and what lies here gives",
    ),
    "another picture": (lambda c: c["cases"]["hat"].update(sha256="5" * 64), f"and {'5' * 64} was judged"),
    "another floor": (lambda c: c["cases"]["hat"]["floor"].update(flip=0.5), "the candidate hat has the noise floor"),
    "other sigmas": (lambda c: c["cases"]["hat"]["provenance"].update(sigmas=[1.0, 0.0]), "gives regression"),
    "another prompt": (lambda c: c["cases"]["hat"]["provenance"]["case"].update(prompt="x"), "made with prompt x, and"),
    "other steps": (
        lambda c: c["cases"]["hat"]["provenance"].update(steps=9),
        "with steps 9, and the recipe",
    ),
    "one less": (lambda c: c["cases"].pop("hat"), "candidates.json has the cases rabbit, the recipe hat, rabbit"),
    "another merge": (lambda c: c.update(manifest_sha256="5" * 64), f"is of manifest {'5' * 64}, and there is"),
    "nothing": (lambda c: c.clear(), "is not a Candidates"),
}
TOLD = [
    (path, *told)
    for path, table in ((HERE.metrics, METRICS), (HERE.verify, VERIFY), (HERE.candidates, CANDIDATES))
    for told in table.values()
]


@pytest.mark.parametrize(("path", "how", "said"), TOLD, ids=[*METRICS, *VERIFY, *CANDIDATES])
def test_what_a_result_says_and_does_not_follow_is_refused(recipe: Recipe, path: Path, how: Change, said: str) -> None:
    change(path, how)
    with pytest.raises(BadSource, match=re.escape(said)) as caught:
        decide(recipe, HERE)
    assert caught.value.rerun is not None
    assert caught.value.rerun.stage == ("verify" if path == HERE.verify else "regress")


@pytest.mark.parametrize("side", ["merged", "unfused"])
def test_numbers_are_those_of_the_pictures_on_disk(recipe: Recipe, side: str) -> None:
    picture = HERE.images / f"hat.{side}.png"
    picture.write_bytes((HERE.images / "rabbit.merged.png").read_bytes())
    with pytest.raises(BadSource, match=r"was judged" if side == "merged" else r"hat\.unfused\.psnr_db 66\.49"):
        decide(recipe, HERE)
    picture.unlink()
    with pytest.raises(BadSource, match=rf"hat\.{side}\.png cannot be read"):
        decide(recipe, HERE)


def test_a_golden_that_is_not_as_approved_is_refused(recipe: Recipe) -> None:
    change(GOLDEN / "pocket" / str(KEY) / "hat.json", lambda c: c["floor"].update(flip=0.5))
    with pytest.raises(BadGolden, match=r"hat\.json has sha256"):
        decide(recipe, HERE)


def test_the_record_of_the_run_names_its_machine(recipe: Recipe) -> None:
    HERE.run.write_text(to_json(run_record(candidates=HERE.candidates.read_text())))
    assert decide(recipe, HERE).code == 0
    HERE.run.write_text(to_json(run_record(NEAR, candidates=HERE.candidates.read_text())))
    with pytest.raises(BadSource, match=f"says environment {KEY}, and what lies here gives {NEAR}"):
        decide(recipe, HERE)
    HERE.run.write_text(to_json(run_record(NEAR, candidates="of another run")))
    assert decide(recipe, HERE).code == 0


def approve_instead(recipe: Recipe, **about: Any) -> None:
    """Goldens of each case: the unfused picture."""
    for number, case in enumerate(Case.of(recipe)):
        png = drawn(case, number)[1].png
        Goldens(GOLDEN / "pocket").approve(png, candidate(case, png, recipe, "m"), run_record(**about), APPROVAL)


def test_what_was_not_approved_here_is_no_pass_and_follows(recipe: Recipe) -> None:
    for path in (GOLDEN / "pocket" / str(KEY)).iterdir():
        path.unlink()
    with pytest.raises(BadSource, match=r"hat\.golden\.psnr_db None, and what lies here gives no golden"):
        decide(recipe, HERE)
    for case in ("hat", "rabbit"):
        change(HERE.metrics, golden(case))
        change(HERE.metrics, everywhere(case, verdict="no-golden"))
    assert decide(recipe, HERE).code == 3
    approve_instead(recipe)
    assert decide(recipe, HERE).code == 3  # the run does not pass by it
    for path in (GOLDEN / "pocket" / str(KEY)).iterdir():
        path.unlink()
    approve_instead(recipe, key=NEAR)
    for case in ("hat", "rabbit"):
        change(HERE.metrics, golden(case, of="unfused"))
        change(HERE.metrics, everywhere(case, verdict="review"))
    assert decide(recipe, HERE).code == 4


def test_a_drift_is_held_to_the_golden_that_is_there(recipe: Recipe) -> None:
    approve_instead(recipe)
    for case in ("hat", "rabbit"):
        change(HERE.metrics, golden(case, of="unfused"))
        change(HERE.metrics, everywhere(case, verdict="drift"))
    change(HERE.metrics, lambda c: c.update(passed=True))
    decision = decide(recipe, HERE)
    assert (decision.code, decision.reason.partition(":")[0]) == (0, "drift")
    change(HERE.metrics, lambda c: c.update({"hat.golden.mean_abs": 1e-4}))
    with pytest.raises(BadSource, match=r"hat\.golden\.mean_abs 0\.0001"):
        decide(recipe, HERE)
    change(HERE.metrics, lambda c: c.update({"hat.golden.mean_abs": c["hat.unfused.mean_abs"]}))
    change(HERE.metrics, lambda c: c.update({"hat.golden.comb_db": 99.0}))
    with pytest.raises(BadSource, match=r"hat\.verdict drift, and what lies here gives regression"):
        decide(recipe, HERE)


def test_wrong_weights_are_a_failure_and_nothing_else_is_asked(recipe: Recipe) -> None:
    change(HERE.verify, lambda c: c.update(passed=False, problem_count=1, problems=["a row differs"]))
    HERE.metrics.unlink()
    assert decide(recipe, HERE).code == 1
