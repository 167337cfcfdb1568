"""Work in several processes: its results are in order, its errors are raised, and a process that is lost is told of."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_fuse.errors import BadConfig, ProcessLost
from lora_fuse.machine import launch

WAITS = """
import sys, time
from lora_fuse.machine import launch
from tests.machine.test_launch import stay
if __name__ == "__main__":
    launch.in_processes(stay, sys.argv[1:])
"""


def work(number: int) -> tuple[int, int]:
    if number < 0:
        raise BadConfig(f"{number} is below 0")
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid()


def stay(place: str) -> None:
    Path(place).write_text(str(os.getpid()), encoding="ascii")
    time.sleep(60)


def test_results_are_in_the_order_of_the_items_and_of_other_processes() -> None:
    results = launch.in_processes(work, [3, 1, 2])
    assert [number for number, _ in results] == [3, 1, 2]
    assert os.getpid() not in {process for _, process in results}


@pytest.mark.parametrize(("items", "error", "said"), [([1, -1], BadConfig, "-1 is below 0"), ([0], ProcessLost, "run")])
def test_an_error_and_a_killed_process_are_told_of(items: list[int], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        launch.in_processes(work, items)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_leave_ctrl_c_to_the_one_that_started_them_and_end_with_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    place = tmp_path / "one"
    command = [sys.executable, "-c", WAITS, str(place)]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (place.exists() and place.read_text()):
        assert program.poll() is None
        time.sleep(0.05)
    worker = psutil.Process(int(place.read_text()))
    if number == signal.SIGINT:
        os.killpg(program.pid, number)
        worker.kill()  # what runs is waited for
    else:
        program.send_signal(number)
    _, said = program.communicate(timeout=30)
    worker.wait(timeout=30)
    assert said.count("KeyboardInterrupt") == (number == signal.SIGINT)
