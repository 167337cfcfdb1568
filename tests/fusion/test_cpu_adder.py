"""Laws of the quick way: the bytes of the slow one, whatever the numbers."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fuse.checkpoint.dtypes import SIXTEEN_BIT
from lora_fuse.fusion import cpu_adder, cpu_product
from lora_fuse.fusion.cpu_adder import Stacked, TooLarge, stackable
from lora_fuse.fusion.cpu_kernel import ADD, UNIT, error_bound, nearest_even
from lora_fuse.fusion.torch_sums import fuse_rows
from lora_fuse.lora.deltas import Hadamard, LowRank, NotFinite
from lora_fuse.lora.exact import inner_product, nearest
from lora_fuse.lora.matrices import Matrix

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}
NUMPY: dict[str, npt.DTypeLike] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}


def product(
    seed: int,
    rows: int,
    columns: int,
    rank: int,
    size: float = 0.1,
    factor: float = 1.0,
    digits: npt.DTypeLike = np.float64,
) -> LowRank:
    rng = np.random.default_rng(seed)
    shapes = (rows, rank), (rank, columns)
    a, b = ((rng.standard_normal(shape) * size).astype(digits).astype(np.float64) for shape in shapes)
    return LowRank(Matrix(a, b), factor)


def quick(weights: npt.NDArray[np.generic], parts: list[LowRank], dtype: str, first: int = 0) -> npt.NDArray[np.uint16]:
    bits = weights.view(np.uint16).copy()
    Stacked(parts, dtype).add(bits, first)
    return bits


def slow(weights: npt.NDArray[np.generic], parts: list[LowRank], dtype: str, first: int = 0) -> npt.NDArray[np.uint16]:
    rows = torch.from_numpy(weights.view(np.uint16).copy()).view(TORCH[dtype])
    fuse_rows(rows, parts, first)
    return rows.view(torch.uint16).numpy()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("columns", [1, 7, 64, 131])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_the_bytes_are_those_of_the_slow_way(dtype: str, columns: int, size: float) -> None:
    """bfloat16 and float16, rows that do not fill a vector, differences far smaller and larger than the weights."""
    rng = np.random.default_rng(columns)
    weights = (rng.standard_normal((40, columns)) * 0.05).astype(NUMPY[dtype])
    parts = [product(1, 60, columns, 8, size), product(2, 60, columns, 3, size, 0.37)]
    short = [product(3, 60, columns, 5, size, 0.37, digits=ml_dtypes.bfloat16) for _ in range(2)]
    assert np.array_equal(quick(weights, short, dtype, first=20), slow(weights, short, dtype, first=20))
    merged = quick(weights, parts, dtype, first=20)
    assert np.array_equal(merged, slow(weights, parts, dtype, first=20))
    assert (merged != weights.view(np.uint16)).any() or size < 1e-5


NUMBERS = st.integers(-8, 8).map(lambda n: n / 8)


@given(st.data(), st.sampled_from(["BF16", "F16"]))
@settings(max_examples=150, deadline=None)
def test_every_value_is_the_exact_sum_rounded(data: st.DataObject, dtype: str) -> None:
    """Small dyadic numbers at odd scales: sums at ties, near them by less than float64 sees, at zero and subnormal."""
    rows, columns, rank = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)))

    def matrix(n: int, m: int) -> npt.NDArray[np.float64]:
        return np.array(data.draw(st.lists(NUMBERS, min_size=n * m, max_size=n * m))).reshape(n, m)

    power = data.draw(st.sampled_from([1.0, 2.0**-14, 2.0**-22]))
    weights = (matrix(rows, columns) * power).astype(NUMPY[dtype])
    factors = data.draw(
        st.lists(st.sampled_from([1.0, 0.1, 2.0**-8, 2.0**-24, 2.0**-53, 1e-20]), min_size=1, max_size=3)
    )
    parts = [LowRank(Matrix(matrix(rows, rank), matrix(rank, columns) * power), factor) for factor in factors]
    merged = quick(weights, parts, dtype).view(NUMPY[dtype])
    for i in range(rows):
        for j in range(columns):
            exact = sum((one.exact(i, j) for one in parts), Fraction(float(weights[i, j])))
            assert float(merged[i, j]) == nearest(exact, SIXTEEN_BIT[dtype]), exact


def test_a_tie_that_float64_gets_wrong_is_settled_in_integers() -> None:
    """1 + 2**-8 is a tie of bfloat16; 2**-60 is lost in a float64 sum, and decides."""
    one = np.ones((1, 1))
    parts = [LowRank(Matrix(one * 2.0**-8, one), 1.0), LowRank(Matrix(one * 2.0**-60, one), 1.0)]
    weights = np.ones((1, 1), ml_dtypes.bfloat16)
    assert float(quick(weights, parts, "BF16").view(ml_dtypes.bfloat16)[0, 0]) == 1 + 2.0**-7
    assert float(quick(weights, parts[:1], "BF16").view(ml_dtypes.bfloat16)[0, 0]) == 1.0


def rounded(value: float) -> float:
    """A float32 as the kernel rounds it to bfloat16."""
    bits = np.array([nearest_even(np.float32(value), np.uint32(16))], np.uint16)
    return float(bits.view(ml_dtypes.bfloat16)[0])


@pytest.mark.parametrize(
    ("b", "near", "ends", "undecided", "merged"),
    [
        (2.0**-3, 1 + 2.0**-6, (1 + 2.0**-6, 1 + 2.0**-6), 0, 1 + 2.0**-6),
        (2.0**-4 + 2.0**-26, 1 + 2.0**-8, (1.0, 1 + 2.0**-7), 0, 1 + 2.0**-7),
        (2.0**-4, 1 + 2.0**-8, (1.0, 1 + 2.0**-7), 1, 1.0),
    ],
    ids=["float32 decides", "float64 decides", "fractions decide"],
)
def test_the_example_of_adder(b: float, near: float, ends: tuple[float, float], undecided: int, merged: float) -> None:
    """The three sums of its docstring, number by number."""
    a = 2.0**-3 if b == 2.0**-3 else 2.0**-4
    part = LowRank(Matrix(np.array([[a]]), np.array([[b]])), 1.0)
    stacked, weights = Stacked([part], "BF16"), np.ones((1, 1), ml_dtypes.bfloat16)
    factors = stacked._factors._replace(error=np.float64(2.0**-52 * stacked._roundings * (1 + a * b)))
    assert factors.error < 2.0**-49
    assert np.float32(1) + np.float32(a) * np.float32(b) == near
    bound = error_bound(np.float32(near), factors.row_error[0], factors.column_length[0], factors.lost)
    assert 4.0 < bound / UNIT < 4.2
    assert (rounded(float(near - bound)), rounded(float(near + bound))) == ends
    product, left = np.array([[a * b]], np.float32), np.empty(1, np.int64)
    assert ADD[SIXTEEN_BIT["BF16"]](weights.view(np.uint16).copy(), product, 0, factors, left) == undecided
    assert float(quick(weights, [part], "BF16").view(ml_dtypes.bfloat16)[0, 0]) == merged


def test_a_bound_that_is_too_small_would_decide_wrongly() -> None:
    """The second sum of the example with no bound at all: float32 alone says 1."""
    assert rounded(float(np.float32(1) + np.float32(2.0**-8 + 2.0**-30))) == 1.0


def test_float32_alone_would_be_wrong() -> None:
    """The bad input that the bound exists for: believe float32 everywhere, and other bytes come out."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((256, 256)) * 0.05).astype(ml_dtypes.bfloat16)
    parts = [product(1, 256, 256, 64)]
    near = weights.astype(np.float32) + (parts[0].matrix.a.astype(np.float32) @ np.float32(parts[0].matrix.b))
    believed = near.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert (believed != slow(weights, parts, "BF16")).any()
    assert np.array_equal(quick(weights, parts, "BF16"), slow(weights, parts, "BF16"))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_what_is_not_finite_is_refused_and_what_may_be_too_large_is_handed_on(dtype: str) -> None:
    weights = np.ones((2, 2), NUMPY[dtype])
    for broken in (np.nan, np.inf, -np.inf):
        weights[1, 1] = broken
        with pytest.raises(NotFinite, match="the base holds NaN or infinity"):
            quick(weights, [product(1, 2, 2, 1)], dtype)
    weights[1, 1] = SIXTEEN_BIT[dtype].largest / 3
    before = weights.tobytes()
    with pytest.raises(TooLarge):
        Stacked([product(1, 2, 2, 1)], dtype).add(weights.view(np.uint16), 0)
    assert weights.tobytes() == before


def test_only_products_of_16_bit_weights_are_stacked() -> None:
    plain, whole = product(1, 2, 2, 1), LowRank(Matrix(np.ones((2, 2))), 1.0)
    huge = LowRank(Matrix(np.full((2, 1), 2.0**61), np.ones((1, 2))), 1.0)
    assert stackable([plain, plain], "BF16") == [plain, plain]
    assert stackable([plain], "F32") is None
    for other in (whole, huge, Hadamard(plain.matrix, plain.matrix, 1.0)):
        assert stackable([plain, other], "BF16") is None


def test_a_product_that_is_coarser_than_float32_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a matrix unit that takes float32 for bfloat16."""
    weights, part = np.full((64, 64), 0.1, ml_dtypes.bfloat16), product(1, 64, 64, 16)

    def coarse(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], factor: float) -> cpu_product.Multiply:
        short, of_b = (matrix.astype(ml_dtypes.bfloat16).astype(np.float64) for matrix in (a, b))
        return cpu_product.multiplier(short, of_b, factor)

    quick(weights, [part], "BF16")
    monkeypatch.setattr(cpu_adder, "multiplier", coarse)
    with pytest.raises(RuntimeError, match="coarser than IEEE 754"):
        quick(weights, [part], "BF16")


@pytest.mark.parametrize("without", [set(), {"+avx512bf16"}, {"+avx512f"}])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (12, 7), (40, 64)])
def test_a_product_is_within_its_bound(
    monkeypatch: pytest.MonkeyPatch, without: set[str], dtype: npt.DTypeLike, rows: int, rank: int
) -> None:
    """In tiles of either instruction, if the CPU has it, and by BLAS; from any row on, tiles that are not full."""
    features = cpu_product.features() - without
    monkeypatch.setattr(cpu_product, "features", lambda: features)
    rng = np.random.default_rng(rank)
    a, b = (rng.standard_normal(shape).astype(dtype).astype(np.float64) for shape in ((rows, rank), (rank, 96)))
    a[0, 0] = 2.0**-130  # a subnormal number, which one instruction takes for zero
    first = rows // 3
    out = np.full((-(-(rows - first) // cpu_product.ROWS) * cpu_product.ROWS, 96), np.nan, np.float32)
    cpu_product.multiplier(a, b, 0.37)(first, out)
    lengths = np.outer(np.linalg.norm(a[first:], axis=1), np.linalg.norm(b, axis=0))
    error = np.abs(out[: rows - first] - 0.37 * a[first:] @ b)
    assert (error <= 0.37 * lengths * UNIT * (rank + 4) + 2.0**-120).all()


def test_bfloat16_is_told_from_what_has_one_digit_more() -> None:
    numbers = np.array([[0.0, -1.0, 1 + 2.0**-7, 1.5 * 2.0**127, 2.0**-140]])
    assert cpu_product._are_bfloat16(numbers)
    for longer in (1 + 2.0**-8, 1 + 2.0**-52, 0.1):
        assert not cpu_product._are_bfloat16(np.append(numbers, [[longer]], axis=1))


@given(st.lists(st.tuples(st.floats(-1e200, 1e200), st.floats(-1e100, 1e100)), max_size=8))
def test_an_inner_product_is_exact(pairs: list[tuple[float, float]]) -> None:
    x, y = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    assert inner_product(x, y) == sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
