"""The device, the log and the optimiser loop of every phase."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]  # by name, as in a safetensors file
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def log(*words: object) -> None:
    """One line with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def compiled(function: Any) -> Any:
    """`function` through torch.compile where that has what it needs: 1.9 times as fast for the VAE on a CPU."""
    if DEVICE.type == "cpu" and shutil.which("g++"):
        return torch.compile(function, dynamic=False)
    return captured(function)


def captured(function: Any) -> Any:
    """`function` through torch.compile on CUDA only, where launching kernels is what takes the time."""
    if DEVICE.type == "cuda" and find_spec("triton") and shutil.which("gcc"):
        return torch.compile(function, dynamic=False, mode="reduce-overhead")
    return function


def decibels(mse: float) -> float:
    """PSNR of pictures in [-1, 1]."""
    return 10 * math.log10(4 / mse)


@dataclass(frozen=True, slots=True)
class Rates:
    """AdamW's peak learning rate and weight decay, and what not every phase wants.

    With `matrix` Muon has the matrices, at that peak rate; with `average` the parameters end as their exponential
    moving average with that decay.
    """

    peak: float
    decay: float = 0.0
    matrix: float = 0.0
    average: float = 0.0


def optimize(
    name: str, parameters: Sequence[torch.nn.Parameter], loss: Callable[[], torch.Tensor], steps: int, rates: Rates
) -> None:
    """Minimise `loss`: warm-up over 3 % of the steps, cosine to 0, gradients clipped to norm 1."""
    matrices = [p for p in parameters if rates.matrix and p.ndim == 2 and min(p.shape) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=rates.peak, betas=(0.9, 0.99), weight_decay=rates.decay, fused=True)
    ]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=rates.matrix, weight_decay=rates.decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    warm = max(1, steps * 3 // 100)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda i: min((i + 1) / warm, 1.0) * 0.5 * (1 + math.cos(math.pi * i / steps))
        )
        for o in optimizers
    ]
    averages = [p.detach().clone() for p in parameters] if rates.average else []
    losses: list[torch.Tensor] = []
    started = time.time()
    for i in range(steps):
        value = loss()
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if averages:
            with torch.no_grad():
                torch._foreach_lerp_(averages, list(parameters), 1 - min(rates.average, (1 + i) / (10 + i)))
        losses.append(value.detach())
        if i == 20 or (i + 1) % 250 == 0:
            mean = torch.stack(losses[-250:]).mean().item()
            log(f"{name} {i + 1}/{steps}: loss {mean:.5f}, {(time.time() - started) / (i + 1):.3f} s a step")
    with torch.no_grad():
        for p, a in zip(parameters if averages else (), averages, strict=True):
            p.copy_(a)
