"""Prints the last run's verdict, a short table and where the report is; what `make repro` ends with."""

from __future__ import annotations

from lora_fuse.machine.console import PLAIN, Console
from lora_fuse.recipe.paths import HERE, Artifacts, read_object
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.regression.report import next_step, summary_text
from stages.run import command, run_stage


def summary(_: Recipe, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Print the table of `metrics.json`."""
    metrics = read_object(at.metrics, "regress")
    if console.as_json:
        console.done("summary", facts=metrics)
    else:
        print(summary_text(metrics, str(at.report), command(next_step(metrics), at)))
    return 0


if __name__ == "__main__":
    run_stage(summary, writes=False)
