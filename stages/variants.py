"""``python -m stages.variants [NAME …] --ray [HOST:PORT]``: build and judge variants on the nodes of a Ray cluster.

Every variant goes through the stages of variants/dvc.yaml up to the gate, on a node of its own; locks, manifest,
verification and pictures come back to `artifacts/variants/NAME`, weights do not. The exit code is the worst's: 1 a
gate failed, 2 refused, 3 no approved picture, 4 a person has to look, 0 all passed. Without ``--ray``, DVC builds them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lora_fuse
import stages
from lora_fuse.errors import BadConfig, LoraFuseError
from lora_fuse.fleet import AUTO, Demands, Job, Package, archive, connected, project_files
from lora_fuse.machine import Console, OnceParser, files, staging
from lora_fuse.recipe import Artifacts, Recipe
from lora_fuse.regression import gate as decisions
from stages.config.variants import COMPILED, read_compiled, refuse_unknown
from stages.download import download
from stages.export import export_formats
from stages.fuse import fuse
from stages.goldens import goldens
from stages.regress import regress
from stages.run import next_commands, parse, run
from stages.verify import verify

WEIGHTS = ("merged", "export")  # of this machine, and right as long as the manifest is the same
OWN = (".lock", "publish.json", "release")  # of what was published from here
UNSENT = ("merged/", "export/", "sources.json")  # weights, and the note of what was fetched to the node
WORST = (1, 2, 3, 4, 0)  # exit codes
KEPT = "the variants that are here stay; the same command goes on with the rest"


@dataclass(frozen=True, slots=True)
class VariantWork:
    """A variant for a node: its parameters, and the same with every branch at its commit."""

    name: str
    recipe: Recipe
    pinned: Recipe


@dataclass(frozen=True, slots=True)
class BuiltVariant:
    """A variant from a node: the gate's exit code and reason, its folder as an archive, and its base's lock."""

    code: int
    reason: str
    folder: bytes
    base_lock: str


def build_variant(work: VariantWork) -> BuiltVariant:
    """Take a variant through its stages, in the folder of a job.

    Raises:
        LoraFuseError: a stage refused it.
    """
    recipe = work.recipe
    at = Artifacts.of_variant(work.name, recipe)
    quiet = Console(quiet=True, variant=work.name)
    with next_commands(at):
        download(work.pinned, at, quiet)
        base, loras = at.read_locks()  # as a download here would have made them: of the revision that is asked for
        asked = {name: replace(lock, requested=recipe.loras[name].revision) for name, lock in loras.items()}
        at.write_locks(replace(base, requested=recipe.base.revision), asked)
        for stage in (fuse, verify, export_formats, goldens, regress):
            stage(recipe, at, quiet)
        decision = decisions.decide(recipe, at)
    content = archive.pack(at.root, lambda name: not name.startswith(UNSENT))
    return BuiltVariant(decision.code, decision.reason, content, files.read_text(at.base_lock))


def variants(names: Sequence[str], ray: str, console: Console) -> int:
    """Build variants on the nodes of a cluster, and take each one's records as it ends."""
    compiled = read_compiled()
    for name in names:
        refuse_unknown("variant", name, compiled.builds, COMPILED)
    recipes = {name: compiled.params(name) for name in names or compiled.builds}
    if not recipes:
        raise BadConfig(f"{COMPILED} has no variants; list them in conf/variants.yaml")
    codes: dict[str, int] = {}
    with connected(ray, Package.of((lora_fuse, stages), project_files(recipes.values()))) as fleet:
        jobs = _jobs(recipes)
        console.will("variants", f"{len(jobs)} variants for {fleet}")
        for done in fleet.run(build_variant, jobs):
            work: VariantWork = done.job.argument
            codes[work.name] = take(work, done.error or done.result, console)
    code = next(code for code in WORST if code in codes.values())
    facts = {"codes": codes, "exit_code": code}
    line = f"{len(codes)} variants, the worst exit code is {code}"
    console.done("variants", line, facts=facts, then="python -m stages.catalog")
    return code


def _jobs(recipes: dict[str, Recipe]) -> list[Job]:
    """The job of each variant, at the commits that it is locked to, or that its branches mean now."""
    jobs = []
    for name, recipe in recipes.items():
        base, loras = Artifacts.of_variant(name, recipe).earlier_locks()
        pinned, needs = Demands(loras.values() if base is None else [base, *loras.values()]).of(recipe)
        jobs.append(Job(name, VariantWork(name, recipe, pinned), needs, recipe.base.repo_id))
    return jobs


def take(work: VariantWork, result: BuiltVariant | LoraFuseError, console: Console) -> int:
    """Put what a node sent in its place; the exit code of the variant."""
    if isinstance(result, LoraFuseError):
        console.wrong("variants", f"{work.name}: refused: {result}")
        return result.exit_code
    at = Artifacts.of_variant(work.name, work.recipe)
    at.root.mkdir(parents=True, exist_ok=True)
    with staging.holding(at.root):
        stays = (*OWN, *WEIGHTS) if _is_same(at.manifest, result.folder) else OWN
        archive.unpack(result.folder, at.root, stays=stays)
        files.replace_text(at.base_lock, result.base_lock)
    (console.wrong if result.code == 1 else console.will)("variants", f"{work.name}: {result.reason}")
    return result.code


def _is_same(manifest: Path, content: bytes) -> bool:
    """True where weights that are here have the manifest that a node sends."""
    return manifest.exists() and archive.read(content, manifest.name) == files.read_bytes(manifest)


if __name__ == "__main__":
    parser = OnceParser(prog="python -m stages.variants", description="Build variants on the nodes of a cluster.")
    parser.add_argument("name", nargs="*", metavar="NAME", help="of variants/params.yaml (default: all of them)")
    parser.add_argument("--ray", nargs="?", const=AUTO, metavar="HOST:PORT", help="the head (default: this machine's)")
    given, said = parse(parser)

    def work() -> int:
        """Build them."""
        if given.ray is None:
            raise BadConfig(
                "on this machine DVC builds variants, `dvc repro variants/dvc.yaml`; give --ray for a cluster"
            )
        return variants(list(dict.fromkeys(given.name)), given.ray, said)

    sys.exit(run("variants", said, work, KEPT))
