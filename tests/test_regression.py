"""Laws of the regression run: real pocket pipelines, text to image because that is fastest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import RenderFailed
from lora_fuse.export import diffusers_files
from lora_fuse.golden import Limits, Verdict
from lora_fuse.lora import LoraInput
from lora_fuse.merge import write_merged
from lora_fuse.metrics import to_levels
from lora_fuse.plan import make_plan
from lora_fuse.regression import Pair, Setup, judge_pairs, render_pairs, save_pictures
from lora_fuse.render import Case, Sampling
from stages.config import compose

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "pocket/model"
LORA = ROOT / "pocket/lora/pocket-lightning-4steps-v2.safetensors"
CASES = [Case("one", "a purple rabbit", 0, height=128, width=128), Case("two", "a blue bear", 1, height=128, width=96)]
LIMITS = {"unfused": Limits(60, 4), "golden": Limits(54, 6)}  # conf/regress/_pocket.yaml


def merge(out: Path, scale: float, scheduler: dict[str, object]) -> Path:
    plan = make_plan(open_checkpoint(BASE), [LoraInput("l", LORA, scale)])
    generated = diffusers_files(BASE, pipeline="QwenImagePipeline", scheduler=scheduler)
    write_merged(plan, out, device="cpu", generated=generated, known={}, progress=lambda _: None)
    return out


@pytest.fixture(scope="module")
def setup() -> Setup:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        scheduler = compose()["scheduler"]
    return Setup("QwenImagePipeline", Sampling(4, 1.0, " "), scheduler, "cpu", "float32")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, setup: Setup) -> list[Pair]:
    merged = merge(tmp_path_factory.mktemp("merge") / "merged", 1.0, dict(setup.scheduler))
    with_baseline = replace(setup, baseline=Sampling(6, 4.0, " "))
    return render_pairs(merged, BASE, [LoraInput("l", LORA, 1.0)], CASES, with_baseline)


def test_merged_and_unfused_agree_and_visit_the_recipe_s_sigmas(pairs: list[Pair], tmp_path: Path) -> None:
    assert [case.result.verdict for case in judge_pairs(pairs, tmp_path, LIMITS)] == [Verdict.NO_GOLDEN] * 2
    assert pairs[0].merged.sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert [pair.merged.image.size for pair in pairs] == [(128, 128), (96, 128)]


def test_the_base_alone_runs_at_its_own_steps_and_scheduler_without_the_lora(pairs: list[Pair]) -> None:
    alone = pairs[0].baseline
    assert alone is not None
    assert len(alone.sigmas) == 7
    assert alone.sigmas[-2] == pytest.approx(0.02)  # the base's shift_terminal
    assert np.abs(to_levels(alone.image).astype(int) - to_levels(pairs[0].merged.image)).max() > 30


def test_a_run_is_exact_against_its_own_approved_pictures(pairs: list[Pair], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "of-an-earlier-run.png").write_bytes(b"")
    save_pictures(judge_pairs(pairs, tmp_path, LIMITS), images)
    assert sorted(path.name for path in images.iterdir()) == sorted(
        f"{pair.case.name}.{side}.png" for pair in pairs for side in ("merged", "unfused", "baseline")
    )
    for pair in pairs:
        (images / f"{pair.case.name}.merged.png").rename(tmp_path / f"{pair.case.name}.png")
    assert [case.result.verdict for case in judge_pairs(pairs, tmp_path, LIMITS)] == [Verdict.EXACT] * 2


@pytest.mark.parametrize(("scale", "own_scheduler"), [(0.9, False), (0.0, False), (2.0, False), (1.0, True)])
def test_a_merge_at_another_scale_or_with_the_base_s_scheduler_is_a_regression(
    tmp_path: Path, setup: Setup, scale: float, own_scheduler: bool
) -> None:
    merged = merge(tmp_path / "merged", scale, {} if own_scheduler else dict(setup.scheduler))
    wrong = render_pairs(merged, BASE, [LoraInput("l", LORA, 1.0)], CASES[:1], setup)
    (judged,) = judge_pairs(wrong, tmp_path, LIMITS)
    assert judged.result.verdict is Verdict.REGRESSION
    assert "unfused picture" in judged.result.reasons[0]


def test_a_golden_that_is_no_picture_is_refused(pairs: list[Pair], tmp_path: Path) -> None:
    (tmp_path / "one.png").write_text("a git-lfs pointer")
    with pytest.raises(RenderFailed, match=r"golden .*one\.png cannot be read"):
        judge_pairs(pairs, tmp_path, LIMITS)
