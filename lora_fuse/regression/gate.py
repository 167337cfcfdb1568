"""The gate's decision from `verify.json` and `metrics.json`, the step that comes next, a summary for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_fuse.errors import Rerun
from lora_fuse.recipe import Artifacts, paths
from lora_fuse.regression.run_record import RunRecord

EXIT_CODES = {"exact": 0, "drift": 0, "review": 4, "no-golden": 3, "regression": 1, "invalid": 1}

# What a verdict means to somebody who never read the documentation.
MEANINGS: Mapping[str, str] = {
    "exact": "every picture is the approved one, bit for bit",
    "drift": "not every picture is the approved one bit for bit, and all are within their limits",
    "review": "there is a case that was approved in another environment only, and is within the limits of that picture",
    "no-golden": "there is a case without an approved picture",
    "regression": "there is a picture outside its limits",
    "invalid": "there is a broken picture: not finite, flat or of the wrong size",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """The pipeline's exit code, a sentence that says why, and the step that comes next."""

    code: int
    reason: str
    then: Rerun


def decide(verify: dict[str, Any], metrics: dict[str, Any], at: Artifacts = paths.HERE) -> Decision:
    """Decide from the contents of `verify.json` and `metrics.json`."""
    if not verify["passed"]:
        wrong = f"{verify['problem_count']} problems, see {at.verify}"
        return Decision(1, f"the merged weights are wrong ({wrong})", Rerun("fuse", force=True))
    if verify["manifest_sha256"] != metrics["manifest_sha256"]:
        again = Rerun("verify regress", force=True)
        return Decision(1, f"{at.verify} and {at.metrics} are about different merges", again)
    verdict = metrics["verdict"]
    seen = "" if metrics["passed"] else f", see {at.report}"
    return Decision(EXIT_CODES[verdict], f"{verdict}: {MEANINGS[verdict]}{seen}", next_step(metrics))


def next_step(metrics: Mapping[str, Any]) -> Rerun:
    """The step that comes after a run, from what `metrics.json` says of it."""
    match metrics["verdict"]:
        case "exact" | "drift":
            return Rerun("publish")
        case "review" | "no-golden":
            return Rerun("approve")
    names = case_names(metrics)
    changed = [name for name in names if metrics[f"{name}.verdict"] == "regression"]
    if metrics["verdict"] == "regression" and all(metrics[f"{name}.agrees"] for name in names):
        return Rerun("approve", cases=tuple(changed))
    return Rerun("verify", settings=(f"recipe={metrics['recipe']}", "verify.rows=all"))


def summary_text(metrics: Mapping[str, Any], run: RunRecord | None, report_path: str, then: str) -> str:
    """A table of the cases of a `metrics.json` and the verdict, aligned for a terminal, without colours.

    `run` is the record of these pictures, if it is on this machine; `then` the command that comes next.
    """
    from tabulate import tabulate

    names = case_names(metrics)
    rows = [("case", "verdict", "PSNR to golden", "max diff", "PSNR to unfused", "max diff", "over floor", "seconds")]
    for name in names:
        pairs = [text for pair in ("golden", "unfused") for text in _flat_pair(metrics, f"{name}.{pair}")]
        seconds = None if run is None else run.costs[name]["seconds"]
        more = [_number(metrics[f"{name}.over_floor"], ".2f"), _number(seconds, ".2f")]
        rows.append((name, metrics[f"{name}.verdict"], *pairs, *more))
    columns = ("left", "left", *["right"] * 6)
    lines = tabulate(rows, tablefmt="plain", colalign=columns, disable_numparse=True).splitlines()
    lines += [f"{name}: {metrics[f'{name}.reasons']}" for name in names if metrics[f"{name}.verdict"] != "exact"]
    passed = "passed" if metrics["passed"] else "FAILED"
    verdict = metrics["verdict"]
    ending = [f"{passed}, {verdict}: {MEANINGS[verdict]}", f"report: {report_path}", f"next: {then}"]
    return "\n".join([*lines, "", *ending])


def case_names(metrics: Mapping[str, Any]) -> list[str]:
    """The cases of a `metrics.json`, in its order."""
    return [key.removesuffix(".verdict") for key in metrics if key.endswith(".verdict")]


def _flat_pair(metrics: Mapping[str, Any], pair: str) -> tuple[str, str]:
    if metrics[f"{pair}.max_abs"] is None:
        return "-", "-"
    psnr = "identical" if metrics[f"{pair}.identical"] else f"{metrics[f'{pair}.psnr_db']:.2f} dB"
    return psnr, f"{metrics[f'{pair}.max_abs']:g}"


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"
