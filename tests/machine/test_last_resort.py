"""Laws of the last resort: nothing ends with a traceback, and nothing but a failed check ends with 1."""

import ast
import errno
import json
import os
import re
import runpy
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lora_fuse.errors import CheckFailed
from lora_fuse.machine import interrupts, last_resort
from tests.support.foreign import TOKEN
from tests.support.machine import ROOT

Raise = Callable[[], object]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this user's state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/lora-fuse"


def outside(number: int, name: str = "a/b.json") -> Raise:
    def fail() -> None:
        raise OSError(number, os.strerror(number), name)

    return fail


def nested() -> object:
    return nested()


def no_memory() -> None:
    raise MemoryError


def out_of_gpu() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def lost_library() -> None:
    import lora_fuse.nothing_of_this_name  # type: ignore[import-not-found]  # noqa: F401


# What nobody caught, and the line that is told of it.
OUTSIDE: dict[str, tuple[Raise, str]] = {
    "no right": (outside(errno.EACCES), r"verify: a/b\.json: Permission denied; give yourself the right to it"),
    "a full disk": (outside(errno.ENOSPC), r"verify: a/b\.json: No space left on device; make room on its disk"),
    "a disk that fails": (outside(errno.EIO), r"verify: a/b\.json: Input/output error; check its disk"),
    "another number": (outside(errno.EXDEV), r"verify: a/b\.json: Invalid cross-device link; look at it"),
    "no memory": (no_memory, r"verify: the memory is not enough; end other programs.*"),
    "no memory of a GPU": (out_of_gpu, r"verify: the memory is not enough \(CUDA out of memory.*\); end.*"),
    "too deep": (nested, r"verify: something is nested too deeply \(maximum recursion.*"),
    "no library": (lost_library, r"verify: No module named 'lora_fuse\.nothing.*; the installation is not whole.*"),
}


def guarded(work: Raise) -> int:
    def told() -> int:
        work()
        return 0

    return interrupts.guarded(told, doing="verify")


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_the_machine_refuses_is_one_line_with_a_way_out(
    what: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, line = OUTSIDE[what]
    assert guarded(work) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"error: {line}.*\n", captured.err), captured.err
    assert captured.out == ""
    assert not state.exists()


def broken_text() -> None:
    raise yaml.YAMLError("not closed")


def cut_picture() -> None:
    Image.frombytes("RGB", (4, 4), b"short")


LIBRARIES: dict[str, tuple[Raise, str]] = {
    "by its class": (broken_text, "yaml"),
    "by who called last": (cut_picture, "PIL"),
    "of Python": (lambda: json.loads("{"), "json"),
    "no text": (b"\xff".decode, "Python"),
}


@pytest.mark.parametrize("what", LIBRARIES)
def test_what_a_library_raises_names_it_and_where_the_traceback_is(
    what: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, library = LIBRARIES[what]
    assert guarded(work) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: verify: {library} cannot go on.* \(.*\); the traceback is in {state}/\S+\n", error)


def at_fault() -> object:
    path = Path("some/file.json")
    nothing: dict[str, object] = {}
    return nothing[f"{path} {TOKEN}\x1b[2J"]


def test_a_bug_is_one_line_and_its_traceback_a_file_of_this_user_without_the_token(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(at_fault) == 2
    captured = capsys.readouterr()
    line = re.fullmatch(
        r"error: verify: this is a bug in lora-fuse, at work on some/file\.json: KeyError: .* "
        r"\(test_last_resort\.py:\d+\); the traceback is in (\S+), please report it\n",
        captured.err,
    )
    assert line, captured.err
    log = Path(line[1])
    assert log.parent == state
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    text = log.read_text(encoding="utf-8")
    assert "Traceback" in text
    assert "in at_fault" in text
    assert TOKEN not in text + captured.err
    assert "\x1b" not in text + captured.err


def test_a_traceback_is_printed_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(last_resort.DEBUG, "1")
    assert guarded(at_fault) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: verify: this is a bug")


@pytest.mark.usefixtures("state")
def test_a_traceback_goes_elsewhere_where_there_is_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert guarded(at_fault) == 2
    assert f"the traceback is in {tmp_path}/temporary/lora-fuse/" in capsys.readouterr().err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert guarded(at_fault) == 2
    assert "no traceback can be kept, LORA_FUSE_DEBUG=1 shows it" in capsys.readouterr().err


def test_codes_are_kept_and_words_are_no_failed_check(capsys: pytest.CaptureFixture[str]) -> None:
    def failed() -> None:
        raise CheckFailed("the check failed")

    assert guarded(failed) == 1
    assert guarded(lambda: sys.exit("some words")) == 2
    assert capsys.readouterr().err == "error: the check failed\nerror: some words\n"
    with pytest.raises(SystemExit, match="3"):
        guarded(lambda: sys.exit(3))


def test_a_thread_that_nobody_waits_for_ends_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        thread = threading.Thread(target=at_fault)
        thread.start()
        thread.join()

    before = threading.excepthook
    assert guarded(work) == 0
    assert re.fullmatch("error: in a thread: this is a bug .*\n", capsys.readouterr().err)
    assert threading.excepthook is before


def test_a_program_gets_the_same_answer_as_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.run.load", lambda *_: np.zeros(2) @ np.zeros(3))
    monkeypatch.setattr("sys.argv", ["goldens.py", "--json"])
    monkeypatch.delitem(sys.modules, "stages.goldens", raising=False)  # another test may have imported it
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("stages.goldens", run_name="__main__", alter_sys=False)
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert captured.err == f"error: {answer['error']}\n"
    assert (answer["stage"], answer["code"]) == ("goldens", 2)


# What happens before and after the work is guarded, in a process of its own; the code that the shell gets.
BEFORE = {
    "an import that fails": ("import stages; import nothing_of_this_name", 2, "No module named"),
    "Ctrl-C in an import": ("import stages; raise KeyboardInterrupt", -2, "interrupted; whole results stay"),
    "a bug": ("import benchmarks; {}['x']", 2, "this is a bug in lora-fuse"),
}


@pytest.mark.parametrize("what", BEFORE)
def test_before_its_work_a_program_ends_with_a_line_too(what: str) -> None:
    code, expected, words = BEFORE[what]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == expected
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_line_has_the_hook_before_it_imports() -> None:
    code = "import sys, runpy; sys.modules['numpy'] = None; runpy.run_module('lora_fuse', run_name='__main__')"
    command = [sys.executable, "-c", code, "inspect", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: .*numpy.*; the installation is not whole: .*\n", done.stderr), done.stderr


def ends_with_words(node: ast.AST) -> bool:
    """Python prints them, and ends with 1."""
    is_end = isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "SystemExit", "exit", "quit")
    return is_end and any(
        isinstance(given, ast.JoinedStr) or (isinstance(given, ast.Constant) and isinstance(given.value, str))
        for given in getattr(node, "args", ())
    )


def test_every_program_s_work_is_guarded_and_none_ends_with_words() -> None:
    tops = ("lora_fuse", "stages", "pocket", "benchmarks")
    sources = {path: path.read_text(encoding="utf-8") for top in tops for path in (ROOT / top).rglob("*.py")}
    worded = [path for path, source in sources.items() if any(map(ends_with_words, ast.walk(ast.parse(source))))]
    programs = [path for path, source in sources.items() if '__name__ == "__main__"' in source]
    guard = re.compile(r"guarded\(|run_stage\(|run\(|install\(")
    assert (worded, [path for path in programs if not guard.search(sources[path])]) == ([], [])
    assert len(programs) > 20
    assert ends_with_words(ast.parse("sys.exit(f'x')").body[0].value)  # type: ignore[attr-defined]
