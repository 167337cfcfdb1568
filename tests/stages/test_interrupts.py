"""Ctrl-C and SIGTERM in the middle of the work, sent to real processes as a terminal sends them: to the whole group."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import BIG, CONTENT, FILE, LORA, Project, fetched, leftovers, processes
from tests.support.machine import ROOT, until
from tests.support.merges import hashes, left, run, start
from tests.support.workspace import Workspace, ran

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def test_a_fuse_that_is_interrupted_keeps_finished_shards_and_goes_on(place: Path) -> None:
    assert run(place, "0.5")[0] == 0
    before = hashes(place / "out")
    process = start(place)
    while not list(place.glob(".out.partial-*/done/*.json")):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot be done before the signal is there
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: interrupted; shards that are finished are kept")
    assert hashes(place / "out") == before
    (work,) = place.glob(".out.partial-*/files")
    done = {path.stem: (work / path.stem).stat().st_ino for path in work.parent.glob("done/*.json")}
    assert done
    assert run(place)[0] == 0
    assert {name: (place / "out" / name).stat().st_ino for name in done} == done  # not made again
    assert left(place) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_download_that_is_interrupted_leaves_nothing_half(
    hub: LoopbackHub, project: Project, number: signal.Signals
) -> None:
    hub.push(LORA, {FILE: BIG})
    hub.faults.append(Fault(CONTENT, bytes_per_s=100_000))
    process = project.start()
    until(leftovers)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == SIGNALS[number], err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: interrupted; whole files stay in the Hub client's cache")
    assert (leftovers(), project.locks(), processes("lora_fuse.hub.worker")) == ([], {}, [])
    project.run()
    assert len(fetched(hub)) == 2


def in_group(workspace: Workspace, when: Callable[[str], bool]) -> tuple[int, str]:
    """`dvc repro` in a process group of its own, which gets SIGINT as soon as it has said something."""
    said = ""
    with subprocess.Popen(
        ["dvc", "repro"],
        cwd=workspace.root,
        env={**workspace.env, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        for line in process.stdout or ():
            said += line
            if when(line):
                os.killpg(process.pid, signal.SIGINT)
    return process.returncode, said


def test_ctrl_c_under_dvc_ends_the_stage_and_the_next_repro_goes_on_with_it(tmp_path: Path) -> None:
    workspace = Workspace.checkout(tmp_path)
    code, said = in_group(workspace, lambda line: line.startswith("regress: 6 pictures"))
    assert (code, ran(said)) == (255, ["download", "fuse", "verify", "regress"]), said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "interrupted; the last pictures are as they were" in line
    assert "`dvc repro` goes on" in line
    assert not (tmp_path / "artifacts/regression/metrics.json").exists()
    assert ran(workspace.run("dvc", "repro", "--dry").stdout) == ["regress", "gate"]


def test_a_stage_that_is_interrupted_says_so_to_programs_too(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from stages.run import run_stage
        sys.argv = ["stages/fuse.py", "--json"]
        run_stage(lambda *_: os.kill(os.getpid(), signal.SIGTERM), kept="all is kept")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stdout == '{"stage": "fuse", "code": 143, "error": "interrupted; all is kept"}\n'
    assert done.stderr == "error: interrupted; all is kept\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_that_a_library_catches_ends_the_work_at_the_next_look(number: signal.Signals) -> None:
    code = """if True:
        import os, sys, time
        from lora_fuse.machine import interrupts
        def work():
            try:
                os.kill(os.getpid(), int(sys.argv[1]))
                time.sleep(60)
            except BaseException:  # as libraries do
                pass
            interrupts.check()
            print("it went on")
        interrupts.check()  # nothing came
        code = interrupts.guarded(work)
        assert interrupts.guarded(interrupts.check) == 0  # of what came before, nothing is left
        interrupts.leave(code)
    """
    command = [sys.executable, "-c", code, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (SIGNALS[number], "", 1), done.stderr


def test_ctrl_c_on_the_way_out_changes_nothing() -> None:
    code = """if True:
        import atexit, os, signal
        from lora_fuse.machine import interrupts
        atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupts.leave(interrupts.guarded(lambda: 3))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_ctrl_c_while_a_line_is_printed_prints_it_once() -> None:
    code = """if True:
        import os, signal
        from lora_fuse.machine import interrupts, standard_streams, text
        write = standard_streams.Sturdy.write
        def interrupted(self, data):
            standard_streams.Sturdy.write = write
            written = write(self, data)
            os.kill(os.getpid(), signal.SIGINT)
            return written
        standard_streams.Sturdy.write = interrupted
        interrupts.leave(interrupts.guarded(lambda: text.say("a line")))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (130, "a line\n", 1), done.stderr


def test_a_pipe_that_does_not_block_gets_all_that_is_printed() -> None:
    code = """if True:
        import os
        from lora_fuse.machine import interrupts, text
        os.set_blocking(1, False)
        interrupts.leave(interrupts.guarded(lambda: text.say("word " * 100_000)))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("word"), done.stderr) == (0, 100_000, "")
