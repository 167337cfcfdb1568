"""``python -m stages.approve --reason "…" [--case NAME …]``: make this run's pictures the goldens of this environment.

Nothing else ever writes a golden. Refused when the weights are wrong or merged and unfused disagree: a golden of a
broken merge would hide it. The same run does not pass by it; the next one is compared with it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from typing import Any

from lora_fuse.cli import guarded
from lora_fuse.errors import BadConfig, CheckFailed
from lora_fuse.files import replace_text
from lora_fuse.regression.metrics import METRICS as NAMES
from lora_fuse.regression.report import case_names
from lora_fuse.regression.verdicts import Comparison, Limits, Verdict, beyond
from stages.artifacts import GOLDEN, IMAGES, MANIFEST, METRICS, VERIFY, read_object
from stages.config import load
from stages.params import LimitParams


def approve(reason: str, only: list[str], limits: LimitParams) -> int:
    """Copy the candidates to `artifacts/golden/RECIPE/ENVIRONMENT/` and record why, and of what they are pictures."""
    metrics, manifest = read_object(METRICS, "regress"), read_object(MANIFEST, "fuse")
    cases = case_names(metrics)
    if not set(only) <= set(cases) or not reason.strip():
        raise BadConfig(f"a --reason and known cases are needed: got {reason!r} and {only}, of {', '.join(cases)}")
    _refuse_bad(read_object(VERIFY, "verify"), metrics, only or cases, Limits(limits.bounds))
    folder = GOLDEN / metrics["recipe"] / metrics["environment"]
    folder.mkdir(parents=True, exist_ok=True)
    record = read_object(why, "regress") if (why := folder / "approved.json").exists() else {}
    for case in only or cases:
        shutil.copyfile(IMAGES / f"{case}.merged.png", folder / f"{case}.png")
        record[case] = {"reason": reason, "loras": manifest["loras"], "tool": manifest["tool"]}
        print(f"approved: {folder / case}.png")
    replace_text(why, json.dumps(record, indent=2, sort_keys=True) + "\n")
    return 0


def _refuse_bad(verify: dict[str, Any], metrics: dict[str, Any], cases: list[str], limits: Limits) -> None:
    if not verify["passed"] or verify["manifest_sha256"] != metrics["manifest_sha256"]:
        raise CheckFailed(f"the weights behind these pictures are not verified, see {VERIFY}; nothing was approved")
    for case in cases:
        pair = Comparison({name: metrics[f"{case}.unfused.{name}"] for name in NAMES})
        reasons = [metrics[f"{case}.reasons"]] if metrics[f"{case}.verdict"] == Verdict.INVALID else []
        reasons = reasons or beyond(pair, limits, "the unfused picture of that run")
        if reasons:
            raise CheckFailed(f"{case}: {' '.join(reasons)} Mend the merge first; nothing was approved")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.approve", description="Approve this run's pictures.")
    parser.add_argument("--reason", required=True, help="why these pictures are right; kept beside them")
    parser.add_argument("--case", action="append", default=[], help="only this case; may be given again")
    given = parser.parse_args()
    sys.exit(guarded(lambda: approve(given.reason, given.case, load().regress.unfused)))
