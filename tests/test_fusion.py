"""Laws of the arithmetic: one rounding, to nearest, ties to even, from float64."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lora_fuse.fusion import fuse_rows, round_once

NUMPY = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float16: np.dtype(np.float16)}


def nearest(value: float, dtype: npt.DTypeLike) -> float:
    """The nearest number of a dtype by exact fractions, ties to the even last bit."""
    near = np.array(np.float32(value), dtype=dtype)
    around = [near, np.nextafter(near, np.array(np.inf, dtype)), np.nextafter(near, np.array(-np.inf, dtype))]
    finite = [one for one in around if np.isfinite(one.astype(np.float64))]

    def distance(one: npt.NDArray[np.generic]) -> tuple[Fraction, int]:
        return abs(Fraction(float(one.astype(np.float64))) - Fraction(value)), int(one.view(np.uint16)) & 1

    return float(min(finite, key=distance).astype(np.float64))


def rounded(values: list[float], dtype: torch.dtype) -> list[float]:
    return [float(x) for x in round_once(torch.tensor(values, dtype=torch.float64), dtype).to(torch.float64)]


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
    """The bad input that `round_once` exists for: without it these tests would pass by luck."""
    assert float(torch.tensor(BF16_TIE, dtype=torch.float64).to(torch.bfloat16)) != nearest(
        BF16_TIE, ml_dtypes.bfloat16
    )
    assert float(torch.tensor(F16_TIE, dtype=torch.float64).to(torch.float16)) != nearest(F16_TIE, np.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_get_the_sum_of_all_updates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, generator=generator).to(dtype)
    factors = [(torch.randn(5, 3, generator=generator).double(), torch.randn(3, 7, generator=generator).double())] * 2
    expected = round_once(rows.double() + sum(up @ down for up, down in factors), dtype)
    fuse_rows(rows, factors)
    torch.testing.assert_close(rows, expected, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)


def test_a_zero_update_changes_no_bit() -> None:
    rows = torch.randn(4, 4).to(torch.bfloat16)
    before = rows.clone()
    fuse_rows(rows, [(torch.zeros(4, 2, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64))])
    assert torch.equal(rows, before)
