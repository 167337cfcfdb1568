"""Numbers without rounding, and the one rounding at the end. Pure, and without any library but numpy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import dtypes


def nearest(exact: Fraction, kind: dtypes.FloatFormat) -> float:
    """The number of a format that is nearest to a fraction, ties to even; infinity where it is too large."""
    size = abs(exact)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1  # now 2**exponent is at most the size, and more than half of it
    exponent = max(exponent, 1 - kind.bias)
    unit = Fraction(2) ** (exponent - kind.precision + 1)
    rounded = round(size / unit) * unit  # Python rounds a fraction to the nearest integer, ties to even
    return math.copysign(float(rounded) if rounded <= kind.largest else math.inf, exact)


def inner_product(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Fraction:
    """``sum_i x_i * y_i`` in integers: fractions would look for common divisors at every step."""
    m, e = np.frexp(x)
    n, f = np.frexp(y)
    powers = (e.astype(np.int64) + f).tolist()
    lowest = min(powers, default=0)
    whole = zip(*(np.ldexp(part, 53).astype(np.int64).tolist() for part in (m, n)), powers, strict=True)
    return Fraction(sum(a * b << power - lowest for a, b, power in whole)) * Fraction(2) ** (lowest - 106)
