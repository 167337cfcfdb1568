"""Checks that there are approved pictures that this machine's can be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_fuse.errors import BadGolden, NoDevice
from lora_fuse.pictures import environment
from lora_fuse.regression import goldens
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn


def approved_pictures(folder: Path, cases: Sequence[str], key: environment.Key) -> Finding:
    """Predict what the gate will find for pictures of this machine's key, from the recipe's goldens in `folder`."""
    try:
        approved = goldens.Goldens(folder).for_run(key, cases)
    except BadGolden as refusal:
        return fail("goldens", str(refusal))
    own = [case for case, kept in approved.items() if any(not picture.elsewhere for picture in kept)]
    near = [case for case, kept in approved.items() if kept and case not in own]
    found = f"{len(own)} of {len(cases)} cases approved for {key}"
    if len(own) == len(cases):
        return ok("goldens", found)
    remedy = "look at the report of the build, then approve its pictures"
    code = "3 (no-golden)" if len(own) + len(near) < len(cases) else "4 (review)"
    more = f", {len(near)} for a machine much like it" if near else ""
    return warn("goldens", f"{found}{more}: gate will exit with {code}", "", remedy)


def key_here(placement: str, dtype: str, threads: int | None) -> environment.Key | None:
    """This machine's key, as `regress` will have it; None if it has no GPU and the placement needs one.

    Sets torch up as `regress` does: not for a process that goes on to other things.
    """
    environment.make_deterministic(threads, on_gpu=placement != "cpu")
    try:
        return environment.environment(placement, dtype).key
    except NoDevice:
        return None
