"""What is expensive is made once in a run of the tests, whichever of its processes asks first."""

import fcntl
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Once:
    """A folder that all processes of a run share."""

    root: Path

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder `name`, filled by `make` in the first process that asks; the others wait for it.

        It is only to be read: a test that changes something works in a copy. Where `make` fails, it fails for each
        process that asks.
        """
        self.root.mkdir(exist_ok=True)
        folder = self.root / name
        done = self.root / f"{name}.done"
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder
