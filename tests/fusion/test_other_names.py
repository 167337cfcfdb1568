"""Laws of a LoRA in other names than its base: every row goes where diffusers' converter of checkpoints takes it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.errors import BadLora, ShapeMismatch, UnmatchedTargets
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora import LoraInput
from lora_fuse.verification import Expectation, verify_merge
from tests.support import tiny
from tests.support.key_styles import ALGORITHMS, Tensors, X, merged, update_of
from tests.support.original_names import (
    FAMILY_OF,
    differences,
    diffusers_names,
    family_of,
    original,
    random_lora,
    spelt,
    total,
    weights,
)


def assert_close(made: Tensors, wanted: Tensors) -> None:
    """Every value is the sum in float64, rounded once to float32."""
    assert made.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(made[name], values, rtol=2.0**-24, atol=1e-300, err_msg=name)


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_lora_in_original_names_goes_into_a_base_of_diffusers(name: str, tmp_path: Path) -> None:
    family = family_of(name)
    base = weights(name)
    theirs = original(family, base)
    assert_close(diffusers_names(family, theirs), base)
    factors, deltas = random_lora(theirs)
    wanted = diffusers_names(family, total(theirs, deltas))
    assert_close(merged(tmp_path / "dotted", spelt(factors, "diffusion_model."), base=base), wanted)
    assert_close(merged(tmp_path / "flat", spelt(factors, "lora_unet_", flat=True), base=base), wanted)


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_lora_in_the_names_of_diffusers_goes_into_an_original_base(name: str, tmp_path: Path) -> None:
    family = family_of(name)
    base = weights(name)
    theirs = original(family, base)
    factors, deltas = random_lora(base)
    wanted = total(base, deltas)
    made = merged(tmp_path / "dotted", spelt(factors, "transformer."), base=theirs)
    assert_close(diffusers_names(family, made), wanted)
    made = merged(tmp_path / "flat", spelt(factors, "lora_transformer_", flat=True), base=theirs)
    assert_close(diffusers_names(family, made), wanted)


@pytest.mark.parametrize("name", FAMILY_OF)
def test_norms_biases_modulations_and_tokens_follow_too(name: str, tmp_path: Path) -> None:
    family = family_of(name)
    base = weights(name)
    theirs = original(family, base)
    keys, deltas = differences(theirs, "diffusion_model.")
    wanted = diffusers_names(family, total(theirs, deltas))
    assert_close(merged(tmp_path / "original", keys, base=base), wanted)
    keys, deltas = differences(base, "")
    made = merged(tmp_path / "diffusers", keys, base=theirs)
    assert_close(diffusers_names(family, made), total(base, deltas))


def test_norms_of_lycoris_are_differences_and_a_set_weight_takes_the_base_s_place(tmp_path: Path) -> None:
    norm = "transformer_blocks.0.attn.norm_q.weight"
    base: Tensors = {f"norm.{part}": np.ones(4, tiny.BF16) for part in ("weight", "bias")}
    base[norm] = np.full(8, 3.1, tiny.BF16)
    lora: Tensors = {"lycoris_norm.w_norm": np.arange(4.0), "lycoris_norm.b_norm": np.full(4, 2.0)}
    replacement = {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight": np.full(8, 1.0078125)}
    made = merged(tmp_path / "a", lora, base=base)
    assert {key: made[key].astype(float).tolist() for key in made} == {
        norm: base[norm].astype(float).tolist(),
        "norm.weight": [1, 2, 3, 4],
        "norm.bias": [3.0] * 4,
    }
    made = merged(tmp_path / "b", replacement, base=base)
    assert made[norm].astype(float).tolist() == [1.0078125] * 8
    with pytest.raises(BadLora, match=r"\(set_weight\), which has no strength, and the scale is 0\.5"):
        merged(tmp_path / "c", replacement, 0.5, base=base)
    with pytest.raises(BadLora, match=r"both mean the base's 'transformer_blocks.*and add other values"):
        merged(tmp_path / "d", replacement | {"transformer_blocks.0.attn.norm_q.diff": np.ones(8)}, base=base)


FUSED = "double_blocks.0.img_attn.qkv"
SPLIT = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
OF_A_MATRIX = [name for name, row in ALGORITHMS.items() if row[0] == f"{X}.weight"]


@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_every_algorithm_is_cut_by_rows_of_its_product(name: str, tmp_path: Path) -> None:
    _, parts, formula = update_of(name)
    weight = tiny.weights(np.float32)[f"{X}.weight"]
    base: Tensors = {f"{one}.weight": part for one, part in zip(SPLIT, np.split(weight, 3), strict=True)}
    lora = {f"{FUSED}.{end}": np.asarray(part) for end, part in parts.items()}
    scale = lora.get(f"{FUSED}.dora_scale", np.zeros(0))
    if scale.shape == (1, 16):
        with pytest.raises(BadLora, match=r"has a length for each column \(dora_scale\) of a matrix that the base has"):
            merged(tmp_path / "cut", lora, base=base)
        return
    wide = {end: np.asarray(part).astype(np.float64) for end, part in parts.items()}
    wanted = formula(wide, weight.astype(np.float64), 1.0)
    made = merged(tmp_path / "cut", lora, base=base)
    found = np.concatenate([made[f"{one}.weight"] for one in SPLIT])
    np.testing.assert_allclose(found, wanted, rtol=2.0**-23, atol=1e-7)

    joined: Tensors = {f"{FUSED}.weight": np.concatenate([weight + 1, weight, weight + 2])}
    made = merged(
        tmp_path / "joined", {f"{SPLIT[1]}.{end}": np.asarray(part) for end, part in parts.items()}, base=joined
    )
    np.testing.assert_allclose(made[f"{FUSED}.weight"][24:48], wanted, rtol=2.0**-23, atol=1e-7)
    for rows in (slice(24), slice(48, 72)):
        np.testing.assert_array_equal(made[f"{FUSED}.weight"][rows], joined[f"{FUSED}.weight"][rows])


def test_verification_sees_rows_that_lie_one_too_far_and_halves_that_are_not_swapped(tmp_path: Path) -> None:
    names = {SPLIT[0]: (300, 8), SPLIT[1]: (300, 8), SPLIT[2]: (300, 8), "norm_out.linear": (400, 8)}
    base: Tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in names.items()}
    theirs = {f"{FUSED}.weight": np.ones((900, 8)), "final_layer.adaLN_modulation.1.weight": np.ones((400, 8))}
    factors, _ = random_lora(theirs)
    made = merged(tmp_path, spelt(factors, ""), base=base)
    lora = [LoraInput("l", tmp_path / "l.safetensors", 1.0)]
    moved = np.concatenate([made[f"{name}.weight"] for name in SPLIT])
    moved[300] = moved[301]  # the first row of to_k
    late = made | {f"{name}.weight": part for name, part in zip(SPLIT, np.split(moved, 3), strict=True)}
    unswapped = made | {"norm_out.linear.weight": np.roll(made["norm_out.linear.weight"], 200, axis=0)}
    for number, wrong in enumerate((late, unswapped)):
        out = tiny.write_component(tmp_path / f"wrong{number}", wrong)
        found = verify_merge(out, tmp_path / "base", lora, component="", rows=4, expected=Expectation(), seed=1)
        assert [text.partition(":")[0] for text in found.problems] == [
            f"{SPLIT[1]}.weight" if number == 0 else "norm_out.linear.weight"
        ]


def test_what_is_of_another_size_is_refused(tmp_path: Path) -> None:
    base: Tensors = {f"{name}.weight": np.ones((8, 8), np.float32) for name in SPLIT}
    long, _ = random_lora({f"{FUSED}.weight": np.ones((27, 8))})
    with pytest.raises(ShapeMismatch, match=r"gives a 27x8 delta, and the rows of the base's .* are 24x8"):
        merged(tmp_path / "a", long, base=base)
    part, _ = random_lora({f"{SPLIT[0]}.weight": np.ones((8, 8))})
    with pytest.raises(ShapeMismatch, match=r"has 25 rows, which are to be cut 1:1:1"):
        merged(tmp_path / "b", part, base={f"{FUSED}.weight": np.ones((25, 8), np.float32)})
    whole, _ = random_lora({f"{FUSED}.weight": np.ones((24, 8))})
    with pytest.raises(UnmatchedTargets, match=r"1 of 1 modules are not in the base"):
        merged(tmp_path / "c", whole, base={name: base[name] for name in list(base)[:2]})


def both_spellings(seed: int = 4) -> tuple[Tensors, Tensors]:
    """A fused module's factors, and those of the three that it is: what some write beside each other."""
    fused = "layers.0.attention.qkv"
    factors, _ = random_lora({f"{fused}.weight": np.ones((24, 8))}, seed)
    up = np.split(factors[f"{fused}.lora_up.weight"], 3)
    split: Tensors = {}
    for part, rows in zip("qkv", up, strict=True):
        module = f"layers.0.attention.to.{part}"
        split |= {f"{module}.lora_up.weight": rows, f"{module}.alpha": np.array(1.0)}
        split[f"{module}.lora_down.weight"] = factors[f"{fused}.lora_down.weight"]
    return factors, split


@pytest.mark.parametrize("names", [["to_q", "to_k", "to_v"], ["qkv"]], ids=["diffusers", "original"])
def test_a_module_in_both_spellings_counts_once_and_is_refused_where_they_differ(
    names: list[str], tmp_path: Path
) -> None:
    rows = 24 // len(names)
    base: Tensors = {f"layers.0.attention.{name}.weight": np.ones((rows, 8), np.float32) for name in names}
    fused, split = both_spellings()
    once = merged(tmp_path / "once", fused, base=base)
    assert_close(merged(tmp_path / "both", fused | split, base=base), once)
    assert_close(merged(tmp_path / "split", split, base=base), once)
    with pytest.raises(BadLora, match=r"both mean the base's .*, and add other values to it; take one of them out"):
        merged(tmp_path / "other", fused | both_spellings(5)[1], base=base)


def test_verification_finds_a_module_in_both_spellings_that_differs(tmp_path: Path) -> None:
    base: Tensors = {"layers.0.attention.qkv.weight": np.ones((24, 8), np.float32)}
    fused, _ = both_spellings()
    merged(tmp_path, fused, base=base)
    other = LoraInput("l", tiny.write_lora(tmp_path / "both.safetensors", fused | both_spellings(5)[1]), 1.0)
    found = verify_merge(tmp_path / "out", tmp_path / "base", [other], component="", rows=None, expected=Expectation())
    assert any("two of its modules change the same rows, each in its own way" in text for text in found.problems)


@pytest.mark.parametrize(
    ("lora", "base", "said"),
    [
        ("flux_1", "flux_2", "its names are those of FLUX.1, and the base's those of FLUX.2"),
        ("flux_2", "flux_1", "its names are those of FLUX.2, and the base's those of FLUX.1"),
        ("wan_21_i2v", "wan_22", "its names are those of Wan 2.1"),
        ("qwen_image", "qwen_image_21", "its names are those of Qwen-Image, and the base's those of Qwen-Image-2.1"),
        ("krea_2", "z_image", "its names are those of Krea 2, and the base's those of Z-Image"),
    ],
)
def test_a_lora_of_another_family_is_refused_with_its_name(lora: str, base: str, said: str, tmp_path: Path) -> None:
    factors, _ = random_lora(weights(lora))
    with pytest.raises((ShapeMismatch, UnmatchedTargets), match=re.escape(said)):
        merged(tmp_path, spelt(factors, "transformer."), base=weights(base))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_a_gpu_cuts_and_joins_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    _, parts, _ = update_of(name)
    if "dora_scale" in parts and parts["dora_scale"].shape == (1, 16):
        return
    weight = tiny.weights()[f"{X}.weight"]
    base = tiny.write_component(tmp_path / "base", {f"{FUSED}.weight": np.concatenate([weight] * 3)}, 1)
    lora = tiny.write_lora(tmp_path / "l.safetensors", {f"{SPLIT[1]}.{end}": np.asarray(p) for end, p in parts.items()})
    plan = make_plan(open_checkpoint(base), [LoraInput("l", lora, 0.7)])
    made = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        write_merged(plan, out, device=device, generated={}, known={}, progress=lambda _: None)
        (shard,) = out.glob("*.safetensors")
        made[device] = shard.read_bytes()
    assert made["cpu"] == made["cuda"]
