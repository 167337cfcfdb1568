"""What is said, where, and how: by the console, by progress, in colour; with ``--quiet`` and ``--json``."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora_fuse.cli import main
from lora_fuse.machine import progress as rates
from lora_fuse.machine import text
from lora_fuse.machine.console import Console
from lora_fuse.machine.progress import byte_progress, estimate, human_bytes, human_rate, human_seconds, log, silence
from lora_fuse.pictures.cases import Sampling
from lora_fuse.pictures.render_progress import Task, passes, watching
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
PLAIN, GUIDED = Sampling(4, 1.0, " "), Sampling(40, 4.0, " ")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("NO_COLOR", "FORCE_COLOR", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def painted(line: str, stream: io.StringIO) -> str:
    text.say(line, stream)
    return stream.getvalue().removesuffix("\n")


# ---------------------------------------------------------------- the console


def test_a_stage_says_on_stderr_what_it_will_do_and_on_stdout_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.will("fuse", "2 files")
    console.warn("odd")
    console.done("fuse", "done", "fast", facts={"files": 2}, then="dvc repro verify")
    said = capsys.readouterr()
    assert said.out == "fuse: done\nfuse: fast\nfuse: next: dvc repro verify\n"
    assert said.err == "fuse: 2 files\nwarning: odd\n"


def test_under_dvc_nobody_is_told_what_comes_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "fuse")
    code = "from stages.run import ALONE; print(ALONE)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    Console(alone=False).done("fuse", "done", facts={}, then="dvc repro verify")
    assert capsys.readouterr().out == "fuse: done\n"


def test_quiet_says_only_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.will("fuse", "2 files")
    console.done("fuse", "done", facts={}, then="more")
    assert capsys.readouterr() == ("", "")
    console.warn("odd")
    console.wrong("verify", "x differs")
    assert capsys.readouterr() == ("", "warning: odd\nverify: x differs\n")


def test_json_is_one_object_also_of_a_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.done("fuse", "done", facts={"files": 2}, then="more")
    assert json.loads(capsys.readouterr().out) == {"stage": "fuse", "files": 2}
    console.failed("fuse", 2, "no room")
    assert json.loads(capsys.readouterr().out) == {"stage": "fuse", "code": 2, "error": "no room"}
    Console().failed("fuse", 2, "no room")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "colour"),
    [("passed: all", 32), ("no-golden: none", 33), ("FAILED, 2 problems", 31), ("artifacts/x", None)],
)
def test_a_verdict_is_in_colour_on_a_terminal_and_nowhere_else(
    line: str, colour: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    word, _, rest = line.partition(" ")
    in_colour = f"\x1b[1;{colour}m{word}\x1b[0m{' ' + rest if rest else ''}" if colour else line
    assert painted(line, Terminal()) == in_colour
    assert painted(line, io.StringIO()) == line
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert painted(line, io.StringIO()) == in_colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted(line, Terminal()) == line
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert painted(line, Terminal()) == line


# ---------------------------------------------------------------- progress


def test_numbers_are_said_as_people_read_them() -> None:
    assert [human_seconds(s) for s in (0.04, 9.94, 12.3, 99.4, 100, 3570, 4800)] == [
        *("0.0 s", "9.9 s", "12 s", "99 s", "2 min", "1 h 0 min", "1 h 20 min")
    ]
    assert human_rate(57e9, 100) == "57.0GB in 2 min (570MB/s)"
    assert human_bytes(0) == "0.00B"


def test_a_rate_is_remembered_for_the_next_run_and_guessed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate("fuse (cpu)", 41e9) == ""  # nothing was measured, so nothing is said
    clock = iter([0.0, 100.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with silence(), byte_progress("fuse (cpu)", 10**10) as add:
        add(10**10)
    assert estimate("fuse (cpu)", 41e9) == "; about 7 min at 100MB/s, as the last time"
    assert estimate("fuse (cpu)", 10**7) == ""  # a moment is not worth a word
    assert estimate("fuse (cuda)", 41e9) == ""


def test_what_is_short_small_or_broken_leaves_no_rate(tmp_path: Path) -> None:
    rates.remember("a", 10**9, 1.9)
    with pytest.raises(KeyboardInterrupt), silence(), byte_progress("b", 10**9):
        raise KeyboardInterrupt
    with silence(), byte_progress("c", 1000):
        pass
    assert not rates.rates_file().exists()
    rates.remember("a", 10**9, 2.0)
    assert rates.rates_file().is_relative_to(tmp_path)
    rates.rates_file().write_text("not JSON")
    assert rates.rate("a") is None
    rates.rates_file().unlink()
    rates.rates_file().parent.rmdir()
    rates.rates_file().parent.write_text("a file in the place of the folder")
    rates.remember("a", 10**9, 2.0)  # a cache that cannot be written is none
    assert rates.rate("a") is None


def test_elsewhere_than_on_a_terminal_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 4.0, 10.0, 12.0, 20.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with byte_progress("hash", 4 * 10**9) as add:
        for _ in range(4):
            add(10**9)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "hash: 2.00GB of 4.00GB, 10 s, 200MB/s, about 10 s left",
        "hash: 4.00GB of 4.00GB, 20 s, 200MB/s",
    ]


def test_silence_reaches_progress_and_words_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with silence():
        log("download: 5 files")
        with byte_progress("hash", 10**9) as add:
            thread = threading.Thread(target=add, args=[10**9])
            thread.start()
            thread.join()
    assert capsys.readouterr() == ("", "")
    log("download: 5 files")
    assert capsys.readouterr().err == "download: 5 files\n"


# ---------------------------------------------------------------- pictures


def test_a_picture_s_work_is_counted_in_calls_of_the_transformer() -> None:
    assert (passes(PLAIN), passes(GUIDED), passes(Sampling(40, 4.0, None))) == (4, 80, 40)
    task = Task("regress r", 7, (PLAIN, PLAIN, PLAIN, GUIDED))
    assert (task.pictures, task.work) == (28, 7 * 92)
    assert str(task) == "28 pictures, 4 of each of 7 cases"
    assert task.took(140.0) == "28 pictures in 2 min, 5.0 s each with loading"


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_every_picture_is_named_and_the_rest_guessed_from_those_that_are_done(
    ticking: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with watching(Task("regress r", 2, (PLAIN, PLAIN))) as shown:
        for side in ("merged", "unfused"):
            with shown.loading(side):
                pass
            for case in ("cat", "dog"):
                with shown.picture(side, case, PLAIN) as step:
                    for _ in range(4):
                        ticking[0] += 6.0
                        step()
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "regress: picture 1/4, cat merged, step 2/4, 6.00 s/step"  # nothing is known of the rest yet
    assert lines[2] == "regress: picture 2/4, dog merged, step 2/4, 6.00 s/step, about 60 s left"
    assert lines[-1] == "regress: picture 4/4, dog unfused, step 4/4, 6.00 s/step, about 0.0 s left"
    assert rates.rate("regress r") == 16 / 96


# ---------------------------------------------------------------- real programs


def on_a_terminal(*command: str, cwd: Path, **env: str) -> str:
    """What a program shows on a terminal of 80 columns, stdout and stderr together."""
    main_end, its_end = pty.openpty()
    size = "import fcntl, struct, termios; fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0)); "
    code = f"{size}import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    here = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **env}
    with subprocess.Popen(
        [sys.executable, "-c", code, *command], cwd=cwd, env=here, stdin=its_end, stdout=its_end, stderr=its_end
    ):
        os.close(its_end)
        said = b""
        try:
            while block := os.read(main_end, 1 << 16):
                said += block
        except OSError:  # Linux: nobody holds the other end any more
            pass
    os.close(main_end)
    return said.decode()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.write_component(tmp_path / "base", tiny.weights())
    tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors("diffusers"))
    return tmp_path


FUSE = ("-m", "lora_fuse", "fuse", "base", "out", "--lora", "l.safetensors", "--scale", "1.0")


def test_a_fuse_on_a_terminal_shows_a_bar_that_goes_and_then_what_came_of_it(place: Path) -> None:
    said = on_a_terminal(*FUSE, cwd=place)
    assert re.search(r"\rfuse \(cpu\): +\d+%\|", said)
    assert "\rmerged: out" in said.replace("\r\n", "\n")  # written where the bar was
    assert re.search(r"merged: out, .* in 4 files; written: .* in .* s \(.*/s\)", said)
    assert all(len(line) <= 80 for line in re.split(r"[\r\n]+", said) if line.startswith("fuse (cpu)"))


def test_quiet_programs_are_quiet(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on_a_terminal(*FUSE, "--quiet", cwd=place).replace("\x1b[0m", "") == ""  # a library resets its colours
    monkeypatch.chdir(place)
    assert main(["verify", "out", "base", "--lora", "l.safetensors", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["verify", "out", "base", "--lora", "l.safetensors", "--scale", "0.5", "--quiet"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "problem: " in said.err


def test_an_error_is_in_colour_on_a_terminal_only(tmp_path: Path) -> None:
    wrong = ("-m", "stages.gate", "nothing=1")
    assert "\x1b[1;31merror:\x1b[0m conf/ with nothing=1" in on_a_terminal(*wrong, cwd=ROOT)
    assert "\x1b" not in on_a_terminal(*wrong, cwd=ROOT, NO_COLOR="1")
