"""The steps of the pipeline: one thin module per stage, each reads parameters, calls the library, writes artifacts."""

from __future__ import annotations

import sys

from lora_fuse.errors import require
from lora_fuse.machine import interrupts

interrupts.install("whole results stay, `dvc repro` goes on")


def _installed() -> int:
    require("hydra", "a stage")
    return 0


if interrupts.guarded(_installed) != 0:
    sys.exit(2)
