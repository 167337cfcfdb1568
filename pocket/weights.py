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
    from collections.abc import Mapping, Sequence


def uniform(name: str, shape: Sequence[int], std: float) -> torch.Tensor:
    """Uniform values in [-std sqrt 3, std sqrt 3), so with standard deviation `std`, derived from `name`.

    Returns:
        float32 tensor of `shape`.
    """
    count = math.prod(shape)
    bits = np.frombuffer(hashlib.shake_128(name.encode()).digest(4 * count), dtype="<u4")
    unit = (bits >> 8).astype(np.float64) / 2**23 - 1.0  # 24 bits: exact in [-1, 1)
    return torch.from_numpy((unit * (std * math.sqrt(3.0))).astype(np.float32)).reshape(*shape)


def fill(module: torch.nn.Module, prefix: str, gains: Mapping[str, float]) -> None:
    """Set every parameter of `module`: matrices and kernels by `uniform`, biases to 0, norm weights to 1, times gain.

    A matrix has the standard deviation 1 / sqrt(fan_in), an embedding, whose rows are looked up and not summed, 1.

    Args:
        module: any torch module; changed in place.
        prefix: put before each parameter's name, so that equal names in two components differ.
        gains: factor by the end of a parameter's name; 1 where none matches.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = next((value for end, value in gains.items() if name.endswith(end)), 1.0)
            if sum(size > 1 for size in parameter.shape) < 2:
                parameter.fill_(0.0 if name.endswith("bias") else gain)
            elif id(parameter) in embeddings:
                parameter.copy_(uniform(f"{prefix}.{name}", parameter.shape, gain))
            else:
                parameter.copy_(_matrix(f"{prefix}.{name}", parameter.shape, gain))


def _matrix(name: str, shape: Sequence[int], gain: float) -> torch.Tensor:
    """A linear weight, or a kernel: 3 wide, it blurs while it mixes channels at random, so pictures stay smooth.

    In a causal 3D kernel only the last temporal tap meets a single frame, so the others stay 0.
    """
    if len(shape) < 4 or shape[-1] != 3:
        return uniform(name, shape, gain / math.sqrt(math.prod(shape[1:])))
    mix = uniform(name, shape[:2], gain / math.sqrt(shape[1]))
    kernel = torch.zeros(*shape)
    blur = torch.tensor([0.25, 0.5, 0.25])
    (kernel[:, :, -1] if len(shape) == 5 else kernel).copy_(mix[:, :, None, None] * torch.outer(blur, blur))
    return kernel
