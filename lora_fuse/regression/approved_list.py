"""The list of a folder of goldens, `SHA256SUMS`: an approval writes it, and it binds pictures and records together.

A golden that the list does not have, one that it has and that is gone, and a byte that is another one are refused:
so a record that was edited, a pair that was swapped and a picture that was put there are no goldens. The format is
that of coreutils; ``sha256sum --check SHA256SUMS`` reads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from lora_fuse.errors import BadGolden, Rerun
from lora_fuse.machine import files, text

LIST = "SHA256SUMS"  # the names of cases have no capitals
LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def sums_of(folder: Path) -> dict[str, str]:
    """The sha256 of every picture and record in a folder, by name; it need not be there."""
    return {path.name: sha256_of(path) for path in goldens_in(folder)}


def goldens_in(folder: Path) -> list[Path]:
    """Every picture and record in a folder."""
    return sorted(path for path in folder.glob("*") if path.suffix in {".png", ".json"})


def sha256_of(path: Path) -> str:
    """The sha256 of a picture or record.

    Raises:
        BadGolden: it cannot be read.
    """
    try:
        return hashlib.sha256(files.read_bytes(path)).hexdigest()
    except OSError as error:
        raise BadGolden(f"the golden {path} cannot be read ({error})", rerun=restoring(path)) from error


def write_list(folder: Path, sums: Mapping[str, str], remark: str) -> None:
    """Write the list of a folder; the remark says who made it, when and why."""
    lines = [f"# {text.line(remark)}", *(f"{sha256}  {name}" for name, sha256 in sorted(sums.items()))]
    files.replace_text(folder / LIST, "\n".join(lines) + "\n")


def read_list(folder: Path) -> dict[str, str]:
    """The approved sha256 of every picture and record in a folder, by name.

    Raises:
        BadGolden: there is no list, it is none, or the folder has other names than it.
    """
    path = folder / LIST
    present = {one.name for one in goldens_in(folder)}
    if not path.exists():
        if not present:
            return {}
        raise BadGolden(
            f"{folder} has no {LIST}, so nothing says that its pictures and records are as they were approved; "
            "bring it back, or look at them and bind them",
            rerun=Rerun("bind"),
        )
    try:
        lines = [line for line in files.read_text(path).splitlines() if not line.startswith("#")]
    except OSError as error:
        raise BadGolden(f"{path} cannot be read ({error})", rerun=restoring(path)) from error
    listed: dict[str, str] = {}
    for line in lines:
        found = LINE.fullmatch(line)
        if found is None or found[2] in listed:
            raise BadGolden(f"{path} has the line {line!r}, which lists no golden", rerun=restoring(path))
        listed[found[2]] = found[1]
    for name in sorted(listed.keys() ^ present):
        if name in listed:
            raise BadGolden(f"the golden {folder / name} was approved and is not there", rerun=restoring(folder / name))
        raise BadGolden(
            f"{folder / name} is not in {LIST} beside it, so nobody approved it; remove it and approve a run"
        )
    return listed


def check_sum(path: Path, listed: Mapping[str, str]) -> None:
    """Refuse a picture or record that is not as it was approved.

    Raises:
        BadGolden: it is not.
    """
    sha256 = sha256_of(path)
    if sha256 != listed[path.name]:
        raise BadGolden(
            f"the golden {path} has sha256 {sha256}, and {listed[path.name]} was approved", rerun=restoring(path)
        )


def restoring(path: Path) -> Rerun:
    """The way out: bring back what was approved."""
    return Rerun("restore", settings=(str(path),))
