"""Prints the last run's verdict, a short table and where the report is; what `make repro` ends with."""

from __future__ import annotations

from lora_fuse.machine import Console
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.regression import gate, run_record
from stages.run import PLAIN, command, run_stage


def summary(_: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Print the table of `metrics.json`."""
    metrics = paths.read_object(at.metrics, "regress")
    if console.as_json:
        console.done("summary", facts=metrics)
    else:
        run = run_record.read_run(at)
        then = command(gate.next_step(metrics), at)
        console.rows(gate.summary_text(metrics, run, str(at.report), then).split("\n"))
    return 0


if __name__ == "__main__":
    run_stage(summary, writes=False)
