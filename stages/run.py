"""Runs a stage as a program: reads its arguments, reports errors and interrupts in one way, names the next command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from lora_fuse.errors import BadConfig, Busy, LoraFuseError, Rerun, naming_extras
from lora_fuse.fleet import AUTO
from lora_fuse.machine import Console, interrupts, launch, progress, staging
from lora_fuse.recipe import Artifacts, Lock, Recipe, checkout, paths
from stages.config import load

ALONE = "DVC_STAGE" not in os.environ  # DVC goes on with the next stage by itself
PLAIN = Console()  # of a stage that is called, and not run as a program
KEPT = "earlier results are as they were; `dvc repro` goes on with this stage"


def parse(parser: argparse.ArgumentParser, pages: Iterable[Path] = ()) -> tuple[argparse.Namespace, Console]:
    """The arguments of a command that has its own, and ``--quiet`` and ``--json`` as every stage has them.

    `pages` are as of `run`.
    """
    parser.add_argument("--quiet", action="store_true", help="say only what is wrong")
    parser.add_argument("--json", action="store_true", help="say it as one JSON object")
    try:
        given = parser.parse_args()
    except SystemExit as end:
        if end.code:  # a usage error, and no --help
            _remove(pages)
        raise
    return given, Console(given.quiet, given.json, alone=ALONE)


def _remove(pages: Iterable[Path]) -> None:
    for page in pages:
        staging.remove(page)


def run(name: str, console: Console, work: Callable[[], int], kept: str = KEPT, pages: Iterable[Path] = ()) -> int:
    """Do a stage's work and return its exit code; report a refusal or an interrupt in one way.

    `pages`, files and folders, are what an earlier request was answered with: one that fails leaves none of them to be
    taken for its own answer, unless another run is at work and will write them.
    """

    def told() -> int:
        try:
            with naming_extras(name), progress.silence() if console.quiet else nullcontext():
                return work()
        except Exception as error:
            if not isinstance(error, Busy):
                _remove(pages)
            known = interrupts.refusal(error, name)
            console.failed(name, known.exit_code, str(known))
            if known is error:
                raise
            raise known from error
        except KeyboardInterrupt as interrupt:
            console.failed(name, interrupts.exit_code(interrupt), f"interrupted; {kept}")
            raise

    return interrupts.guarded(told, kept)


def run_stage(
    stage: Callable[..., int],
    *flags: str,
    kept: str = KEPT,  # what an interrupted run leaves, and how to go on
    read: Callable[[Sequence[str]], object] | None = None,  # makes else than parameters of the overrides, no variant's
    at: Artifacts = paths.HERE,
    spread: bool = False,  # a launcher may start it as several processes; the first of them writes
    writes: bool = True,  # it holds the build's folder, so that no other changes it meanwhile
    pages: Iterable[Path] = (),  # what it answers with, as of `run`
) -> None:
    """Run a stage as a program: its parameters by the rule above, its errors as one line, its result as exit code.

    The stage gets the parameters, the paths of its results, a console, and each flag by keyword (``--dry-run`` as
    `dry_run`); flags are no overrides. Every stage also knows ``--quiet``, ``--json`` and ``--variant NAME``.
    """
    known = ("quiet", "json", *flags)
    given = {flag: f"--{flag}" in sys.argv[1:] for flag in known}
    rest = [argument for argument in sys.argv[1:] if argument.removeprefix("--") not in known]
    here = launch.this_process()
    console = Console(given["quiet"] or not here.is_first, given["json"] and here.is_first, alone=ALONE)
    chosen = {flag.replace("-", "_"): given[flag] for flag in flags}
    name = Path(sys.argv[0]).stem

    def work() -> int:
        if not (spread or here.is_alone):
            raise BadConfig(f"{name} runs as one process, and a launcher started {here.count}")
        variant, overrides = _variant(rest) if read is None else (None, rest)
        params = load(overrides, variant) if read is None else read(overrides)
        where = at if variant is None else Artifacts.of_variant(variant, load(variant=variant))
        holds = staging.holding(where.root) if writes and here.is_first else nullcontext()
        with next_commands(where, params if isinstance(params, Recipe) else None), holds:
            return stage(params, where, replace(console, variant=variant), **chosen)

    interrupts.leave(run(name, console, work, kept, pages))


def _variant(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The variant that the arguments name, if any, and the overrides among them."""
    rest = list(arguments)
    variant: str | None = None
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--variant":
            value = value if equals else "".join(arguments[at + 1 : at + 2])
            if variant is not None or not value:
                raise BadConfig("--variant takes one name: python -m stages.fuse --variant NAME")
            variant = value
            del rest[at : at + (1 if equals else 2)]
    return variant, rest


def take_ray(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The other arguments, and the address of ``--ray [HOST:PORT]``; an override has a ``=``, ``~`` or ``+``."""
    rest = list(arguments)
    for at, argument in enumerate(arguments):
        name, equals, address = argument.partition("=")
        if name != "--ray":
            continue
        after = "" if equals else "".join(arguments[at + 1 : at + 2])
        is_address = bool(after) and "=" not in after and after[0] not in "~+-"
        del rest[at : at + (2 if is_address else 1)]
        if "--ray" in (word.partition("=")[0] for word in rest):
            raise BadConfig("--ray is given more than once; give one address")
        return rest, address or (after if is_address else AUTO)
    return rest, None


def command(step: Rerun, at: Artifacts = paths.HERE) -> str:
    """The command line that runs a step of a build: of a variant, with its own targets."""
    whose = "" if at.variant is None else f" --variant {at.variant}"
    if step.stage == "restore":
        return " && ".join(_restoring(Path(path)) for path in step.settings)
    if step.stage == "config":
        return "python -m stages.config"
    if step.stage == "bind":
        return 'python -m stages.approve --bind --reason "…"'
    if step.stage == "approve":
        cases = "".join(f" --case {case}" for case in step.cases)
        return f'python -m stages.approve{whose}{cases} --reason "…"' + ("  # if it is meant" if cases else "")
    if step.settings:
        own = [setting for setting in step.settings if at.variant is None or not setting.startswith("recipe=")]
        return " ".join([f"python -m stages.{step.stage}{whose}", *own])
    return _repro(step, at)


def _repro(step: Rerun, at: Artifacts) -> str:
    stages = [] if step.stage == "build" else step.stage.split()
    if step.stage == "publish":
        if at.variant is not None and not at.published:
            return "python -m stages.catalog"
        stages = ["publish/dvc.yaml" if at.variant is None else f"publish/dvc.yaml:variant@{at.variant}"]
    elif at.variant is not None:
        stages = [f"variants/dvc.yaml:{stage}@{at.variant}" for stage in stages or ["gate"]]
    return " ".join(["dvc repro", *(["-f"] if step.force else []), *stages])


def _restoring(path: Path) -> str:
    """Bring back what was approved: from git, or from DVC where a folder above is kept there."""
    kept = checkout.tracked(path)
    return f"git checkout {path}" if kept == path else f"dvc checkout --force {kept}"


def merge(recipe: Recipe, at: Artifacts, base: Lock, loras: Mapping[str, Lock]) -> None:
    """Fuse and verify pinned files beside the main build, in silence; the caller reads `verify.json`."""
    from stages.fuse import fuse
    from stages.verify import verify

    at.write_locks(base, loras)
    for stage in (fuse, verify):
        stage(recipe, at, Console(quiet=True))


@contextmanager
def next_commands(at: Artifacts, recipe: Recipe | None = None) -> Iterator[None]:
    """Let what is refused in here end with the command that is its way out, where it has one.

    Where the `recipe` streams its base, what needs it on this machine has to have it fetched.
    """
    try:
        yield
    except LoraFuseError as error:
        if error.rerun is None:
            raise
        again = error.rerun
        if recipe is not None and recipe.streams and again.stage == "download":
            again = Rerun("download", settings=(f"recipe={recipe.name}", "download.stream=false"))
        raise type(error)(f"{error}; next: {command(again, at)}") from error
