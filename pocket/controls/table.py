"""The controls' tables, for a terminal and for Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from lora_fuse.machine import files
from lora_fuse.pictures import metrics
from pocket.controls.control import GATES, GOLDEN, UNFUSED, WEIGHTS, Outcome

FIGURES = ((UNFUSED, "psnr_db"), (GOLDEN, "psnr_db"), (GOLDEN, "flip_worst"), (GOLDEN, "comb_db"))
HEAD = ("", *GATES, "pictures", "PSNR unfused", "over floor", "PSNR golden", "worst FLIP", "comb", "what is done")
NOTE = (
    "`weights` is the merge derived anew, or, where it has other shards, compared with the right merge bit for bit "
    "(`bits`); `unfused` is against base + LoRA, `golden` against the right merge's pictures. PSNR and comb in dB; of "
    "two cases the worse."
)


def row(outcome: Outcome) -> tuple[str, ...]:
    """The cells of a control."""
    gates = (_gate(outcome, gate) for gate in GATES)
    over = _worst([result.over_floor for result in outcome.results], max)
    unfused, golden, worst_flip, comb = (_figure(outcome, *which) for which in FIGURES)
    name = outcome.control.name if outcome.as_expected else f"{outcome.control.name}: WRONG"
    return (name, *gates, outcome.verdict, unfused, over, golden, worst_flip, comb, outcome.control.what)


def _gate(outcome: Outcome, gate: str) -> str:
    if gate in outcome.seen_by:
        return "seen"
    return "bits" if gate == WEIGHTS and not outcome.same_files else "-"


def _figure(outcome: Outcome, pair: str, name: str) -> str:
    metric = metrics.METRICS[name]
    values = outcome.values(pair, name)
    return _worst(values, min if metric.higher_is_nearer else max, metric.digits)


def _worst(values: Sequence[float | None], choose: Callable[[list[float]], float], digits: str = ".2f") -> str:
    known = [value for value in values if value is not None]
    if not known or any(map(math.isnan, known)):
        return "none"
    worst = choose(known)
    return "same" if math.isinf(worst) else f"{worst:{digits}}"


def aligned(outcomes: Sequence[Outcome], title: str) -> str:
    """A table for a terminal."""
    rows = [(title, *HEAD[1:]), *map(row, outcomes)]
    figures = HEAD[HEAD.index("PSNR unfused") : -1]
    columns = ["right" if name in figures else "left" for name in HEAD]
    return str(tabulate(rows, tablefmt="plain", colalign=columns, disable_numparse=True))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a document."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def split(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Faults and benign changes by their table's title."""
    return {
        title: [outcome for outcome in outcomes if outcome.control.is_fault == is_fault]
        for title, is_fault in (("fault", True), ("benign change", False))
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    """The numbers of controls that were as they should be."""
    faults, benign = (
        f"{sum(outcome.as_expected for outcome in some)} of {len(some)}" for some in split(outcomes).values()
    )
    return f"{faults} faults caught, {benign} benign changes passed"


def write_markdown(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Put the tables between the markers of a document."""
    tables = [markdown((title, *HEAD[1:]), map(row, some)) for title, some in split(outcomes).items()]
    between_markers(path, "controls", "\n\n".join([NOTE, *tables, f"{summary(outcomes)}."]))


def between_markers(path: Path, name: str, inside: str) -> None:
    """Put a text between a document's markers; a document that is not there yet has only them."""
    begin = f"<!-- {name} -->"
    end = f"<!-- /{name} -->"
    text = path.read_text(encoding="utf-8") if path.exists() else f"{begin}\n{end}\n"
    files.replace_text(path, re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{inside}\n{end}", text, flags=re.DOTALL))
