"""Numbers of a `metrics.json`, each read as what it can be, and held against what follows from the files beside it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadSource
from lora_fuse.machine import files
from lora_fuse.pictures import metrics, picture
from lora_fuse.recipe import records
from lora_fuse.regression.goldens import AGAIN
from lora_fuse.regression.verdicts import Comparison, Verdict

MEASURED_AGAIN = ("psnr_db", "max_abs", "mean_abs", "changed_share")  # in milliseconds, by numpy alone
CLOSE = 1e-6  # relative; a record has nine digits


class RecordedNumbers:
    """The content of a `metrics.json`, read key by key."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.content = content
        self.path = path

    def check(self, name: str, follows: object) -> None:
        """Refuse what is said of `name` if it is not what follows; numbers may differ in the last of nine digits."""
        said = self.value(name)
        if isinstance(follows, float):
            follows = records.rounded(follows) if math.isfinite(follows) else None
            true = _close(self.number(name), follows)
        else:
            true = type(said) is type(follows) and said == follows
        if not true:
            raise self.untrue(name, follows)

    def untrue(self, name: str, follows: object) -> BadSource:
        """The refusal of what is said of `name`."""
        said = self.content[name]
        return BadSource(f"{self.path} says {name} {said}, and what lies here gives {follows}", rerun=AGAIN)

    def text(self, name: str) -> str:
        """A text; a verdict is one of `Verdict`."""
        said = self.value(name)
        if name.endswith(".verdict") and said not in list(Verdict):
            raise BadSource(f"{self.path} says {name} {said!r}, which is no verdict", rerun=AGAIN)
        return str(said)

    def comparison(self, pair: str, *, of_clips: bool = False) -> Comparison | None:
        """The distances of a pair, of clips those too that only they have; None where nothing was compared."""
        found = {name: self._distance(pair, name) for name in (metrics.EVERY if of_clips else metrics.METRICS)}
        identical = self.value(f"{pair}.identical")
        if found["max_abs"] is None:
            self.check(f"{pair}.identical", False)
            self.check(f"{pair}.psnr_db", None)
            return None
        self.check(f"{pair}.identical", found["max_abs"] == 0)
        if identical:
            self.check(f"{pair}.psnr_db", None)
        values = {name: math.nan if value is None else value for name, value in found.items()}
        return Comparison(values | ({"psnr_db": math.inf} if identical else {}))

    def measured_again(self, pair: str, said: Comparison | None, one: picture.Levels, other: picture.Levels) -> None:
        """Refuse numbers that the pictures of a pair do not have."""
        if (said is None) != (one.shape != other.shape):
            raise self.untrue(f"{pair}.max_abs", "a distance" if said is None else "none, the sizes differ")
        for name in MEASURED_AGAIN if said else ():
            self.check(f"{pair}.{name}", float(metrics.METRICS[name].measure(one, other)))

    def _distance(self, pair: str, metric: str) -> float | None:
        value = self.number(f"{pair}.{metric}")
        if value is not None and not metrics.EVERY[metric].can_be(value):
            raise BadSource(f"{self.path} says {pair}.{metric} {value}, which no two pictures can have", rerun=AGAIN)
        return value

    def number(self, name: str) -> float | None:
        """A number; None where it was not measured, or is infinite."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < sys.float_info.max:
            raise BadSource(f"{self.path} says {name} {value!r}, which is no number", rerun=AGAIN)
        return float(value)

    def value(self, name: str) -> Any:
        """Whatever is said of `name`, which is refused where nothing is."""
        if name not in self.content:
            raise BadSource(f"{self.path} has no {name!r}", rerun=AGAIN)
        return self.content[name]


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=CLOSE)


def read_judged(path: Path, sha256: str | None = None) -> picture.Levels:
    """A picture of a run; with a sha256, of a file that has it.

    Raises:
        BadSource: it cannot be read, or is another file.
    """
    try:
        found = files.hash_file(path).sha256 if sha256 else None
        if found != sha256:
            raise BadSource(f"{path} has sha256 {found}, and {sha256} was judged", rerun=AGAIN)
        return picture.read_levels(path)
    except OSError as error:
        raise BadSource(f"{path} cannot be read ({error.strerror or error})", rerun=AGAIN) from error
