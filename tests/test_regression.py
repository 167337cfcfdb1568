"""Laws of the regression run: real pocket pipelines, text to image because that is fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import RenderFailed
from lora_fuse.export import diffusers_files
from lora_fuse.lora import LoraInput
from lora_fuse.merge import write_merged
from lora_fuse.plan import Plan, make_plan
from lora_fuse.regression.metrics import to_levels
from lora_fuse.regression.pairs import Pair, Setup, judge_pairs, render_pairs, save_pictures
from lora_fuse.regression.render import Case, Sampling, load_pipeline, render
from lora_fuse.regression.unfused import DIFFUSERS, attach_differences
from lora_fuse.regression.verdicts import Limits, Verdict
from lora_fuse.selection import Selection
from stages.config import compose

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "pocket/model"
LORA = ROOT / "pocket/lora/pocket-lightning-4steps-v2.safetensors"
CASES = [Case("one", "a purple rabbit", 0, height=128, width=128), Case("two", "a blue bear", 1, height=128, width=96)]
Array = npt.NDArray[Any]
LIMITS = {  # conf/regress/_pocket.yaml
    "unfused": Limits({"psnr_db": 60, "max_abs": 4}),
    "golden": Limits({"psnr_db": 54, "max_abs": 6}),
}


def plan(scale: float, lora: Path = LORA, selection: Selection | None = None) -> Plan:
    return make_plan(open_checkpoint(BASE), [LoraInput("l", lora, scale)], selection)


def merge(out: Path, what: Plan, scheduler: Mapping[str, object]) -> Path:
    generated = diffusers_files(BASE, pipeline="QwenImagePipeline", scheduler=dict(scheduler))
    write_merged(what, out, device="cpu", generated=generated, known={}, progress=lambda _: None)
    return out


@pytest.fixture(scope="module")
def setup() -> Setup:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        scheduler = compose()["scheduler"]
    return Setup("QwenImagePipeline", Sampling(4, 1.0, " "), scheduler, "cpu", "float32")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, setup: Setup) -> list[Pair]:
    merged = merge(tmp_path_factory.mktemp("merge") / "merged", plan(1.0), setup.scheduler)
    with_baseline = replace(setup, baseline=Sampling(6, 4.0, " "))
    return render_pairs(merged, plan(1.0), CASES, with_baseline)


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
    merged = merge(tmp_path / "merged", plan(scale), {} if own_scheduler else setup.scheduler)
    wrong = render_pairs(merged, plan(1.0), CASES[:1], setup)
    (judged,) = judge_pairs(wrong, tmp_path, LIMITS)
    assert judged.result.verdict is Verdict.REGRESSION
    assert "unfused picture" in judged.result.reasons[0]


def test_a_golden_that_is_no_picture_is_refused(pairs: list[Pair], tmp_path: Path) -> None:
    (tmp_path / "one.png").write_text("a git-lfs pointer")
    with pytest.raises(RenderFailed, match=r"golden .*one\.png cannot be read"):
        judge_pairs(pairs, tmp_path, LIMITS)


def other_lora(path: Path, kind: str) -> Path:
    """A LoRA of a kind that diffusers does not read, for some modules of pocket's transformer."""
    rng, weights = np.random.default_rng(5), load_file(next((BASE / "transformer").glob("*00001*.safetensors")))

    def random(*shape: int) -> Array:
        return (rng.standard_normal(shape) / 4).astype(np.float32)

    state: dict[str, Array] = {}
    for name in ("attn.to_q", "attn.to_out.0", "img_mlp.net.2"):
        module = f"transformer_blocks.0.{name}"
        weight = weights[f"{module}.weight"].astype(np.float32)
        rows, columns = weight.shape
        parts: dict[str, Array]
        match kind:
            case "LoHa":
                shapes = {"w1_a": (rows, 4), "w1_b": (4, columns), "w2_a": (rows, 4), "w2_b": (4, columns)}
                parts = {f"hada_{end}": random(*shape) for end, shape in shapes.items()}
            case "LoKr":
                shapes = {"w1": (4, 4), "w2_a": (rows // 4, 2), "w2_b": (2, columns // 4)}
                parts = {f"lokr_{end}": random(*shape) for end, shape in shapes.items()}
            case "diff":
                parts = {"diff": random(rows, columns) / 8, "diff_b": random(rows) / 4}
            case _:
                lengths = np.linalg.norm(weight, axis=1)[:, None]
                parts = {"lora_down.weight": random(4, columns), "lora_up.weight": random(rows, 4) / 8}
                parts["dora_scale"] = (lengths * 1.1).astype(np.float32)
        state |= {f"{module}.{end}": tensor for end, tensor in parts.items()}
    if kind == "diff":
        state["transformer_blocks.0.attn.norm_q.diff"] = random(
            *weights["transformer_blocks.0.attn.norm_q.weight"].shape
        )
    save_file(state, path)
    return path


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "diff", "DoRA"])
def test_what_diffusers_cannot_read_is_put_beside_the_base_here(tmp_path: Path, setup: Setup, kind: str) -> None:
    lora = other_lora(tmp_path / "other.safetensors", kind)
    merged, wrong = (merge(tmp_path / f"{scale}", plan(scale, lora), setup.scheduler) for scale in (1.0, 0.7))
    (pair,) = render_pairs(merged, plan(1.0, lora), CASES[:1], setup)
    assert "diffusers does not read" in pair.unfused_by
    assert judge_pairs([pair], tmp_path, LIMITS)[0].result.verdict is Verdict.NO_GOLDEN
    regressed = judge_pairs(render_pairs(wrong, plan(1.0, lora), CASES[:1], setup), tmp_path, LIMITS)
    assert regressed[0].result.verdict is Verdict.REGRESSION


def test_modules_that_are_left_out_or_scaled_are_so_beside_the_base_too(tmp_path: Path, setup: Setup) -> None:
    selection = Selection(skip=("*.img_mlp.*",), scales={"*.attn.*": 0.5})
    chosen = plan(1.0, selection=selection)
    (pair,) = render_pairs(merge(tmp_path / "merged", chosen, setup.scheduler), chosen, CASES[:1], setup)
    assert "leaves modules out" in pair.unfused_by
    assert judge_pairs([pair], tmp_path, LIMITS)[0].result.verdict is Verdict.NO_GOLDEN
    (other,) = render_pairs(tmp_path / "merged", plan(1.0), CASES[:1], setup)
    assert judge_pairs([other], tmp_path, LIMITS)[0].result.verdict is Verdict.REGRESSION


def test_the_differences_here_draw_what_diffusers_draws(pairs: list[Pair], setup: Setup) -> None:
    """The two ways to put a LoRA beside a base, against each other; and taking it off leaves the base."""
    pipe = load_pipeline(BASE, setup.pipeline, device="cpu", dtype="float32", scheduler=setup.scheduler)
    before = to_levels(render(pipe, CASES[0], setup.sampling).image)
    detach = attach_differences(pipe.transformer, plan(1.0).targets)
    ours = to_levels(render(pipe, CASES[0], setup.sampling).image).astype(int)
    detach()
    assert np.abs(ours - to_levels(pairs[0].unfused.image)).max() <= 1
    assert pairs[0].unfused_by == DIFFUSERS
    assert np.array_equal(to_levels(render(pipe, CASES[0], setup.sampling).image), before)
