"""Laws of sums in two float64: what is lost is bounded, nothing is lost of few bits, and ties are seen."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_fuse.checkpoint.dtypes import FLOAT32
from lora_fuse.fusion.torch_rounding import round_close
from lora_fuse.lora.deltas import Hadamard, Kronecker, LowRank
from lora_fuse.lora.double_double import LARGEST, SMALLEST, DoubleDouble, lowest_bits
from lora_fuse.lora.exact import nearest
from lora_fuse.lora.matrices import Matrix

SIZES = st.floats(1e-40, 1e40) | st.floats(0.5, 2) | st.integers(1, 255).map(float)
NUMBERS = st.builds(lambda size, sign: size * sign, SIZES, st.sampled_from([-1.0, 0.0, 1.0]))


def total_of(sums: DoubleDouble) -> Fraction:
    return Fraction(float(sums.high[0])) + Fraction(float(sums.low[0]))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), NUMBERS)
def test_a_sum_of_products_is_within_what_was_lost(pairs: list[tuple[float, float]], factor: float) -> None:
    left, right = np.array(pairs).T
    matrix = Matrix(left.reshape(1, -1), right.reshape(-1, 1))
    one = np.zeros(1, np.int64)
    for delta in (
        LowRank(matrix, factor),
        Hadamard(matrix, Matrix(right.reshape(1, -1), left.reshape(-1, 1)), factor),
        Kronecker(matrix, Matrix(np.array([[factor]])), 0.1),
    ):
        made = delta.close(one, one).normal()
        lost = abs(total_of(made) - delta.exact(0, 0))
        assert lost <= Fraction(float(made.lost[0]))
        assert made.lost[0] <= 2.0**-90 * (abs(made.high[0]) + delta.size)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_ties_of_factors_of_few_bits_need_no_fractions(dtype: type, scale: float) -> None:
    """One sum in a hundred, or more, of such factors is on a tie of float32 or 1e-20 beside it."""
    rng = np.random.default_rng(2)
    a, b = ((rng.standard_normal(shape) / 64).astype(dtype).astype(np.float64) for shape in ((40, 16), (16, 50)))
    delta = LowRank(Matrix(a, b), scale)
    rows, columns = (side.reshape(-1) for side in np.indices((40, 50)))
    sums = DoubleDouble((rng.standard_normal(2000) / 64).astype(dtype).astype(np.float64))
    weights = sums.high.tolist()
    rounded, undecided = round_close(sums.plus(delta.close(rows, columns)), torch.float32)
    assert not len(undecided)
    ties = 0
    for number, (weight, row, column) in enumerate(zip(weights, rows.tolist(), columns.tolist(), strict=True)):
        total = Fraction(weight) + delta.exact(row, column)
        assert float(rounded[number]) == nearest(total, FLOAT32)
        below = np.float32(float(total))
        ties += abs(abs(total - Fraction(float(below))) * 2 / Fraction(float(np.spacing(abs(below)))) - 1) < 1e-9
    assert ties > 5


@pytest.mark.parametrize("size", [SMALLEST / 4, LARGEST * 4, 2.0**-1060])
def test_factors_that_might_lose_more_say_that_all_is_lost(size: float) -> None:
    one = np.zeros(1, np.int64)
    matrix = Matrix(np.array([[size]]), np.array([[1.0]]))
    for delta in (
        LowRank(matrix, 1.0),
        LowRank(Matrix(np.ones((1, 1))), size),
        LowRank(Matrix(np.array([[size]])), 1.0),
    ):
        sums = delta.close(one, one)
        assert np.isinf(sums.lost).all()
        _, undecided = round_close(sums, torch.float32)
        assert len(undecided) == 1


def test_the_lowest_bit_of_a_number_is_seen() -> None:
    values = np.array([1.0, -3.0, 0.75, 2.0**-149, 0.1, 0.0])
    bits = lowest_bits(values)
    np.testing.assert_array_equal(bits[:4], [1.0, 1.0, 0.25, 2.0**-149])
    assert bits[4] == 2.0**-55
    assert np.isinf(bits[5])


def test_a_sum_of_which_too_much_is_lost_stays_undecided() -> None:
    """The bad input for `round_close`: a difference to the tie that is no larger than what was lost."""
    sums = DoubleDouble(np.array([1 + 2.0**-24, 1 + 2.0**-24, 1 + 2.0**-24]))
    sums.low = np.array([2.0**-80, 2.0**-80, 0.0])
    sums.lost = np.array([2.0**-80, 2.0**-90, 2.0**-90])
    rounded, undecided = round_close(sums, torch.float32)
    assert undecided.tolist() == [0, 2]
    assert float(rounded[1]) == 1 + 2.0**-23
