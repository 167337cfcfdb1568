"""Prints the last run's verdict, a short table and where the report is; what `make repro` ends with."""

from __future__ import annotations

from lora_fuse.regression.report import summary_text
from stages.artifacts import HERE, Artifacts, read_object
from stages.config import run_stage
from stages.console import PLAIN, Console
from stages.params import Params


def summary(_: Params, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Print the table of `metrics.json`."""
    metrics = read_object(at.metrics, "regress")
    if console.as_json:
        console.done("summary", facts=metrics)
    else:
        print(at.worded(summary_text(metrics, str(at.report))))
    return 0


if __name__ == "__main__":
    run_stage(summary, writes=False)
