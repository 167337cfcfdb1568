"""Stage `verify`: re-derive the merge independently; the gate decides on what it writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime

from lora_fuse.fusion import read_manifest
from lora_fuse.hub import streamed_base
from lora_fuse.machine import Console, files, progress
from lora_fuse.recipe import Artifacts, Lock, Manifest, Recipe, checkout, hf_cache, paths, records
from lora_fuse.verification import Expectation, Verification, check_files, verify_merge
from stages.run import PLAIN, run_stage


def verify(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `verify.json`."""
    base, loras = at.locks_of(recipe)
    manifest, manifest_sha256 = read_manifest(at.manifest)
    size = sum(file.size for file in manifest.files.values())
    clock = progress.Stopwatch()
    rows = "all rows" if recipe.verify.rows == "all" else f"{recipe.verify.rows} rows"
    console.will(
        "verify",
        f"derives {rows} of {manifest.targets} targets again, compares the rest{progress.estimate('verify', size)}",
    )
    with (
        streamed_base.open_locked(base, recipe.download) as arriving,
        paths.held([*([base] if arriving is None else []), *loras.values()]),
    ):
        found = verify_merge(
            at.merged,
            hf_cache.locate(base) if arriving is None else arriving.root,
            paths.lora_inputs(loras, recipe),
            rows=None if recipe.verify.rows == "all" else recipe.verify.rows,
            expected=_expectation(recipe, base, manifest),
            selection=recipe.fuse.selection,
            streamed=None if arriving is None else arriving.files,
        )
    for problem in [*check_files(manifest, at.merged), *_other_counts(manifest, found)]:
        found.problem(problem)
    _write(at, manifest_sha256, found)
    for warning in found.warnings:
        console.warn(warning)
    for problem in found.problems:
        console.wrong("verify", problem)
    outcome = "passed" if found.passed else f"FAILED, {found.problem_count} problems"
    drawn = f" and {found.drawn.rows} drawn at random" if found.drawn and found.drawn.rows else ""
    line = f"{outcome}: {found.targets} targets, {found.rows_checked} of {found.rows_total} rows{drawn} re-derived"
    same = f"{found.tensors_untouched} tensors and {found.files_untouched} files compared with the base"
    counts = {name: getattr(found, name) for name in ("targets", "rows_checked", "rows_total", "problem_count")}
    facts = {"passed": found.passed, **counts, "seconds": clock.seconds}
    console.done(
        "verify", line, f"{same}: {progress.human_rate(size, clock.seconds)}", facts=facts, then="dvc repro regress"
    )
    return 0


def _other_counts(manifest: Manifest, found: Verification) -> Iterator[str]:
    """Numbers of the manifest that are not those of the second derivation."""
    listed = sum(len(lora.left_out) for lora in manifest.loras)
    if found.left_out != listed:
        yield f"the manifest lists {listed} keys that are left out, and {found.left_out} are"
    if found.targets != manifest.targets:
        yield f"the manifest says {manifest.targets} targets, the LoRA files have {found.targets}"


def _expectation(recipe: Recipe, base: Lock, manifest: Manifest) -> Expectation:
    generated = frozenset(name for name, file in manifest.files.items() if file.origin == "generated")
    return Expectation(
        recipe.base.pipeline,
        recipe.scheduler_config,
        base_files=frozenset(base.files),
        generated=generated,
        dtype=recipe.fuse.dtype,
    )


def _write(at: Artifacts, manifest_sha256: str, found: Verification) -> None:
    """Write the result, which is the same for two right builds, and beside it what differs from run to run."""
    content = {"passed": found.passed, "manifest_sha256": manifest_sha256, **dataclasses.asdict(found)}
    drawn = content.pop("drawn") or {"seed": None, "rows": 0}
    if not found.left_out:
        del content["left_out"]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run = records.VerifyRecord(records.SCHEMA, manifest_sha256, drawn["seed"], drawn["rows"], checkout.this_tool(), now)
    files.replace_text(at.verify_run, records.to_json(run))
    files.replace_text(at.verify, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_stage(verify)
