"""Work in other processes: its results and errors are its own, and a process that is lost is told of."""

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
    with launch.WorkerProcesses() as workers:
        workers.begin(stay, sys.argv[1])()
"""


BLOCKS = """
import signal
from lora_fuse.machine import launch
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
with launch.WorkerProcesses():
    print(signal.pthread_sigmask(signal.SIG_BLOCK, set()) == {signal.SIGTERM})
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


def test_every_result_is_that_of_its_item_and_of_another_process() -> None:
    with launch.WorkerProcesses() as workers:
        results = [begun() for begun in [workers.begin(work, item) for item in (3, 1, 2)]]
    assert [number for number, _ in results] == [3, 1, 2]
    assert os.getpid() not in {process for _, process in results}


def test_a_signal_that_is_left_to_another_thread_stays_so() -> None:
    """In a process of its own, which has no resource tracker yet."""
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_an_error_and_a_killed_process_are_told_of() -> None:
    with launch.WorkerProcesses() as workers:
        with pytest.raises(BadConfig, match="-1 is below 0"):
            workers.begin(work, -1)()
        with pytest.raises(ProcessLost, match="run"):
            workers.begin(work, 0)()
        with pytest.raises(ProcessLost, match="run"):
            workers.begin(work, 1)


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
