"""The arithmetic of a fuse: a sum in float64, rounded once to the dtype of the weight. Pure.

``W' = round(W + sum_i c_i * up_i @ down_i)``, ``c_i = scale_i * alpha_i / rank_i`` (arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

# torch converts float64 to bfloat16 and float16 by way of float32, which rounds twice. Two roundings differ from one
# only where the float32 lies exactly half-way between two neighbours. Its bits then look like this: (mask, value).
# float16 has subnormals of coarser spacing, so only the bits below every possible half-way bit can be asked for.
_MAYBE_HALFWAY = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x0FFF, 0)}


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 values to `dtype`, to nearest, ties to even, in one step.

    A float32 that may be half-way and is not exact is moved one step toward the true value before the second
    rounding, which then sees the right side (rounding to odd; Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).

    Args:
        values: float64, contiguous, any shape.
        dtype: bfloat16, float16, float32 or float64.
    """
    if dtype not in _MAYBE_HALFWAY:
        return values.to(dtype)
    mask, halfway = _MAYBE_HALFWAY[dtype]
    single = values.to(torch.float32).view(-1)
    doubtful = torch.nonzero((single.view(torch.int32) & mask) == halfway).view(-1)
    exact, rounded = values.view(-1)[doubtful], single[doubtful]
    toward = torch.where(exact > rounded, torch.inf, -torch.inf).to(torch.float32)
    single[doubtful] = torch.where(exact == rounded, rounded, torch.nextafter(rounded, toward))
    return single.to(dtype).view(values.shape)


_scratch = threading.local()  # a float64 buffer for each thread: fresh memory would cost more than the sum


def fuse_rows(rows: torch.Tensor, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Add low-rank updates to some rows of a weight, in place.

    Args:
        rows: (n, in_features), the weight's rows in its own dtype; overwritten.
        factors: pairs of `up` (n, rank), already times its coefficient, and `down` (rank, in_features), float64.
    """
    total = _float64_buffer(rows)
    total.copy_(rows)
    for up, down in factors:
        total.addmm_(up, down)
    rows.copy_(round_once(total, rows.dtype))


def _float64_buffer(like: torch.Tensor) -> torch.Tensor:
    buffer: torch.Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < like.numel() or buffer.device != like.device:
        buffer = _scratch.buffer = torch.empty(like.numel(), dtype=torch.float64, device=like.device)
    return buffer[: like.numel()].view(like.shape)
