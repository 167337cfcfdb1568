"""The cost of a picture: seconds, steps per second, peak memory of the GPUs and of the process."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cost:
    """Time and memory of one picture.

    Attributes:
        seconds: from the prompt to the pixels.
        steps_per_s: of the denoising loop alone, from the end of its first step on; None for a single step.
        peak_gpu_bytes: allocated by torch, the sum of all GPUs; None without one.
        peak_host_bytes: resident memory of the process; where its peak cannot be reset (not Linux), since its start.
    """

    seconds: float
    steps_per_s: float | None
    peak_gpu_bytes: int | None
    peak_host_bytes: int


class Meter:
    """Measures from its making to `stop`."""

    def __init__(self) -> None:
        import torch

        self._gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        with suppress(OSError):  # Linux: 5 resets the high-water mark of resident memory (man 5 proc, clear_refs)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._steps: list[float] = []
        self._start = self._now()

    def step(self) -> None:
        """Note that a denoising step has ended."""
        self._steps.append(self._now())

    def stop(self) -> Cost:
        """Stop, and return the time and memory since the start."""
        import torch

        seconds = self._now() - self._start
        count = len(self._steps) - 1
        return Cost(
            seconds=seconds,
            steps_per_s=count / (self._steps[-1] - self._steps[0]) if count > 0 else None,
            peak_gpu_bytes=sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus) if self._gpus else None,
            peak_host_bytes=_host_peak(),
        )

    def _now(self) -> float:
        import torch

        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter()


def _host_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
