"""The gate's decision on what a build came to, the step that comes next, a summary for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import Rerun
from lora_fuse.recipe import Artifacts, Recipe, checkout
from lora_fuse.regression.run_record import RunRecord

if TYPE_CHECKING:
    from lora_fuse.regression.consistency import Results

EXIT_CODES = {"exact": 0, "drift": 0, "review": 4, "no-golden": 3, "regression": 1, "invalid": 1}

EXPORT_VERDICT = re.compile(r"exports\.[^.]+\.verdict")  # keys of a `metrics.json`

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
    """The pipeline's exit code, a sentence that says why, the step that comes next, and what it was decided from.

    `metrics` is the content of `metrics.json`, empty where the weights are wrong; `approved` a few words on the commits
    of the goldens.
    """

    code: int
    reason: str
    then: Rerun
    metrics: Mapping[str, Any] = field(default_factory=dict)
    approved: str = ""


def decide(recipe: Recipe, at: Artifacts) -> Decision:
    """Decide on a build of a recipe, from its results as far as they follow from each other: see `consistency`.

    Raises:
        BadSource: a result is not there, or says something else than what follows.
        BadGolden: a golden is not as it was approved.
    """
    from lora_fuse.regression.consistency import read_results  # what measures pictures takes its time to start

    return decision_of(read_results(recipe, at), at)


def decision_of(results: Results, at: Artifacts) -> Decision:
    """Decide on results that agree with each other."""
    verify = results.verify
    metrics = results.metrics
    if not verify["passed"]:
        wrong = f"{verify['problem_count']} problems, see {at.verify}"
        return Decision(1, f"the merged weights are wrong ({wrong})", Rerun("fuse", force=True))
    verdict = metrics["verdict"]
    seen = "" if metrics["passed"] else f", see {at.report}"
    commits = commits_of(golden.path for golden in results.goldens)
    approved = f", approved in {commits}" if commits else ""
    reason = f"{verdict}: {_meaning(metrics)}{approved}{seen}"
    return Decision(EXIT_CODES[verdict], reason, next_step(metrics), metrics, approved)


def _meaning(metrics: Mapping[str, Any]) -> str:
    """Meaning of a verdict of a run: of its pictures, of its exports, or of both."""
    meaning = MEANINGS[metrics["verdict"]]
    if not (bad := failed_exports(metrics)):
        return meaning
    exports = f"what was exported as {', '.join(bad)} is not the merge"
    of_a_case = metrics["verdict"] in [metrics[f"{name}.verdict"] for name in case_names(metrics)]
    return f"{meaning}, and {exports}" if of_a_case else exports


def commits_of(records: Iterable[Path]) -> str:
    """The commits that the records of goldens are of, for a person; empty where there are none, or no git."""
    return ", ".join(sorted({commit for path in records if (commit := checkout.commit_of(path, Path.cwd()))}))


def next_step(metrics: Mapping[str, Any]) -> Rerun:
    """The step that comes after a run, from what `metrics.json` says of it."""
    match metrics["verdict"]:
        case "exact" | "drift":
            return Rerun("publish")
        case "review" | "no-golden":
            return Rerun("approve")
    names = case_names(metrics)
    if failed_exports(metrics) and not any(metrics[f"{name}.verdict"] in ("regression", "invalid") for name in names):
        return Rerun("export", force=True)
    changed = [name for name in names if metrics[f"{name}.verdict"] == "regression"]
    if metrics["verdict"] == "regression" and all(metrics[f"{name}.agrees"] for name in names):
        return Rerun("approve", cases=tuple(changed))
    return Rerun("verify", settings=(f"recipe={metrics['recipe']}", "verify.rows=all"))


def summary_text(
    metrics: Mapping[str, Any], run: RunRecord | None, report_path: str, then: str, approved: str = ""
) -> str:
    """A table of the cases of a `metrics.json` and the verdict, aligned for a terminal, without colours.

    `run` is the record of these pictures, if it is on this machine; `then` the command that comes next; `approved` as
    of `Decision`.
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
    ending = [f"{passed}, {verdict}: {MEANINGS[verdict]}{approved}", f"report: {report_path}", f"next: {then}"]
    return "\n".join([*lines, "", *ending])


def failed_exports(metrics: Mapping[str, Any]) -> list[str]:
    """The formats of a `metrics.json` whose file was judged and does not pass."""
    verdicts = {key.split(".")[1]: value for key, value in metrics.items() if EXPORT_VERDICT.fullmatch(key)}
    return [name for name, verdict in verdicts.items() if verdict not in ("exact", "drift")]


def case_names(metrics: Mapping[str, Any]) -> list[str]:
    """The cases of a `metrics.json`, in its order."""
    found = [key.removesuffix(".verdict") for key in metrics if key.endswith(".verdict")]
    return [name for name in found if "." not in name]  # an export's has a dot


def _flat_pair(metrics: Mapping[str, Any], pair: str) -> tuple[str, str]:
    if metrics[f"{pair}.max_abs"] is None:
        return "-", "-"
    psnr = "identical" if metrics[f"{pair}.identical"] else f"{metrics[f'{pair}.psnr_db']:.2f} dB"
    return psnr, f"{metrics[f'{pair}.max_abs']:g}"


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"
