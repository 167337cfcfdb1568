"""Shows the picture that is being made, the pace, and the time left, estimated from the pictures that are done.

And the cost of a picture: seconds, steps per second, peak memory of the GPUs and of the process.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from lora_fuse.machine import interrupts, progress, text

if TYPE_CHECKING:
    from lora_fuse.pictures.cases import Sampling
    from lora_fuse.pictures.picture import Rendered

    OnPicture: TypeAlias = Callable[[str, str, Rendered], None]

BESIDE = "beside the pictures"  # input pictures read, levels rounded


def passes(sampling: Sampling) -> int:
    """Calls of the transformer for a picture, nearly all of its work: two a step with guidance."""
    return sampling.steps * _per_step(sampling)


def _per_step(sampling: Sampling) -> int:
    return 2 if sampling.guided else 1


@dataclass(frozen=True, slots=True)
class Task:
    """Pictures to render: so many cases, each once for every side; a rate is remembered by the name."""

    name: str
    cases: int
    sides: tuple[Sampling, ...]

    @property
    def stage(self) -> str:
        """The stage that renders: the first word of the name."""
        return self.name.partition(" ")[0]

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        return self.cases * len(self.sides)

    @property
    def work(self) -> int:
        """Calls of the transformer for all of them."""
        return self.cases * sum(map(passes, self.sides))

    def __str__(self) -> str:
        return f"{self.pictures} pictures, {len(self.sides)} of each of {self.cases} cases"

    @property
    def estimate(self) -> str:
        """The estimated time, as the end of a sentence."""
        return progress.estimate(self.name, self.work, in_bytes=False)

    def took(self, seconds: float) -> str:
        """Sum up a task that took so many seconds."""
        each = seconds / self.pictures
        return f"{self.pictures} pictures in {progress.human_seconds(seconds)}, {each:.1f} s each with loading"


@dataclass(slots=True)
class RenderProgress:
    """Turns what a renderer reports into sentences with the pace and, where the task is known, the time left.

    `say` shows a sentence, and how much of the task's work is done; `on_picture` is given each picture as soon as it is
    made, with the names of its side and case.
    """

    task: Task | None = None
    say: Callable[[str, int], None] = lambda _, __: None
    seconds: dict[str, float] = field(default_factory=dict)  # of all that is no picture, in that order
    on_picture: OnPicture = lambda _, __, ___: None
    _made: int = 0
    _done: int = 0  # calls of the transformer, by whole pictures
    _seconds: float = 0.0  # of those
    _took: float = 0.0  # seconds of the last one
    _picture: progress.Stopwatch = field(default_factory=progress.Stopwatch)

    @contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """Report that a part is being loaded, and measure it."""
        interrupts.check()
        self.say(f"loading {what}", self._done)
        with self.spending(what):
            yield

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Measure work that is no picture."""
        with spending(self.seconds, what):
            yield

    def made(self, side: str, case: str, rendered: Rendered) -> None:
        """Report the picture that was made last; what it took beside its cost is work that is no picture."""
        self.seconds[BESIDE] = self.seconds.get(BESIDE, 0.0) + self._took - rendered.cost.seconds
        self.on_picture(side, case, rendered)

    @contextmanager
    def picture(self, side: str, case: str, sampling: Sampling) -> Iterator[Callable[[], None]]:
        """Report on a picture while it is made; yields the function to call at the end of every step."""
        of = f"/{self.task.pictures}" if self.task else ""
        label = f"picture {self._made + 1}{of}, {case} {side}"
        self._picture = progress.Stopwatch()
        step = 0
        self.say(label, self._done)

        def after_step() -> None:
            nonlocal step
            interrupts.check()
            step += 1
            pace = f"step {step}/{sampling.steps}, {self._picture.seconds / step:.2f} s/step"
            self.say(f"{label}, {pace}{self._left()}", self._done + step * _per_step(sampling))

        yield after_step
        self._made += 1
        self._done += passes(sampling)
        self._took = self._picture.seconds
        self._seconds += self._took
        took = progress.human_seconds(self._took)
        self._picture = progress.Stopwatch()
        self.say(f"{label}, {took}{self._left()}", self._done)

    def _left(self) -> str:
        """The time that is left, as the end of a sentence; empty until the first picture is done."""
        if not self._done or self.task is None or self._done >= self.task.work:
            return ""
        left = (self.task.work - self._done) * self._seconds / self._done - self._picture.seconds
        return f", about {progress.human_seconds(max(left, 0.0))} left"


@contextmanager
def spending(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the seconds of some work to those of its name."""
    clock = progress.Stopwatch()
    yield
    seconds[what] = seconds.get(what, 0.0) + clock.seconds


@contextmanager
def watching(
    task: Task, seconds: Mapping[str, float] = MappingProxyType({}), on_picture: OnPicture = lambda _, __, ___: None
) -> Iterator[RenderProgress]:
    """Show the progress on stderr: a bar on a terminal, a line now and then elsewhere.

    `seconds` were spent already; `on_picture` is as of `RenderProgress`.
    """
    clock = progress.Stopwatch()

    def progress_that(say: Callable[[str, int], None] = lambda _, __: None) -> RenderProgress:
        return RenderProgress(task, say, dict(seconds), on_picture)

    if progress.is_silent():
        yield progress_that()
    elif sys.stderr.isatty():
        with progress.bar(task.stage, task.work, bar_format=f"{task.stage} {{percentage:.0f}}%: {{desc}}") as shown:

            def update(sentence: str, done: int) -> None:
                shown.update(done - shown.n)
                shown.set_description_str(text.line(sentence))

            yield progress_that(update)
    else:
        yield progress_that(_now_and_then(task.stage))
    progress.remember(task.name, task.work, clock.seconds)


def _now_and_then(stage: str) -> Callable[[str, int], None]:
    shown = time.monotonic()

    def say(sentence: str, _: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= progress.EVERY:
            shown = time.monotonic()
            progress.log(f"{stage}: {sentence}")

    return say


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
