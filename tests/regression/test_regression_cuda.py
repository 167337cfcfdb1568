"""Laws of the regression on a GPU, in bfloat16 as the real models run. Skipped where there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_fuse.errors import OutOfMemory
from lora_fuse.pictures.environment import environment, make_deterministic
from lora_fuse.pictures.pairs import Pair, render_pairs
from lora_fuse.pictures.picture import Latents
from lora_fuse.regression.case_judgement import judge_pairs
from lora_fuse.regression.verdicts import Limits, Rules, Verdict
from tests.support.on_gpu import CASES, SETUP, merge, plan

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

RULES = Rules(Limits({"psnr_db": 38}), Limits({"psnr_db": 38}), 2.0, (1.0, 0.9, 0.75, 0.5))
OFFLOADED = ["model_offload", "group_offload", "balanced"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_deterministic(on_gpu=True)
    return merge(tmp_path_factory.mktemp("merge") / "merged")


@pytest.fixture(scope="module")
def pairs(merged: Path) -> list[Pair]:
    return render_pairs(merged, plan(), CASES, SETUP)


def verdict(pairs: list[Pair]) -> Verdict:
    return judge_pairs(pairs, {}, RULES)[0].result.verdict


def latents(pairs: list[Pair]) -> list[Latents]:
    return [side.latents for pair in pairs for side in (pair.merged, pair.unfused, pair.floor)]


def test_merged_and_unfused_agree(pairs: list[Pair]) -> None:
    assert verdict(pairs) is Verdict.NO_GOLDEN  # which leaves the first two gates passed
    assert pairs[0].merged.cost.peak_gpu_bytes


def test_the_same_run_twice_is_the_same_to_the_bit(merged: Path, pairs: list[Pair]) -> None:
    again = render_pairs(merged, plan(), CASES, SETUP)
    assert all((one == other).all() for one, other in zip(latents(pairs), latents(again), strict=True))


@pytest.mark.parametrize("scale", [0.5, 0.9])
def test_another_scale_is_a_regression(tmp_path: Path, scale: float) -> None:
    assert verdict(render_pairs(merge(tmp_path / "m", scale), plan(), CASES, SETUP)) is Verdict.REGRESSION


@pytest.mark.parametrize("placement", OFFLOADED)
def test_a_model_that_is_offloaded_or_spread_gives_the_same_pictures(
    merged: Path, pairs: list[Pair], placement: str
) -> None:
    elsewhere = render_pairs(merged, plan(), CASES, replace(SETUP, placement=placement))
    assert verdict(elsewhere) is Verdict.NO_GOLDEN
    one, other = (side[0].merged.levels.astype(int) for side in (pairs, elsewhere))
    assert np.abs(one - other).max() == 0


def test_a_gpu_that_is_too_small_is_told_which_placement_to_try(merged: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(OutOfMemory, match=r"placement cuda: set it to balanced .* or model_offload"):
            render_pairs(merged, plan(), CASES, SETUP)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_key_has_the_compute_capability_and_no_threads() -> None:
    key = environment("cuda", "bfloat16").key
    assert str(key).startswith("cuda-sm")
    assert "threads" not in str(key)
