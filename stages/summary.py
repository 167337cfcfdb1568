"""Prints the last run's verdict, a short table and where the report is; what `make repro` ends with."""

from __future__ import annotations

from lora_fuse.regression.report import summary_text
from stages.artifacts import METRICS, REPORT, read_object
from stages.config import run_stage
from stages.params import Params


def summary(_: Params) -> int:
    """Print the table of `metrics.json`."""
    print(summary_text(read_object(METRICS, "regress"), str(REPORT)))
    return 0


if __name__ == "__main__":
    run_stage(summary)
