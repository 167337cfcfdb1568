"""One rounding, to nearest, ties to even, of values known up to an error; in memory that each thread uses again."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import torch

from lora_fuse.checkpoint import dtypes
from lora_fuse.lora import DoubleDouble

FLOAT_FORMATS = {dtypes.DTYPES[name].torch: kind for name, kind in dtypes.ROUNDABLE.items()}
_memory = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of this thread's own that is used again under the same name: fresh pages would cost more than the sum."""
    memory: dict[Any, torch.Tensor] = _memory.__dict__
    key = (name, shape, dtype, device)
    if key not in memory:
        count = math.prod(shape)
        whole = (name, dtype, device)
        if whole not in memory or memory[whole].numel() < count:
            memory[whole] = torch.empty(count, dtype=dtype, device=device)
        memory[key] = memory[whole][:count].view(shape)
    return memory[key]


def round_most(values: torch.Tensor, error: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values to a 16-bit float or float32 the fastest way, and list those that it may have rounded wrongly.

    The values are float64 and contiguous, of any shape, each within `error` of the exact one.

    Returns:
        What gives the rounded values when it is converted to `dtype`: float32, scratch memory. And the numbers (int64,
        flat) of those to give to `round_doubtful`; a few in ten thousand.
    """
    near = scratch("near", values.shape, torch.float32, values.device).copy_(values)
    if dtype == torch.float32:
        low = (values - error).to(dtype)
        high = (values + error).to(dtype)
        return near, _negative((low == high).view(-1).to(torch.int32) - 1)
    return near, _near_a_tie(near.view(-1), error, dtype)


def round_doubtful(values: torch.Tensor, error: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round values with one rounding, and list those that the error leaves undecided.

    Rounding is monotone: where ``value - error`` and ``value + error`` become the same number, so does the exact value.
    Returned is the same as by `round_most`, but that the first thing has `dtype`.
    """
    low = narrow(values - error, dtype)
    high = narrow(values + error, dtype)
    return low, (low != high).nonzero().view(-1)


def round_close(sums: DoubleDouble, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round sums of two float64 each with one rounding, and list those that even that leaves undecided.

    They lie between two neighbours, whose middle float64 has: the side is that of the small difference to it, and where
    nothing was lost and there is none, it is a tie. Returned is the same as by `round_doubtful`.
    """
    near = sums.normal()
    value, low, lost = (torch.from_numpy(part) for part in (near.high, near.low, near.lost))
    error = value.abs() * 2.0**-51 + lost * 2  # at least a unit of float64's last place, and more than `low`
    below = narrow(value - error, dtype)
    above = narrow(value + error, dtype)
    between = (below.double() + above.double()) / 2
    beyond = (value - between) + low
    bits = [end.view(torch.int32 if dtype == torch.float32 else torch.int16) for end in (below, above)]
    same = bits[0] == bits[1]
    upwards = (beyond > 0) | ((beyond == 0) & (bits[0] & 1 == 1))
    sure = (beyond.abs() > lost * 2) | (lost == 0)
    neighbours = torch.nextafter(below, above) == above
    undecided = ~(same | (sure & neighbours & between.isfinite()))
    return torch.where(upwards, above, below), undecided.nonzero().view(-1)


def _near_a_tie(near: torch.Tensor, error: float, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of the values, known as the float32 nearest to each, that may lie at a tie or round to one on the way.

    The bits that a conversion drops read 1000... at a tie. Two units of the last place are left for the rounding to
    float32 and for `error`; a value so small that this is not enough counts as near. Both tests end in a negative
    number, for torch compares four times as slowly as it subtracts.
    """
    dropped = dtypes.FLOAT32.precision - FLOAT_FORMATS[dtype].precision
    window = 2
    mask = (1 << dropped) - 1
    tie = 1 << (dropped - 1)
    bits = near.view(torch.int32)
    distance, size = (scratch(name, bits.shape, torch.int32, bits.device) for name in ("distance", "size"))
    torch.add(bits, tie + window, out=distance)  # modulo the mask the same as minus the tie
    distance.bitwise_and_(mask).sub_(2 * window + 1)
    least = max(error * 2.0**25, FLOAT_FORMATS[dtype].smallest_normal) * 1.001
    small = torch.tensor(least, dtype=torch.float32).view(torch.int32)
    torch.bitwise_and(bits, 0x7FFFFFFF, out=size)  # floats of one sign are ordered as their bits are
    return _negative(distance.bitwise_or_(size.sub_(int(small))))


def _negative(numbers: torch.Tensor) -> torch.Tensor:
    """Indices of a vector's negative values; on the CPU numpy finds them several times as fast as torch."""
    if numbers.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(numbers.numpy() < 0))
    return (numbers < 0).nonzero().view(-1)


def narrow(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert float64 to a narrower dtype with one rounding; torch takes it to 16 bits by way of float32.

    A detour that rounds to odd does not show in the end if it keeps two bits more (Boldo and Melquiond, "Emulation of
    a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008, theorem 2).
    """
    near = values.to(torch.float32)
    if dtype == torch.float32:
        return near
    wide = near.double()
    bits = near.view(torch.int32)
    towards_zero = torch.where(wide.abs() > values.abs(), bits - 1, bits)
    return torch.where(wide == values, bits, towards_zero | 1).view(torch.float32).to(dtype)
