"""Laws of the arithmetic: one rounding, to nearest, ties to even, from float64; on a GPU the bytes of the CPU."""

from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion import torch_sums as fusion
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.fusion.torch_rounding import FLOAT_FORMATS, narrow, round_doubtful, round_most
from lora_fuse.fusion.torch_sums import fuse_rows
from lora_fuse.lora.deltas import Delta, Hadamard, Kronecker, LowRank, NotFinite
from lora_fuse.lora.exact import nearest as nearest_of
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.lora.matrices import Matrix
from tests.support.key_styles import ALGORITHMS, convolutions, update_of

NUMPY: dict[torch.dtype, npt.DTypeLike] = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
}


def low_rank(up: torch.Tensor, down: torch.Tensor, factor: float = 1.0) -> LowRank:
    return LowRank(Matrix(up.double().numpy(), down.double().numpy()), factor)


def nearest(value: float | Fraction, dtype: npt.DTypeLike) -> float:
    """The nearest number of a dtype by exact fractions, ties to the even last bit."""
    near = np.array(np.float32(float(value)), dtype=dtype)
    around = [near, np.nextafter(near, np.array(np.inf, dtype)), np.nextafter(near, np.array(-np.inf, dtype))]
    finite = [one for one in around if np.isfinite(one.astype(np.float64))]

    def distance(one: npt.NDArray[np.generic]) -> tuple[Fraction, int]:
        return abs(Fraction(float(one.astype(np.float64))) - Fraction(value)), int(one.view(f"u{one.itemsize}")) & 1

    return float(min(finite, key=distance).astype(np.float64))


def rounded(values: list[float], dtype: torch.dtype) -> list[float]:
    return [float(x) for x in narrow(torch.tensor(values, dtype=torch.float64), dtype).to(torch.float64)]


# Just above half-way between 1 and the next number: float32 drops the last bit and lands on the tie.
BF16_TIE, F16_TIE = 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40


@example(BF16_TIE)
@example(-BF16_TIE)
@example(1 + 2.0**-8)
@example(3 * 2.0**-134)
@given(st.floats(-3e38, 3e38))
def test_bfloat16_is_rounded_once(value: float) -> None:
    assert rounded([value], torch.bfloat16) == [nearest(value, ml_dtypes.bfloat16)]


@example(F16_TIE)
@example(-F16_TIE)
@example(2.0**-25 + 2.0**-70)  # half of the smallest subnormal, and a little more
@example(2.0**-25)
@given(st.floats(-65000, 65000))
def test_float16_is_rounded_once(value: float) -> None:
    assert rounded([value], torch.float16) == [nearest(value, np.float16)]


def test_torch_alone_rounds_twice() -> None:
    """The bad input that `narrow` exists for: without it these tests would pass by luck."""
    assert float(torch.tensor(BF16_TIE, dtype=torch.float64).to(torch.bfloat16)) != nearest(
        BF16_TIE, ml_dtypes.bfloat16
    )
    assert float(torch.tensor(F16_TIE, dtype=torch.float64).to(torch.float16)) != nearest(F16_TIE, np.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_get_the_sum_of_all_updates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, generator=generator).to(dtype)
    up, down = torch.randn(5, 3, generator=generator).double(), torch.randn(3, 7, generator=generator).double()
    summed = rows.double() + 2 * up @ down
    expected = summed if dtype == torch.float64 else narrow(summed, dtype)
    fuse_rows(rows, [low_rank(up, down)] * 2)
    torch.testing.assert_close(rows, expected, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


def test_a_zero_update_changes_no_bit() -> None:
    rows = torch.randn(4, 4).to(torch.bfloat16)
    before = rows.clone()
    fuse_rows(rows, [low_rank(torch.zeros(4, 2), torch.ones(2, 4))])
    assert torch.equal(rows, before)


NUMBERS = st.integers(-8, 8).map(lambda n: n / 8)


@given(st.data(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
@settings(max_examples=60, deadline=None)
def test_every_value_is_the_exact_sum_rounded(data: st.DataObject, dtype: torch.dtype) -> None:
    """Small dyadic numbers at odd scales: sums lie at ties, or a float64 rounding away from them, all the time."""
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)))
    rows, columns, rank = shape

    def matrix(n: int, m: int) -> torch.Tensor:
        values = data.draw(st.lists(NUMBERS, min_size=n * m, max_size=n * m))
        return torch.tensor(values, dtype=torch.float64).reshape(n, m)

    weight, up, down = matrix(rows, columns).to(dtype), matrix(rows, rank), matrix(rank, columns)
    scales = data.draw(st.lists(st.sampled_from([1.0, 0.1, 0.3, 2.0**-8, 2.0**-24, 2.0**-53, 1e-20]), max_size=3))
    merged = weight.clone()
    fuse_rows(merged, [low_rank(up, down, scale) for scale in scales])
    for i in range(rows):
        for j in range(columns):
            product = sum((Fraction(float(up[i, k])) * Fraction(float(down[k, j])) for k in range(rank)), Fraction(0))
            exact = Fraction(float(weight[i, j])) + sum((Fraction(s) * product for s in scales), Fraction(0))
            assert float(merged[i, j]) == nearest(exact, NUMPY[dtype]), (exact, float(merged[i, j]))


def test_float64_alone_falls_on_the_wrong_side_of_a_tie() -> None:
    """The bad input for the law above: 1 + 2**-8 is a tie of bfloat16, and 2**-60 is lost in a float64 sum."""
    one, tie, little = (torch.tensor([[x]], dtype=torch.float64) for x in (1.0, 2.0**-8, 2.0**-60))
    assert float(narrow(one + tie + little, torch.bfloat16)) == 1.0
    merged = one.to(torch.bfloat16)
    fuse_rows(merged, [low_rank(tie, one), low_rank(little, one)])
    assert float(merged) == 1 + 2.0**-7


@pytest.mark.parametrize(
    ("dtype", "weight", "added"),
    [(torch.bfloat16, float("nan"), 0.0), (torch.float16, float("inf"), 0.0), (torch.float16, 60000.0, 10000.0)],
)
def test_what_is_not_finite_is_refused(dtype: torch.dtype, weight: float, added: float) -> None:
    rows = torch.tensor([[weight]], dtype=dtype)
    with pytest.raises(NotFinite):
        fuse_rows(rows, [low_rank(torch.tensor([[added]]), torch.ones(1, 1))])


@given(st.fractions(), st.integers(-150, 130), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_fraction_is_rounded_to_the_nearest(value: Fraction, power: int, dtype: torch.dtype) -> None:
    exact = value * Fraction(2) ** power
    rounded = nearest_of(exact, FLOAT_FORMATS[dtype])
    if abs(exact) < torch.finfo(dtype).max:
        assert rounded == nearest(exact, NUMPY[dtype])
    else:
        assert abs(rounded) in (torch.finfo(dtype).max, float("inf"))


@given(
    st.lists(st.floats(-4, 4), min_size=1, max_size=40),
    st.sampled_from([0.0, 2.0**-50, 2.0**-30, 2.0**-12]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.floats(-1, 1),
)
def test_what_is_not_doubted_is_right_wherever_the_exact_value_is(
    values: list[float], error: float, dtype: torch.dtype, share: float
) -> None:
    """`round_most` and `round_doubtful` may doubt too much, never too little: move each value by up to the error."""
    held = torch.tensor(values, dtype=torch.float64)
    near, doubtful = round_most(held.clone(), error, dtype)
    rounded = near.to(dtype).double()
    settled, undecided = round_doubtful(held[doubtful], error, dtype)
    rounded[doubtful] = settled.double()
    sure = set(range(len(values))) - set(doubtful[undecided].tolist())
    for i in sure:
        exact = Fraction(values[i]) + Fraction(error) * Fraction(share)
        assert float(rounded[i]) == nearest(exact, NUMPY[dtype])


def test_far_from_a_tie_nothing_is_doubted() -> None:
    _, doubtful = round_most(torch.full((64,), 1 + 2.0**-10, dtype=torch.float64), 2.0**-50, torch.bfloat16)
    assert not len(doubtful)


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (512, 512)])
def test_the_sum_does_not_depend_on_the_blocks(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal(shape) / 8 for shape in ((6, 2), (2, 8), (6, 2), (2, 8), (2, 4), (3, 2), (6, 8))]
    differences: list[Delta] = [
        LowRank(Matrix(*parts[:2]), 0.3),
        Hadamard(Matrix(*parts[:2]), Matrix(*parts[2:4]), 0.7),
        Kronecker(Matrix(parts[4]), Matrix(parts[5]), 0.2),
        LowRank(Matrix(parts[6]), 1.0),
    ]
    weight = torch.from_numpy(rng.standard_normal((6, 8))).to(torch.bfloat16)
    monkeypatch.setattr(fusion, "BLOCK", block)
    merged = weight[2:5].clone()
    fuse_rows(merged, differences, 2)
    for i in range(3):
        for j in range(8):
            exact = Fraction(float(weight[2 + i, j])) + sum(one.exact(2 + i, j) for one in differences)
            assert float(merged[i, j]) == nearest(exact, ml_dtypes.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_gpu_writes_the_bytes_that_a_cpu_writes(tmp_path: Path, name: str, dtype: type) -> None:
    target, parts, _ = update_of(name)
    module = target.rpartition(".")[0]
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file({key: tensor.astype(dtype) for key, tensor in convolutions().items()}, base)
    save_file({f"{module}.{end}": np.asarray(part) for end, part in parts.items()}, lora)
    plan = make_plan(open_checkpoint(base), [LoraInput("l", lora, 0.7)])
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        write_merged(plan, out, device=device, generated={}, known={}, progress=lambda _: None)
    assert (tmp_path / "cuda.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    assert load_file(tmp_path / "cpu.safetensors")[target].tobytes() != load_file(base)[target].tobytes()
