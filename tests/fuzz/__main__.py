"""``python -m tests.fuzz [PARSER …] [--seconds S] [--seed N] [--jobs J]``: fuzz the parsers, a process each.

A parser is given or chosen by a part of its name. What fails is kept below `.fuzz/`, and is tried first the next time.
Exit 1: something failed.
"""

import argparse
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.bounds import ROOT
from tests.fuzz.campaign import Outcome, fuzz
from tests.fuzz.table import parsers

KEPT = ROOT / ".fuzz"
GRACE = 120.0  # seconds that a process may take beyond its time: imports, what it prepares, its last example


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each parser, as it ends, and how it all came out."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz every parser of foreign input.")
    parser.add_argument("names", nargs="*", metavar="PARSER", help="parts of names (default: all)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of them (default: an hour)")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat it (default: a new one)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process of one parser
    given = parser.parse_args(arguments)
    if given.one:
        outcome = fuzz(parsers()[given.names[0]], given.seconds, given.seed, _kept(given.names[0]))
        sys.stdout.write(json.dumps(asdict(outcome)))
        return 0
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    names = [name for name in parsers() if not given.names or any(part in name for part in given.names)]
    each = given.seconds * given.jobs / max(len(names), 1)
    print(f"{len(names)} parsers, {each:.0f} s each, {given.jobs} at a time, seed {seed}", flush=True)
    print(f"{'parser':45} {'examples':>9} {'read':>9} {'seconds':>8} {'failures':>8}", flush=True)
    begun = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = list(pool.map(lambda name: _in_a_process(name, each, seed), names))
    failures = sum(len(outcome.failures) for outcome in outcomes)
    examples = sum(outcome.examples for outcome in outcomes)
    came_to = f"{examples} examples of {len(names)} parsers in {time.monotonic() - begun:.0f} s"
    print(f"{came_to}: {failures} failures, seed {seed}")
    if failures:
        print(f"the inputs and tracebacks are in {KEPT}; again: python -m tests.fuzz --seed {seed}")
    return 1 if failures else 0


def _kept(name: str) -> Path:
    return KEPT / "".join(sign if sign.isalnum() or sign in ".-" else "_" for sign in name)


def _in_a_process(name: str, seconds: float, seed: int) -> Outcome:
    """Fuzz a parser in a process of its own, which a parser may end or hang."""
    command = [sys.executable, "-m", "tests.fuzz", "--one", name, "--seconds", str(seconds), "--seed", str(seed)]
    outcome = Outcome(name)
    begun = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + GRACE, check=False)
        if done.returncode == 0:
            outcome = Outcome(**json.loads(done.stdout))
        else:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            outcome.failures[f"the process ended with {done.returncode}: {last}; see {_kept(name)}/last"] = 1
    except subprocess.TimeoutExpired:
        outcome.failures[f"the process hangs; see {_kept(name)}/last"] = 1
    outcome.seconds = outcome.seconds or time.monotonic() - begun
    lines = [f"{name:45} {outcome.examples:9} {outcome.read:9} {outcome.seconds:8.1f} {len(outcome.failures):8}"]
    lines += [f"    {said} ({count} times)" for said, count in outcome.failures.items()]
    print("\n".join(lines), flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
