"""``python -m stages.validate [LORA …] [--recipe NAME] [--scale S]``: is a new version of a LoRA a good one?

Builds the recipe with it beside the current build, renders both, and says: the same (exit 0), changed as expected and
needs a reviewer (4), or broken, and by what (1). Without LORA it judges what the recipe names by what was approved.
Several are judged one by one, on the nodes of a Ray cluster with ``--ray [HOST:PORT]``; the exit code is the worst's.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence

import lora_fuse
import stages
from lora_fuse.errors import BadConfig
from lora_fuse.fleet import AUTO, Package, connected, project_files
from lora_fuse.machine import Console, OnceParser, staging
from lora_fuse.studies.validation import (
    ANSWER,
    VALIDATION,
    JudgedVersion,
    Outcome,
    Request,
    Validation,
    ValidationReport,
    several,
)
from stages.config import load
from stages.run import command, merge, parse, run

KEPT = "the current build is as it was; the same command starts anew"


def validate(request: Request, console: Console) -> int:
    """Write `validation.md`, `.html`, `.json` and `junit.xml`; the exit code is the answer."""
    return judged(request, console).exit_code


def judged(request: Request, console: Console) -> ValidationReport:
    """Validate, and return all that was found."""
    report, lines, facts = Validation.of(request, load(request.overrides), merge, command).run(console)
    if report.judgement.outcome is Outcome.BROKEN:
        console.wrong("validate", lines.pop(0))
    console.done("validate", *lines, facts=facts)
    return report


def validate_several(requests: Sequence[Request], ray: str | None, console: Console) -> int:
    """Write `versions/NAME/` for each, and `versions.md` and `versions.json`; the exit code is the worst's."""
    recipe = load(requests[0].overrides)
    folders = [several.folder_of(str(request.lora)) for request in requests]
    pairs = zip(requests, folders, strict=True)
    asked = [Validation.of(request, recipe, merge, command, folder) for request, folder in pairs]
    with staging.exclusive(VALIDATION):
        for path in ANSWER:
            staging.remove(path)
        found: dict[str, JudgedVersion] = {}
        for one in judge_all(asked, ray):
            console.will("validate", f"{len(found) + 1} of {len(asked)}, {one.lora}: {one.verdict}")
            found[one.lora] = one
        every = [found[str(request.lora)] for request in requests]
        code = several.write_table(every, lambda: command_of(requests, ray))
    for one in every:
        if one.code in (1, 2):
            console.wrong("validate", f"{one.lora}: {one.verdict}: {one.reason}")
    lines = [f"{one.lora}: {one.verdict}" for one in every if one.code not in (1, 2)]
    table = VALIDATION / "versions.md"
    facts = {"versions": {one.lora: one.facts for one in every}, "exit_code": code, "table": str(table)}
    console.done("validate", *lines, f"see {table}", facts=facts)
    return code


def judge_all(asked: Sequence[Validation], ray: str | None) -> Iterator[JudgedVersion]:
    """Judge versions, here or on the nodes of a cluster; each as it is done."""
    if ray is None:
        yield from map(several.judge_here, asked)
        return
    package = Package.of((lora_fuse, stages), project_files(recipe for one in asked for recipe in one.recipes))
    with connected(ray, package) as fleet:
        yield from several.judge_on(fleet, asked)


def requested(lora: str | None, name: str | None, scale: float | None, keep: bool, overrides: Sequence[str]) -> Request:
    """A request, with the command that asks for the same."""
    words = ["python -m stages.validate", *([shlex.quote(lora)] if lora else [])]
    words += [f"--{key} {value}" for key, value in (("name", name), ("scale", scale)) if value is not None]
    words += [f"--set {shlex.quote(override)}" for override in overrides]
    return Request(lora, name, scale, keep, tuple(overrides), " ".join(words))


def command_of(requests: Sequence[Request], ray: str | None) -> str:
    """The command that asks for several."""
    first, *options = requests[0].command.split(f" {shlex.quote(str(requests[0].lora))}", 1)
    words = [first, *(shlex.quote(str(request.lora)) for request in requests)]
    words += [] if ray is None else ["--ray"] if ray == AUTO else [f"--ray {shlex.quote(ray)}"]
    return " ".join(words) + "".join(options)


if __name__ == "__main__":
    parser = OnceParser(prog="python -m stages.validate", description="Judge new versions of a LoRA.")
    parser.add_argument("lora", nargs="*", metavar="LORA", help="owner/name[@revision]:file, or a file or PEFT folder")
    parser.add_argument("--recipe", help="that it is for (default: that of params.yaml)")
    parser.add_argument("--scale", type=float, help="to fuse it at (default: the recipe's)")
    parser.add_argument("--name", help="of the recipe's LoRA that it takes the place of, if there are several")
    parser.add_argument("--keep", action="store_true", help="keep the merged checkpoint; it is removed otherwise")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override, as of any stage")
    parser.add_argument("--ray", nargs="?", const=AUTO, metavar="HOST:PORT", help="judge on a cluster's nodes")
    given, said = parse(parser, ANSWER)
    overrides = [*([f"recipe={given.recipe}"] if given.recipe else []), *given.set]

    def work() -> int:
        """Judge one version, or several."""
        asked = list(dict.fromkeys(given.lora)) or [None]
        wanted = [requested(lora, given.name, given.scale, given.keep, overrides) for lora in asked]
        if len(wanted) == 1 and given.ray is None:
            return validate(wanted[0], said)
        if given.keep or not given.lora:
            if given.keep:
                raise BadConfig(f"--keep is for one LoRA on this machine, and here are {len(given.lora)}; leave it out")
            raise BadConfig("--ray judges the LoRAs that are named, and none is; name one or several")
        return validate_several(wanted, given.ray, said)

    sys.exit(run("validate", said, work, KEPT, ANSWER))
