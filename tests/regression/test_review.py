"""From a run to its report: costs, what changed, what comes next."""

import dataclasses
import html
import json
from pathlib import Path

import pytest

from lora_fuse.pictures import encode
from lora_fuse.pictures.cases import Case, Sampling
from lora_fuse.pictures.pairs import Pair, Setup
from lora_fuse.pictures.picture import Levels, Picture, Rendered
from lora_fuse.pictures.render_progress import Cost
from lora_fuse.recipe.paths import Artifacts
from lora_fuse.recipe.records import Lock, Manifest
from lora_fuse.regression.candidates import Candidate, Candidates
from lora_fuse.regression.case_judgement import JudgedPair, examine
from lora_fuse.regression.goldens import Approved, GoldenRecord
from lora_fuse.regression.report import report_html
from lora_fuse.regression.review import Judged, block_changes, case_rows, review, run_metrics
from lora_fuse.regression.run import write_regression
from stages.config import load
from tests.support.approved import APPROVAL, PROVENANCE, candidate, run_record
from tests.support.kills import kill_at_every_step
from tests.support.reports import RULES, latents, scene


def test_a_block_s_change_is_the_largest_of_its_weights_and_blocks_are_in_the_model_s_order() -> None:
    names = {"blocks.10.a": 0.3, "blocks.2.a": 0.1, "blocks.2.b.weight": 0.2, "proj_out.weight": 0.4}
    changes = {name: {"relative_norm": norm} for name, norm in names.items()}
    found = [(block.block, block.relative_norm) for block in block_changes(changes)]
    assert found == [("2", 0.2), ("10", 0.3), ("proj_out", 0.4)]


def run_of(merged: Levels, golden: Levels | None) -> Judged:
    """A case of a run, its candidate and its golden, approved when the LoRA had another scale."""

    def side(noise: float) -> Rendered:
        return Rendered(merged, sigmas=(1.0, 0.5, 0.0), latents=latents(noise), cost=Cost(0.5, 8.0, None, 2**30))

    then = dataclasses.replace(PROVENANCE, loras=(dataclasses.replace(PROVENANCE.loras[0], scale=0.9),))
    approved = GoldenRecord(1, "f" * 64, {}, APPROVAL, then)
    goldens = [] if golden is None else [Approved(golden, name="good.png", record=approved, path=Path("good.json"))]
    pair = Pair(Case("good", "x", 0), side(0.001), side(0.0), side(0.001), "diffusers")
    sides = [Picture(merged, latents=one.latents) for one in (pair.merged, pair.unfused, pair.floor)]
    result = examine(Case("good", "x", 0), sides[0], sides[1], goldens, RULES, sides[2])
    found: Candidate = candidate(encode.png(merged), "good")
    cases, record = [JudgedPair(pair, result)], Candidates(1, "m", {"good": found})
    run = run_record()
    metrics = run_metrics(cases, record, run.environment.key, 1.0)
    return Judged(MANIFEST, cases, record, run, metrics)


MANIFEST = Manifest(1, "pocket", Lock(None, "p", None, None, {}), PROVENANCE.loras, 1.0, 1, {})
VERIFY = {"passed": True, "targets": 1, "rows_checked": 1, "rows_total": 1, "problems": [], "changes": {}}
NEXT = "the next step"
SETUP = Setup("QwenImagePipeline", Sampling(2, 1.0, " "), {"base_shift": 1.1}, "cpu", "float32")


def test_a_run_s_page_says_what_it_cost_what_comes_next_and_what_changed() -> None:
    judged = run_of(scene(), scene())
    page = report_html(review(judged, VERIFY, RULES, SETUP, NEXT))
    text = html.unescape(page)
    assert "LoRA lightning has scale 1, had 0.9" in text
    assert "0.50 s, 8.00 steps/s, 1.00 GiB of host memory" in text
    assert f"next: {NEXT}" in text
    assert str(PROVENANCE.environment.key) in text
    assert "base_shift 1.1" in text


def test_a_large_picture_is_shown_smaller_in_bytes_and_the_same_in_size() -> None:
    judged = run_of(scene(0, 520, 24), None)
    report = review(judged, VERIFY, RULES, SETUP, NEXT)
    assert report.cases[0].merged.kind == "image/webp"
    assert "data:image/webp;base64," in report_html(report)
    assert (report.cases[0].golden, report.cases[0].changed) == (None, None)


def test_a_run_s_metrics_are_flat_json_without_what_it_took_and_rows_for_plots() -> None:
    metrics = run_of(scene(), scene()).metrics
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert not [key for key in metrics if key.startswith("good.") and "seconds" in key]
    assert (metrics["recipe"], metrics["environment"]) == ("pocket", str(PROVENANCE.environment.key))
    (row,) = case_rows(metrics)
    assert (row["case"], row["verdict"]) == ("good", "exact")
    assert row["over_floor"] == pytest.approx(1)


def test_the_page_names_no_file_of_this_machine() -> None:
    judged = run_of(scene(), scene())
    page = report_html(review(judged, VERIFY, RULES, SETUP, NEXT))
    assert str(Path.cwd()) not in page
    assert str(Path.home()) not in page or str(Path.home()) == "/"


def test_a_kill_at_any_step_leaves_all_of_the_last_run_or_all_of_this_one(tmp_path: Path) -> None:
    at = Artifacts(tmp_path)
    recipe = load(["recipe=pocket"])
    files = (at.candidates, at.metrics, at.run, at.cases, at.blocks, at.report)

    def write(merged: Levels) -> None:
        write_regression(recipe, at, SETUP, run_of(merged, None), VERIFY, lambda _: NEXT)

    def content() -> dict[str, bytes]:
        run = {**json.loads(at.run.read_text()), "seconds": {}}  # which are those of each attempt
        found = {path.name: path.read_bytes() for path in (*files, *at.images.iterdir())}
        return {**found, at.run.name: json.dumps(run).encode()}

    write(scene(0))
    old = content()
    seen = []
    assert kill_at_every_step(lambda: write(scene(1)), tmp_path, lambda: seen.append(content())) > 8
    assert seen[0] == old
    assert all(one in (old, seen[-1]) for one in seen)
    assert {name for name, content in old.items() if content != seen[-1][name]} >= {"candidates.json", "report.html"}
