"""Jobs and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_fuse.errors import LoraFuseError
from lora_fuse.fleet.needs import Needs


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work: a name for a person, what its function gets, what it takes, and the Hub base that it reads."""

    label: str
    argument: Any
    needs: Needs
    base: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A job that ended: the host that it ran on, and its result or the error that it was refused with."""

    job: Job
    host: str
    result: Any = None
    error: LoraFuseError | None = None
