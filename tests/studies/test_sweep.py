"""Laws of a sweep's parts: what is recommended and why, what is damage, when a point is done, who builds it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fuse.errors import BadLora, NoSpace
from lora_fuse.machine import space
from lora_fuse.machine.staging import exclusive
from lora_fuse.pictures.metrics import METRICS
from lora_fuse.pictures.picture import Levels, Picture
from lora_fuse.studies.sweep import pins
from lora_fuse.studies.sweep.building import baseline
from lora_fuse.studies.sweep.curves import HEIGHT, WIDTH, curve
from lora_fuse.studies.sweep.numbers import against_baseline, broken, curves, failed, mean_of, worse_than_base
from lora_fuse.studies.sweep.points import MERGED, Point, clear_leftovers, key_of
from lora_fuse.studies.sweep.points import METRICS as NUMBERS
from lora_fuse.studies.sweep.recommendation import Recommendation, Tried, largest_undamaged, nearest_to_teacher
from lora_fuse.studies.sweep.running import SweepProgress, run
from lora_fuse.studies.sweep.sheet import CaseRow, Column, Sheet, sheet_html, sheet_json, sheet_markdown
from tests.support.judgements import smooth


def tried(distances: dict[float, float], **more: Any) -> list[Tried]:
    return [Tried(f"fuse.scale={at:g}", "", at, {"latents_l2": found}, **more) for at, found in distances.items()]


def nearest(points: list[Tried], loras: int = 1) -> Recommendation:
    return nearest_to_teacher(points, steps=4, teacher_steps=40, loras=loras)


def test_the_nearest_to_the_teacher_is_recommended_with_both_values() -> None:
    best = nearest(tried({0.6: 0.3, 0.8: 0.2, 1.0: 0.1, 1.2: 0.4}))
    assert (best.label, best.scale, best.value) == ("fuse.scale=1", 1.0, 0.1)
    assert (best.runner_up, best.runner_up_value) == ("fuse.scale=0.8", 0.2)
    assert all(part in best.reason for part in ("4-step", "40 steps", "0.1", "Runner-up: fuse.scale=0.8 with 0.2."))
    assert "edge" not in best.reason
    assert "flat" not in best.reason


@pytest.mark.parametrize(("at", "side"), [(0.6, "below 0.6"), (1.2, "above 1.2")])
def test_the_best_at_the_edge_asks_for_more(at: float, side: str) -> None:
    best = nearest(tried({0.6: 0.3, 0.9: 0.2, 1.2: 0.3} | {at: 0.1}))
    assert best.scale == at
    assert f"sweep further, {side}" in best.reason


def test_a_flat_curve_and_a_tie_are_said() -> None:
    assert "The curve is flat" in nearest(tried({0.6: 0.102, 0.8: 0.1, 1.0: 0.101})).reason
    tie = nearest(tried({0.6: 0.5, 0.8: 0.102, 1.0: 0.1, 1.2: 0.5})).reason
    assert "either will do" in tie
    assert "flat" not in tie
    assert "either will do" in nearest(tried({0.6: 0.9, 0.8: 0.3, 1.0: 0.1, 1.2: 0.5}, floor=0.25)).reason


def test_equal_points_go_to_the_scale_nearest_to_1() -> None:
    assert nearest(tried({0.4: 0.1, 0.8: 0.1, 2.0: 0.1})).scale == 0.8


def test_cases_and_metrics_that_disagree_are_said() -> None:
    points = [
        Tried("a", "", 0.8, {"latents_l2": 0.1, "flip": 0.3}, {"cat": 0.1, "dog": 0.4}),
        Tried("b", "", 1.0, {"latents_l2": 0.2, "flip": 0.2}, {"cat": 0.3, "dog": 0.2}),
    ]
    reason = nearest(points).reason
    assert "nearest at a is cat, at b is dog" in reason
    assert "would take b (0.2, here 0.3)" in reason
    assert "knows the look" in nearest(points, loras=2).reason


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], "No point was built."),
        (tried({1.0: math.nan, 2.0: math.inf}), "None of 2 points could be compared"),
        (tried({1.0: 0.1}, damage=("rabbit: flat.",)), "None of 1 points has sound pictures. fuse.scale=1: rabbit"),
    ],
)
def test_without_a_usable_point_none_is_recommended(points: list[Tried], said: str) -> None:
    best = nearest(points)
    assert (best.label, best.scale, best.value) == (None, None, None)
    assert best.reason.startswith(said)


def test_a_damaged_or_unmeasured_point_is_never_the_nearest() -> None:
    points = [*tried({1.0: 0.2}), *tried({0.5: 0.01}, damage=("broken",)), *tried({0.7: math.nan})]
    assert nearest(points).scale == 1.0


def test_a_lora_that_saves_no_steps_has_no_teacher() -> None:
    with pytest.raises(ValueError, match="not its teacher"):
        nearest_to_teacher(tried({1.0: 0.1}), steps=40, teacher_steps=40)


def test_without_a_teacher_the_largest_undamaged_scale_is_taken() -> None:
    points = [*tried({0.5: 0.1, 2.0: 0.9, 1.0: 0.5}), *tried({3.0: 1.0}, damage=("cat: clipped.",))]
    best = largest_undamaged(points, steps=40)
    assert (best.scale, best.metric) == (2.0, None)
    assert "fuse.scale=3 is damaged: cat: clipped." in best.reason
    assert "sweep further, above 2" in largest_undamaged(points[:3], steps=40).reason
    assert largest_undamaged(points[3:], steps=40).label is None


def noisy(sigma: float) -> Levels:
    noise = np.random.default_rng(0).normal(0, sigma, (128, 128, 3))
    return np.clip(smooth() + noise, 0, 255).astype(np.uint8)


def numbers(merged: Levels, alone: Levels, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"cat.verdict": "drift", "cat.agrees": True, "cat.reasons": "", "weights_passed": True}
    return found | against_baseline("cat", Picture(merged), Picture(alone)) | more


def ruined(how: str) -> Levels:
    grid, burnt = noisy(1), smooth()
    grid[::16] += 20
    burnt[:32] = 255
    washed = (smooth() // 16 + 100).astype(np.uint8)
    return {"noise": noisy(15), "comb": grid, "clipped": burnt, "detail": washed}[how]


@pytest.mark.parametrize("how", ["noise", "comb", "clipped", "detail"])
def test_each_damage_is_found_and_compared_with_the_base(how: str) -> None:
    assert worse_than_base(numbers(smooth(), smooth())) == ()
    assert any(how in sentence for sentence in worse_than_base(numbers(ruined(how), noisy(1))))
    assert not any(how in sentence for sentence in worse_than_base(numbers(ruined(how), ruined(how))))


def test_a_broken_baseline_measures_nothing() -> None:
    assert numbers(smooth(), np.zeros((128, 128, 3), np.uint8))["cat.baseline.flip"] is None
    assert numbers(smooth(), smooth(64))["cat.baseline.flip"] is None
    assert against_baseline("cat", Picture(smooth()), Picture(smooth(), nonfinite=1))["cat.baseline.flip"] is None


def test_a_wrong_merge_fails_and_a_broken_picture_is_a_finding() -> None:
    assert not failed(numbers(smooth(), smooth()))
    assert failed(numbers(smooth(), smooth(), weights_passed=False))
    assert failed(numbers(smooth(), smooth(), **{"cat.agrees": False, "cat.verdict": "regression"}))
    flat = numbers(smooth(), smooth(), **{"cat.agrees": False, "cat.verdict": "invalid", "cat.reasons": "It is flat."})
    assert (failed(flat), broken(flat)) == (False, ("cat: It is flat.",))


def test_a_hard_case_does_not_outvote_the_others() -> None:
    far = {"a.verdict": "", "b.verdict": "", "a.baseline.latents_l2": 0.02, "b.baseline.latents_l2": 2.0}
    assert mean_of(far, "baseline.latents_l2") == pytest.approx(0.2)
    assert mean_of(far | {"b.baseline.latents_l2": None}, "baseline.latents_l2") is None
    assert mean_of(far | {"b.baseline.latents_l2": 0}, "baseline.latents_l2") == pytest.approx((0.02 * 1e-9) ** 0.5)
    assert mean_of({}, "baseline.latents_l2") is None


def test_curves_have_every_metric_that_was_measured() -> None:
    found = curves([numbers(noisy(2), smooth()), numbers(noisy(4), smooth())])
    assert {f"baseline.{name}" for name in METRICS if name != "latents_l2"} <= found.keys()
    assert {"damage.noise", "damage.detail"} <= found.keys()
    assert all(len(values) == 2 for values in found.values())


def test_a_curve_stays_in_its_frame_and_breaks_at_a_gap() -> None:
    drawn = curve("x", {"": [(1.0, 3.0), (0.5, -1e6), (0.7, None), (2.0, 5.0)]}, chosen=1.0)
    assert drawn is not None
    assert all(0 < mark.x < WIDTH and 0 < mark.y < HEIGHT for mark in drawn.lines[0].marks)
    assert len(drawn.lines[0].marks) == 3
    assert len(drawn.lines[0].pieces) == 1
    assert drawn.chosen == drawn.lines[0].marks[1].x
    one = curve("x", {"": [(1.0, 0.0)]})
    assert one is not None
    assert one.x_labels == ((one.lines[0].marks[0].x, "1"),)
    assert curve("x", {"": [(1.0, None)]}) is None
    labels = curve("x", {"": [(at / 10, 1.0) for at in range(100)]})
    assert labels is not None
    assert all(b[0] - a[0] >= 26 for a, b in zip(labels.x_labels, labels.x_labels[1:], strict=False))


def point(folder: Path, name: str = "k") -> Point:
    return Point(f"fuse.scale={name}", key_of({"scale": name}), folder / name)


def make(one: Point) -> str:
    (one.folder / "images").mkdir(parents=True, exist_ok=True)
    (one.folder / "images/cat.merged.png").write_bytes(one.label.encode())
    (one.folder / NUMBERS).write_text(json.dumps({"verdict": "drift"}))
    return "made"


def go(points: list[Point], build: Any = make, *, keep: bool = False) -> tuple[SweepProgress, list[str]]:
    said: list[str] = []
    inputs = {one: {"scale": one.folder.name} for one in points}
    return run(points, build, inputs=inputs, keep=keep, tell=lambda _, line: said.append(line)), said


def test_a_key_is_of_the_values_and_not_of_their_order() -> None:
    assert key_of({"a": 1, "b": [0.5]}) == key_of({"b": [0.5], "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": "1"})}) == 3
    with pytest.raises(ValueError, match="JSON"):
        key_of({"a": math.nan})


@pytest.mark.parametrize("broken", ["images/cat.merged.png", NUMBERS, "point.json"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_point_is_built_once_and_again_if_anything_of_it_is_not_as_it_was(
    tmp_path: Path, broken: str, how: str
) -> None:
    one = point(tmp_path)
    assert (go([one])[0].built, go([one])[0].built) == ([one], [])
    (tmp_path / "k" / broken).unlink() if how == "gone" else (tmp_path / "k" / broken).write_text("{}")
    assert not one.is_done()
    assert go([one])[0].built == [one]


def test_a_record_of_other_inputs_is_not_taken(tmp_path: Path) -> None:
    go([point(tmp_path)])
    assert not Point("", key_of({"scale": "other"}), tmp_path / "k").is_done()


def test_keep_builds_again_what_was_thrown_away(tmp_path: Path) -> None:
    def keeping(one: Point) -> str:
        (one.folder / MERGED).mkdir(parents=True)
        return make(one)

    one = point(tmp_path)
    go([one])
    assert one.is_done()
    assert not one.is_done(keep=True)
    assert go([one], keeping, keep=True)[0].built == [one]
    assert one.is_done(keep=True)


def test_a_refused_point_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    bad, good = point(tmp_path, "bad"), point(tmp_path, "good")

    def build(one: Point) -> str:
        if one == bad:
            raise BadLora("it does not fit")
        return make(one)

    standing, said = go([bad, good], build)
    assert (standing.built, standing.refused) == ([good], {bad: "it does not fit"})
    assert said == ["refused", "made"]
    record = bad.record()
    assert record is not None
    assert record.refused == "it does not fit"
    assert not bad.is_done()


def test_no_room_ends_the_sweep(tmp_path: Path) -> None:
    def full(_: Point) -> str:
        raise NoSpace("full")

    with pytest.raises(NoSpace):
        go([point(tmp_path)], full)
    assert point(tmp_path).record() is None


def test_a_busy_point_is_skipped_and_looked_at_again(tmp_path: Path) -> None:
    first, second = point(tmp_path, "first"), point(tmp_path, "second")
    with exclusive(first.folder):
        standing, _ = go([first, second])
    assert (standing.built, standing.busy) == ([second], [first])
    held = exclusive(second.folder)
    (second.folder / "point.json").unlink()
    held.__enter__()

    def build(one: Point) -> str:  # whoever holds the second one ends without having built it
        held.__exit__(None, None, None)
        return make(one)

    def again(one: Point) -> str:
        return build(one) if one == first else make(one)

    standing, _ = go([second, first], again)
    assert (standing.built, standing.busy) == ([first, second], [])


def test_what_killed_processes_left_is_removed_and_what_is_kept_stays(tmp_path: Path) -> None:
    names = ("mine", "other", "kept", "busy")
    for name in names:
        (tmp_path / name / MERGED).mkdir(parents=True)
        (tmp_path / name / f".{MERGED}.partial-0").mkdir()
    kept = point(tmp_path, "kept")
    make(kept)
    kept.finish({"scale": "kept"}, kept=True)
    with exclusive(tmp_path / "busy"):
        clear_leftovers(tmp_path, [point(tmp_path, "mine")])
    left = {name: sorted(path.name for path in (tmp_path / name).glob("*merged*")) for name in names}
    both = [f".{MERGED}.partial-0", MERGED]
    assert left == {"mine": both[:1], "other": [], "kept": both, "busy": both}


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(space, "free_bytes", lambda _: 99)
    pins.check_room(40, 59, tmp_path)
    with pytest.raises(NoSpace, match=r"100 bytes.*99 bytes"):
        pins.check_room(40, 60, tmp_path)


def test_the_base_is_rendered_once_and_again_if_a_picture_is_not_as_it_was(tmp_path: Path) -> None:
    from lora_fuse.pictures.cases import Case
    from lora_fuse.pictures.picture import Rendered
    from lora_fuse.pictures.render_progress import Cost

    rendered: list[int] = []

    def render() -> list[Rendered]:
        rendered.append(1)
        latents = np.ones((1, 4), np.float32)
        return [Rendered(smooth(), sigmas=(1.0, 0.0), latents=latents, cost=Cost(1.0, None, None, 1))]

    cases = [Case("cat", "a cat", 0)]
    for _ in range(2):
        found = baseline(tmp_path / "b", cases, render)["cat"]
        assert (found.levels == smooth()).all()
        assert found.latents is not None
        assert found.latents.tolist() == [[1, 1, 1, 1]]
    assert len(rendered) == 1
    (tmp_path / "b/cat.npz").write_bytes(b"")
    baseline(tmp_path / "b", cases, render)
    assert len(rendered) == 2


def test_the_sheet_escapes_what_it_shows_and_asks_nobody_for_anything() -> None:
    metrics = numbers(noisy(2), smooth()) | {"verdict": "drift", "cat.agrees": True}
    columns = (
        Column("fuse.scale=1", "", 1.0, "k1", metrics),
        Column("fuse.scale=2", "", 2.0, "k2", metrics, damage=("cat: <b>noise</b>",)),
        Column("fuse.scale=3", "", 3.0, "k3", refused="no | <i>room</i>"),
    )
    best = largest_undamaged(tried({1.0: 0.1}), steps=40)
    rows = (CaseRow("cat", "<script>alert(1)</script>", (), None),)
    sheet = Sheet(
        "r", "python -m stages.sweep x=1,2", "4 steps", "40 steps", "cpu", best, columns, rows, curves([metrics] * 2)
    )
    page = sheet_html(sheet)
    assert "<script" not in page
    assert "<b>noise</b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert ">scale=1<br>" in page
    assert page.count("<svg") == len(curves([metrics]))
    content = json.loads(sheet_json(sheet))
    assert [one["refused"] for one in content["points"]] == [None, None, "no | <i>room</i>"]
    assert content["recommendation"]["label"] == "fuse.scale=1"
    table = [line for line in sheet_markdown(sheet).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
