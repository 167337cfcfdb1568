"""The steps of the pipeline: one thin module per stage, each reads parameters, calls the library, writes artifacts."""

from __future__ import annotations

import sys
from types import TracebackType

from lora_fuse.errors import require
from lora_fuse.machine import interrupts, text


def _last_resort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a stage is being imported, or again while it ends: a line, as `interrupts.guarded` has it."""
    if issubclass(kind, KeyboardInterrupt):
        text.say("error: interrupted; whole results stay, `dvc repro` goes on", sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _last_resort


def _installed() -> int:
    require("hydra", "a stage")
    return 0


if interrupts.guarded(_installed) != 0:
    sys.exit(2)
