"""``python -m stages.validate [LORA] [--recipe NAME] [--scale S]``: is a new version of a LoRA a good one?

Builds the recipe with it beside the current build, renders both, and says: the same (exit 0), changed as expected and
needs a reviewer (4), or broken, and by what (1). Without LORA it judges what the recipe names by what was approved.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from lora_fuse.machine import Console, OnceParser, staging
from lora_fuse.pictures import environment
from lora_fuse.studies.validation import ANSWER, BUILD, VALIDATION, Outcome, Request, Validation, ValidationReport
from stages.config import load
from stages.run import command, merge, parse, run

KEPT = "the current build is as it was; the same command starts anew"


def validate(request: Request, console: Console) -> int:
    """Write `validation.md`, `.html`, `.json` and `junit.xml`; the exit code is the answer."""
    return judged(request, console).exit_code


def judged(request: Request, console: Console) -> ValidationReport:
    """Validate, and return all that was found."""
    with staging.exclusive(VALIDATION):
        recipe = load(request.overrides)
        validation = Validation.of(request, recipe, merge, command)
        validation.check()
        console.will("validate", validation.intent)
        regress = recipe.regress
        environment.make_deterministic(regress.threads)
        try:
            here = environment.environment(regress.placement, regress.dtype, compiled=regress.compile)
            report = validation.judge(here, console)
        finally:
            if not request.keep:
                staging.remove(BUILD.root)
        lines, facts = validation.write(report)
        if report.judgement.outcome is Outcome.BROKEN:
            console.wrong("validate", lines.pop(0))
        console.done("validate", *lines, facts=facts)
        return report


def requested(lora: str | None, name: str | None, scale: float | None, keep: bool, overrides: Sequence[str]) -> Request:
    """A request, with the command that asks for the same."""
    words = ["python -m stages.validate", *([shlex.quote(lora)] if lora else [])]
    words += [f"--{key} {value}" for key, value in (("name", name), ("scale", scale)) if value is not None]
    words += [f"--set {shlex.quote(override)}" for override in overrides]
    return Request(lora, name, scale, keep, tuple(overrides), " ".join(words))


if __name__ == "__main__":
    parser = OnceParser(prog="python -m stages.validate", description="Judge a new version of a LoRA.")
    parser.add_argument("lora", nargs="?", metavar="LORA", help="owner/name[@revision]:file, or a file or PEFT folder")
    parser.add_argument("--recipe", help="that it is for (default: that of params.yaml)")
    parser.add_argument("--scale", type=float, help="to fuse it at (default: the recipe's)")
    parser.add_argument("--name", help="of the recipe's LoRA that it takes the place of, if there are several")
    parser.add_argument("--keep", action="store_true", help="keep the merged checkpoint; it is removed otherwise")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override, as of any stage")
    given, said = parse(parser, ANSWER)
    overrides = [*([f"recipe={given.recipe}"] if given.recipe else []), *given.set]
    wanted = requested(given.lora, given.name, given.scale, given.keep, overrides)
    sys.exit(run("validate", said, lambda: validate(wanted, said), KEPT, ANSWER))
