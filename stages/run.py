"""What a stage says: what it will do, what is wrong, and at the end what it did; all of them say it in the same way."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lora_fuse.cli import guarded
from lora_fuse.errors import BadConfig, LoraFuseError
from lora_fuse.machine.console import painted
from lora_fuse.machine.interrupts import exit_code
from lora_fuse.machine.launch import this_process
from lora_fuse.machine.progress import silence
from lora_fuse.machine.staging import holding
from lora_fuse.recipe.paths import HERE, Artifacts
from stages.config import load

KEPT = "earlier results are as they were; `dvc repro` goes on with this stage"


@dataclass(frozen=True, slots=True)
class Console:
    """Where a stage's words go: results to stdout, all else to stderr.

    Attributes:
        quiet: says nothing but warnings and what is wrong.
        as_json: the result is one JSON object instead of lines.
        variant: whose stages speak, which are called ``gate@VARIANT``, as DVC calls them; None for the main build.
    """

    quiet: bool = False
    as_json: bool = False
    variant: str | None = None

    def _name(self, stage: str) -> str:
        return stage if self.variant is None else f"{stage}@{self.variant}"

    @property
    def _whose(self) -> dict[str, str]:
        return {} if self.variant is None else {"variant": self.variant}

    def will(self, stage: str, sentence: str) -> None:
        """Say what is about to be done."""
        if not self.quiet:
            print(f"{self._name(stage)}: {sentence}", file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """Say what may be a mistake."""
        print(painted(f"warning: {sentence}", sys.stderr), file=sys.stderr, flush=True)

    def wrong(self, stage: str, sentence: str) -> None:
        """Say what a check found."""
        print(f"{self._name(stage)}: {painted(sentence, sys.stderr)}", file=sys.stderr, flush=True)

    def done(self, stage: str, *lines: str, facts: Mapping[str, object], then: str | None = None) -> None:
        """Say what was done.

        Args:
            stage: its name.
            lines: for a person.
            facts: for a program, JSON values by name.
            then: the command that comes next; not said where DVC runs the stage, as it goes on by itself.
        """
        if self.as_json:
            print(json.dumps({"stage": stage, **self._whose, **facts}), flush=True)
        elif not self.quiet:
            ending = [f"next: {then}"] if then and "DVC_STAGE" not in os.environ else []
            said = [f"{self._name(stage)}: {painted(line, sys.stdout)}\n" for line in [*lines, *ending]]
            print("".join(said), end="", flush=True)

    def failed(self, stage: str, code: int, sentence: str) -> None:
        """Say to a program that the stage was refused; a person is told by `lora_fuse.cli.guarded`."""
        if self.as_json:
            print(json.dumps({"stage": stage, **self._whose, "code": code, "error": sentence}), flush=True)


PLAIN = Console()


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Console]:
    """The arguments of a command that has its own, and ``--quiet`` and ``--json`` as every stage has them."""
    parser.add_argument("--quiet", action="store_true", help="say only what is wrong")
    parser.add_argument("--json", action="store_true", help="say it as one JSON object")
    given = parser.parse_args()
    return given, Console(given.quiet, given.json)


def run(name: str, console: Console, work: Callable[[], int], kept: str = KEPT) -> int:
    """Do a stage's work; what was refused or interrupted is said in one way.

    Args:
        name: the stage's.
        console: what it says things by.
        work: gives the exit code.
        kept: what an interrupted run leaves, and how to go on.

    Returns:
        The exit code.
    """

    def told() -> int:
        try:
            with silence() if console.quiet else nullcontext():
                return work()
        except LoraFuseError as error:
            console.failed(name, error.exit_code, str(error))
            raise
        except KeyboardInterrupt as interrupt:
            console.failed(name, exit_code(interrupt), f"interrupted; {kept}")
            raise

    return guarded(told, kept)


def run_stage(
    stage: Callable[..., int],
    *flags: str,
    kept: str = KEPT,
    read: Callable[[Sequence[str]], object] | None = None,
    at: Artifacts = HERE,
    spread: bool = False,
    writes: bool = True,
) -> None:
    """Run a stage as a program: its parameters by the rule above, its errors as one line, its result as exit code.

    Args:
        stage: gets the parameters, where its results go, how it says things, and by keyword whether a flag is given.
        flags: names of arguments (``dry-run`` for ``--dry-run``, keyword `dry_run`) that are no overrides and do not
            count for the rule; every stage also knows ``--quiet``, ``--json`` and ``--variant NAME``.
        kept: what an interrupted run leaves, and how to go on.
        read: makes something else than parameters from the overrides; there is no ``--variant`` then.
        at: where its results go.
        spread: whether a launcher may start it as several processes; the first of them writes.
        writes: whether it holds the build's folder, so that no other does anything to it meanwhile.
    """
    known = ("quiet", "json", *flags)
    given = {flag: f"--{flag}" in sys.argv[1:] for flag in known}
    rest = [argument for argument in sys.argv[1:] if argument.removeprefix("--") not in known]
    here = this_process()
    console = Console(given["quiet"] or not here.is_first, given["json"] and here.is_first)
    chosen = {flag.replace("-", "_"): given[flag] for flag in flags}
    name = Path(sys.argv[0]).stem

    def work() -> int:
        if not (spread or here.is_alone):
            raise BadConfig(f"{name} runs as one process, and a launcher started {here.count}")
        variant, overrides = _variant(rest) if read is None else (None, rest)
        params = load(overrides, variant) if read is None else read(overrides)
        where = at if variant is None else Artifacts.of_variant(variant, load(variant=variant))
        holds = holding(where.root) if writes and here.is_first else nullcontext()
        with where.own_commands(), holds:
            return stage(params, where, replace(console, variant=variant), **chosen)

    sys.exit(run(name, console, work, kept))


def _variant(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The variant that the arguments name, if any, and the overrides among them."""
    rest, variant = list(arguments), None
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--variant":
            value = value if equals else "".join(arguments[at + 1 : at + 2])
            if variant is not None or not value:
                raise BadConfig("--variant takes one name: python -m stages.fuse --variant NAME")
            variant = value
            del rest[at : at + (1 if equals else 2)]
    return variant, rest
