"""Reproducible weights: every value is a function of the tensor's name, and of nothing else.

No random generator is used, neither torch's (its streams changed between versions) nor numpy's: the bits come from
SHAKE-128 of the name, and the arithmetic up to the final rounding is exact or correctly rounded by IEEE 754. The
same name and shape therefore give the same bytes on every machine and with every library version.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def uniform(name: str, shape: Sequence[int], std: float) -> torch.Tensor:
    """Uniform values in [-std sqrt 3, std sqrt 3), so with standard deviation `std`, derived from `name`.

    Returns:
        float32 tensor of `shape`.
    """
    count = math.prod(shape)
    bits = np.frombuffer(hashlib.shake_128(name.encode()).digest(4 * count), dtype="<u4")
    unit = (bits >> 8).astype(np.float64) / 2**23 - 1.0  # 24 bits: exact in [-1, 1)
    return torch.from_numpy((unit * (std * math.sqrt(3.0))).astype(np.float32)).reshape(*shape)


def fill(module: torch.nn.Module, prefix: str) -> None:
    """Set every parameter of `module`: matrices by `uniform`, biases to 0, norm weights to 1.

    A matrix has the standard deviation 1 / sqrt(fan_in), an embedding, whose rows are looked up and not summed, 1.

    Args:
        module: any torch module; changed in place.
        prefix: put before each parameter's name, so that equal names in two components differ.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if sum(size > 1 for size in parameter.shape) < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                fan_in = 1 if id(parameter) in embeddings else math.prod(parameter.shape[1:])
                parameter.copy_(uniform(f"{prefix}.{name}", parameter.shape, 1 / math.sqrt(fan_in)))
