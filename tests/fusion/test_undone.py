"""LoRAs taken out of a merge: what a sum may have come from, counted; the fuse of the result is the merge again."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from lora_fuse.checkpoint import PROVENANCE, dtypes, read_header
from lora_fuse.errors import BadCheckpoint, BadConfig, BadLora, LoraFuseError
from lora_fuse.fusion import FuseJob, plan_base
from lora_fuse.fusion.undone.preimages import Exactly, KnownValues, Ordered, preimages
from lora_fuse.fusion.undone.undone_sums import before
from lora_fuse.lora import LoraInput, LowRank, Selection
from lora_fuse.lora.exact import nearest
from lora_fuse.lora.matrices import Matrix
from tests.support import tiny

Wide = npt.NDArray[np.float64]
SCALE = 0.7


def rounded_sums(numbers: Ordered, weights: Wide, delta: float) -> Wide:
    """The sum rounded once, where float64 has all of it or nothing lies between it and the exact one."""
    sums = weights + delta
    below = numbers.floor(sums)
    low, high = numbers.value(below), numbers.value(below + 1)
    up = (sums - low > high - sums) | ((sums - low == high - sums) & (below % 2 == 1))
    merged = np.where(up, high, low)
    return np.where(merged == 0, np.copysign(0.0, sums), merged)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_the_numbers_that_a_sum_may_come_from_are_all_that_give_it_and_no_others(name: str) -> None:
    kind = dtypes.SIXTEEN_BIT[name]
    numbers = Ordered(kind)
    orders = np.arange(-numbers.most, numbers.most + 1)
    weights = numbers.value(orders)
    assert np.array_equal(weights.astype(dtypes.DTYPES[name].numpy).astype(np.float64), weights)
    assert np.array_equal(numbers.floor(weights), orders)
    near = weights[np.abs(weights) < 2.0**12]
    near = near[(near == 0) | (np.abs(near) > 2.0**-30)]  # so that float64 has every sum
    for delta in (0.0, 2.0**-9, 1.5 * 2.0**-9, -(2.0**-25), 2.0**-14 + 2.0**-21, -0.375):
        merged = rounded_sums(numbers, near, delta)
        starts = np.flatnonzero(np.diff(merged, prepend=np.nan) != 0)
        signs = np.flatnonzero(np.diff(np.signbit(merged).astype(int), prepend=0) != 0)
        starts = np.union1d(starts, signs) if delta else starts
        ends = np.append(starts[1:], len(near)) - 1
        sums = merged[starts].reshape(-1, 1)
        inside = (starts > 0) & (ends < len(near) - 1) & (np.abs(sums[:, 0]) > 2.0**-24)
        found = preimages(sums, np.full(sums.shape, delta), 2.0**-60, kind, Exactly([KnownValues(sums * 0 + delta)], 0))
        assert inside.sum() > 1000
        assert np.array_equal(found.first[inside, 0], numbers.floor(near[starts])[inside])
        assert np.array_equal(found.last[inside, 0], numbers.floor(near[ends])[inside])


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_the_exact_sum_of_what_was_taken_out_is_the_merge_for_zeros_and_the_smallest_numbers_too(name: str) -> None:
    kind = dtypes.ROUNDABLE[name]
    numbers = Ordered(kind)
    rng = np.random.default_rng(11)
    weights = numbers.value(rng.integers(-numbers.most // 2, numbers.most // 2, (40, 30)))
    weights[:2] = 0.0
    weights[2, :10] = numbers.value(np.arange(-5, 5))  # the smallest
    for size in (0.0, 1.0, 2.0**-8, kind.smallest_normal):  # with few bits: sums lie half-way between two numbers
        few = rng.integers(-8, 9, (40, 2)) / 8.0
        delta = LowRank(Matrix(few, rng.integers(-8, 9, (2, 30)) / 4.0), size)
        exactly = [[Fraction(float(weights[i, j])) + delta.exact(i, j) for j in range(30)] for i in range(40)]
        merged = np.array([[nearest(total, kind) for total in row] for row in exactly])
        found, counts = before(merged, [delta], 0, kind)
        again = [
            [nearest(Fraction(float(found[i, j])) + delta.exact(i, j), kind) for j in range(30)] for i in range(40)
        ]
        assert np.array_equal(np.array(again), merged)
        assert (counts.impossible, counts.certain + counts.uncertain) == (0, 40 * 30)
        off = np.abs(found - weights)
        assert off.max() <= counts.largest_error
        assert (off > 0).sum() <= counts.uncertain


def merged_of(
    folder: Path, dtype: npt.DTypeLike = tiny.BF16, selection: Selection | None = None
) -> tuple[Path, Path, list[LoraInput]]:
    """A base, its merge, and what was fused."""
    base = tiny.write_pipeline(folder / "base", tiny.weights(dtype))
    inputs = [
        LoraInput("one", tiny.write_lora(folder / "one.safetensors", tiny.lora_tensors()), SCALE),
        LoraInput("two", tiny.write_lora(folder / "two.safetensors", tiny.lora_tensors("diffusers", 2, seed=8)), -0.3),
    ]
    FuseJob(plan_base(base, inputs, selection), folder / "merged").run()
    return base, folder / "merged", inputs


def tensors_of(root: Path) -> dict[str, tiny.Array]:
    return {name: values for path in sorted(root.rglob("*.safetensors")) for name, values in load_file(path).items()}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_fuse_of_what_was_taken_out_is_the_merge_byte_for_byte(tmp_path: Path, dtype: npt.DTypeLike) -> None:
    selection = Selection(skip=("*.1.attn.to_q",))
    base, merged, inputs = merged_of(tmp_path, dtype, selection)
    plan = plan_base(merged, inputs, selection, undo="once")
    undone = FuseJob(plan, tmp_path / "undone").run().manifest
    assert undone.unmerged is not None
    counts = undone.unmerged
    assert (counts.impossible, counts.certain + counts.uncertain) == (0, counts.elements)
    assert counts.elements == 2 * (64 * 16 + 16 * 24) + 24 * 16
    assert counts.telling > 100
    before, after = tensors_of(base), tensors_of(tmp_path / "undone")
    off = [np.abs(after[name].astype(np.float64) - before[name].astype(np.float64)) for name in before]
    assert sum(int((one > 0).sum()) for one in off) < counts.uncertain < counts.elements / 3
    assert 0 < max(float(one.max()) for one in off) <= counts.largest_error
    FuseJob(plan_base(tmp_path / "undone", inputs, selection), tmp_path / "again").run()
    fused, again = tensors_of(merged), tensors_of(tmp_path / "again")
    assert {name: values.tobytes() for name, values in fused.items()} == {
        name: values.tobytes() for name, values in again.items()
    }
    (first, *_) = sorted((tmp_path / "undone").glob("transformer/*.safetensors"))
    metadata = read_header(first).metadata
    assert PROVENANCE not in metadata
    assert json.loads(metadata["lora_fuse.unmerged"])["skip"] == ["*.1.attn.to_q"]
    assert json.loads((tmp_path / "undone.manifest.json").read_text())["unmerged"]["uncertain"] == counts.uncertain
    job = FuseJob(plan_base(merged, inputs, selection, undo="once"), tmp_path / "undone")
    assert job.run().manifest == undone  # what was made here may be made again


def test_a_merge_that_was_rounded_on_the_way_is_taken_apart_as_it_was_made_and_no_otherwise(tmp_path: Path) -> None:
    """As PEFT merges on a CPU, the delta rounded first, and on a GPU, its product of two factors before it."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(5)
    weight = (torch.randn(96, 64, generator=generator) / 8).bfloat16()
    down, up = (torch.randn(shape, generator=generator).bfloat16() / 16 for shape in ((4, 64), (96, 4)))
    factors = {f"linear.lora_{side}.weight": one.float().numpy() for side, one in (("A", down), ("B", up))}
    lora = [LoraInput("lora", tiny.write_lora(tmp_path / "lora.safetensors", factors), SCALE)]
    product = up.float() @ down.float()
    deltas = {
        "once": product * SCALE,
        "twice": (product * SCALE).bfloat16(),
        "thrice": product.bfloat16() * SCALE,
    }
    for made, delta in deltas.items():
        values = (weight + delta).bfloat16().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        save_file({"linear.weight": values}, path := tmp_path / f"{made}.safetensors")
        for rounding in ("once", "twice", "thrice"):
            out = tmp_path / f"{made}-{rounding}.safetensors"
            job = FuseJob(plan_base(path, lora, undo=rounding), out)
            if rounding != made:
                with pytest.raises(BadLora, match=rf"rounded {rounding}: \d+ of 6144 elements are no such sum"):
                    job.run()
                assert not out.exists()
                continue
            counts = job.run().manifest.unmerged
            assert counts is not None
            assert counts.impossible <= 2  # those sums are in float32
            off = np.abs(load_file(out)["linear.weight"].astype(np.float64) - weight.double().numpy())
            assert 0 < off.max() <= counts.largest_error
            assert (off > 0).sum() < counts.uncertain < 1000
    twice = [*lora, replace(lora[0], name="more")]
    with pytest.raises(BadConfig, match="2 LoRAs and --rounding twice"):
        plan_base(tmp_path / "twice.safetensors", twice, undo="twice")


def test_what_is_not_in_it_or_cannot_be_taken_out_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base, merged, inputs = merged_of(tmp_path)
    plain = tmp_path / "plain.safetensors"
    save_file({name: values for name, values in tensors_of(merged).items() if name != "w"}, plain)
    other = [replace(inputs[0], scale=0.65), inputs[1]]
    whole = tiny.write_lora(tmp_path / "whole.safetensors", {"norm.set_weight": np.ones(16, np.float32)})
    dora = tiny.lora_tensors("diffusers") | {
        "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": np.ones(24, np.float32)
    }
    lengths = tiny.write_lora(tmp_path / "dora.safetensors", dora)
    double = tmp_path / "double.safetensors"
    save_file({name: values.astype(np.float64) for name, values in load_file(plain).items()}, double)
    narrow = tmp_path / "narrow"
    FuseJob(
        plan_base(tmp_path / "plain.safetensors", inputs, dtype="float16"), narrow.with_suffix(".safetensors")
    ).run()
    refused: list[tuple[Path, list[LoraInput], type[LoraFuseError], str]] = [
        (base, inputs, BadLora, r"does not have these LoRAs at these scales, rounded once: \d+ of \d+ elements"),
        (plain, other, BadLora, "does not have these LoRAs at these scales"),
        (plain, inputs[:1], BadLora, "does not have these LoRAs at these scales"),
        (merged, other, BadCheckpoint, r"says that it was fused with .*0\.7, .* to be taken out is .*0\.65"),
        (merged, inputs[:1], BadCheckpoint, "give all LoRAs"),
        (narrow.with_suffix(".safetensors"), inputs, BadCheckpoint, "was written in another dtype than its base"),
        (plain, [LoraInput("w", whole, 1.0)], BadLora, "in the place of the base's values"),
        (plain, [LoraInput("d", lengths, 1.0)], BadLora, "is DoRA, whose lengths"),
        (double, inputs, BadCheckpoint, "is F64, in which no sum is rounded exactly"),
    ]
    for path, given, kind, words in refused:
        out = tmp_path / "out.safetensors" if path.is_file() else tmp_path / "out"
        with pytest.raises(kind, match=words):
            FuseJob(plan_base(path, given, undo="once"), out).run()
        assert not [left for left in tmp_path.iterdir() if "out" in left.name and not left.name.endswith(".lock")]
