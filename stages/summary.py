"""Prints the last run's verdict, a short table and where the report is; what `make repro` ends with."""

from __future__ import annotations

from lora_fuse.machine import Console
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.regression import gate, run_record
from stages.run import PLAIN, command, run_stage


def summary(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Print the table of `metrics.json`, if the gate can decide on it."""
    decision = gate.decide(recipe, at)
    then = command(decision.then, at)
    if console.as_json:
        console.done("summary", facts=dict(decision.metrics))
    elif decision.metrics:
        run = run_record.read_run(at)
        text = gate.summary_text(decision.metrics, run, str(at.report), then, decision.approved)
        console.rows(text.split("\n"))
    else:
        console.rows([f"FAILED, {decision.reason}", f"next: {then}"])
    return 0


if __name__ == "__main__":
    run_stage(summary, writes=False)
