"""Memory that is used again: fresh pages would cost more than the arithmetic on them. Pure."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch

_memory = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of this thread's own that is used again under the same name: fresh pages would cost more than the sum."""
    held: dict[Any, torch.Tensor] = _memory.__dict__
    key = (name, shape, dtype, device)
    if key not in held:
        count = math.prod(shape)
        whole = (name, dtype, device)
        if whole not in held or held[whole].numel() < count:
            held[whole] = torch.empty(count, dtype=dtype, device=device)
        held[key] = held[whole][:count].view(shape)
    return held[key]
