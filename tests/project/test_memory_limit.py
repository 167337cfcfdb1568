"""A limit of memory holds, and what is held is seen, also below a process and without what files back."""

import sys
from pathlib import Path

from benchmarks.memory_limit import run_limited

MB = 1 << 20
# In a process below, as the Hub client's worker is: what it is given in MB, held for a moment.
HOLD = "import sys, time; held = b'x' * (int(sys.argv[1]) << 20); time.sleep(0.3); print('held')"
BELOW = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {HOLD!r}, sys.argv[1]]))"
MAPPED = (
    "import mmap, sys, time; file = open(sys.argv[1]); held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ);"
    "sum(held[::4096]); time.sleep(0.3); print('held')"
)


def run(code: str, argument: object, limit: int | None) -> tuple[bool, int]:
    done = run_limited([sys.executable, "-c", code, str(argument)], limit)
    return done.code == 0 and done.output == "held\n", done.peak


def test_more_than_the_limit_fails_and_what_is_held_below_is_seen() -> None:
    well, peak = run(BELOW, 120, 160 * MB)
    assert well
    assert 120 * MB < peak < 160 * MB
    assert run(BELOW, 200, 160 * MB)[0] is False
    assert run(BELOW, 200, None)[0] is True


def test_what_a_file_backs_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(200 * MB))
    well, peak = run(MAPPED, tmp_path / "file", 100 * MB)
    assert well
    assert peak < 50 * MB
