"""Laws of the meter: time, steps and the peak of memory are those of what it measured."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lora_fuse.pictures.render_progress import Meter

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
LARGE = 200_000_000  # bytes


def test_time_is_from_making_to_stopping() -> None:
    meter = Meter()
    time.sleep(0.05)
    assert 0.05 <= meter.stop().seconds < 5


@pytest.mark.parametrize("steps", [0, 1])
def test_one_step_has_no_pace(steps: int) -> None:
    meter = Meter()
    for _ in range(steps):
        meter.step()
    assert meter.stop().steps_per_s is None


def test_the_pace_leaves_out_what_comes_before_the_first_step_and_after_the_last() -> None:
    meter = Meter()
    time.sleep(0.3)
    for _ in range(4):
        meter.step()
        time.sleep(0.05)
    time.sleep(0.3)
    cost = meter.stop()
    assert cost.steps_per_s is not None
    assert 5 < cost.steps_per_s <= 20


def fill() -> None:
    held = np.ones(LARGE, dtype=np.uint8)  # larger than what malloc keeps: given back to the system at once
    assert held[-1] == 1
    del held


@LINUX
def test_the_peak_has_what_was_allocated_within_it_and_not_what_was_freed_before() -> None:
    quiet = Meter().stop().peak_host_bytes
    fill()
    after = Meter().stop().peak_host_bytes
    meter = Meter()
    fill()
    within = meter.stop().peak_host_bytes
    assert abs(after - quiet) < LARGE / 4
    assert within - after > LARGE * 0.9


@LINUX
def test_the_peak_is_no_less_than_what_is_resident_now() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert Meter().stop().peak_host_bytes >= pages * 4096 * 0.8


def test_without_a_gpu_there_is_no_peak_of_one() -> None:
    code = "from lora_fuse.pictures.render_progress import Meter; print(Meter().stop().peak_gpu_bytes)"
    env = {"PYTHONPATH": ":".join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
