"""Laws of the regression on a GPU, in bfloat16 as the real models run. Skipped where there is none."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_fuse.errors import OutOfMemory
from lora_fuse.exports.reading import read_export
from lora_fuse.pictures.environment import environment, make_deterministic
from lora_fuse.pictures.pairs import BaseSides, MergedSides, Pair, render_all, render_merged, render_pairs, share
from lora_fuse.pictures.picture import Latents
from lora_fuse.pictures.render import load_pipeline
from lora_fuse.regression.case_judgement import judge_pairs
from lora_fuse.regression.verdicts import Limits, Rules, Verdict
from tests.support.on_gpu import CASES, SETUP, merge, plan

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

RULES = Rules(Limits({"psnr_db": 38}), Limits({"psnr_db": 38}), 2.0, (1.0, 0.9, 0.75, 0.5))
OFFLOADED = ["model_offload", "group_offload", "balanced"]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_deterministic()
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


@pytest.mark.parametrize(
    ("dtype", "attention", "backend"),
    [
        ("bfloat16", "flash", SDPBackend.FLASH_ATTENTION),
        ("float32", "", SDPBackend.EFFICIENT_ATTENTION),
    ],
)
def test_three_renders_give_the_same_bits_by_the_attention_that_the_key_names(
    merged: Path, dtype: str, attention: str, backend: SDPBackend
) -> None:
    """In the third one the transformer has no other."""
    assert environment("cuda", dtype).key.attention == attention
    setup = replace(SETUP, dtype=dtype)
    shared = share(merged, CASES, setup)
    first, second = (render_merged(merged, CASES, setup, shared)[0] for _ in range(2))
    pipe = load_pipeline(merged, setup.pipeline, dtype=dtype, shared=shared.parts, device="cuda")
    alone = ExitStack()

    def allow_one(*_: object) -> None:
        alone.enter_context(sdpa_kernel(backend))

    pipe.transformer.register_forward_pre_hook(allow_one)
    pipe.transformer.register_forward_hook(lambda *_: alone.close())
    (third,) = render_all(pipe, CASES, setup.sampling, "cuda", shared=shared)
    assert (first.latents == second.latents).all()
    assert (first.latents == third.latents).all()


def test_weights_go_straight_to_the_gpu_and_are_those_of_the_files(merged: Path) -> None:
    straight, plain = (load_pipeline(merged, SETUP.pipeline, dtype=SETUP.dtype, device=one) for one in ("cuda", "cpu"))
    for name in ("text_encoder", "transformer", "vae"):
        state, expected = (getattr(pipe, name).state_dict() for pipe in (straight, plain))
        assert state.keys() == expected.keys()
        assert all(tensor.is_cuda and torch.equal(tensor.cpu(), expected[key]) for key, tensor in state.items())


def test_loras_come_and_go_beside_a_base_that_is_loaded_once(merged: Path, pairs: list[Pair]) -> None:
    sides = BaseSides(plan().checkpoint.root, CASES, SETUP, share(merged, CASES, SETUP))
    (plain,) = sides.beside(None, "without")
    (beside,) = sides.beside(plan(), "beside")
    (again,) = sides.beside(None, "again")
    assert (again.latents == plain.latents).all()
    assert (beside.latents == pairs[0].unfused.latents).all()
    assert (beside.latents != plain.latents).any()


@pytest.mark.parametrize("changes", [{}, {"compiled": True}, *({"placement": one} for one in OFFLOADED)])
def test_an_export_s_weights_act_wherever_the_transformer_lies(merged: Path, changes: dict[str, object]) -> None:
    """Weights of another scale make that scale's picture, and the merged ones bring back the merged picture."""
    setup = replace(SETUP, **changes)  # type: ignore[arg-type]
    sides = MergedSides(merged, CASES, setup, share(merged, CASES, setup))
    (first,) = sides.merged()
    shards = sorted((merged / "transformer").glob("*.safetensors"))
    stored = {name: values for shard in shards for name, values in read_export(shard)}
    halved = {name: values * np.float32(0.5) if "img_mlp" in name else values for name, values in stored.items()}
    (other,) = sides.exported("halved", halved.items())
    (again,) = sides.exported("same", stored.items())
    assert (again.latents == first.latents).all()
    assert (other.latents != first.latents).any()


def test_compiled_blocks_give_the_same_bits_whatever_size_comes_first(merged: Path) -> None:
    compiled = replace(SETUP, compiled=True)
    cases = [*CASES, replace(CASES[0], name="small", height=96, width=64)]
    rendered = render_pairs(merged, plan(), cases, compiled)
    assert verdict(rendered) is Verdict.NO_GOLDEN
    torch.compiler.reset()
    backwards = render_merged(merged, cases[::-1], compiled, share(merged, cases, compiled))[::-1]
    for pair, again in zip(rendered, backwards, strict=True):
        assert (pair.merged.latents == again.latents).all()


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
