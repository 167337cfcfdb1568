"""Claims on what is in a checkpoint, held against what is: ``python -m benchmarks.claims presence|explain|kinship``.

``presence`` looks for LoRAs in bases: first where they are not (each one that is found there is a false claim), then in
merges at several scales. The pairs are drawn at random in many kinds, or small transformers that are trained here, each
with LoRAs that are trained on it: those are correlated with their base, although they are not in it. ``explain``
asks of checkpoints beside their bases, of the same random pairs, for LoRAs that are in them and that are not.
``kinship`` compares LoRAs of one trained base that differ by as much as the rows say. All of it on a CPU, in minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.base_pairs import BasePair, TrainedBase, pairs_of, random_pairs, trained_pairs
from lora_fuse import LoraInput, plan
from lora_fuse.differences import presence as in_bases
from lora_fuse.differences.explaining import Explanation, explain
from lora_fuse.machine import interrupts
from lora_fuse.studies.validation import compare_files
from pocket.controls.table import between_markers, markdown
from tests.tiny_models import FAMILIES, tiny
from tests.tiny_models.loras import write_loras

SCALES = (1.0, 0.5, 0.25)
HEAD = ("pairs", "number", "false claims", *(f"found at {scale:g}" for scale in SCALES), "within their margin")


@dataclass(slots=True)
class Tally:
    """Counts of one kind of pairs, by scale: those that were found, and those of them that were right."""

    pairs: int = 0
    false: list[str] = field(default_factory=list)
    found: dict[float, int] = field(default_factory=lambda: dict.fromkeys(SCALES, 0))
    right: int = 0

    def row(self, name: str) -> tuple[str, ...]:
        """The cells of the table."""
        all_found = sum(self.found.values())
        cells = (f"{count} of {self.pairs}" for count in self.found.values())
        return (name, str(self.pairs), str(len(self.false)), *cells, f"{self.right} of {all_found}")


def presence(pairs: Iterable[BasePair], folder: Path) -> Tally:
    """Look for the LoRA of each pair in its base, and in merges of the two."""
    tally = Tally()
    for pair in pairs:
        tally.pairs += 1
        for scale in (0.0, *SCALES):
            base, lora = pair.write(folder, pair.merged(scale) if scale else pair.weights)
            (one,) = in_bases.look_for(plan(base, [LoraInput("lora", lora, 1.0)]))
            if one.claim is None or one.found is None:
                continue
            if scale:
                tally.found[scale] += 1
                tally.right += abs(one.found.scale - scale) <= one.found.margin
            else:
                tally.false.append(f"{pair.kind}: {one.claim}")
    return tally


def _tiny(folder: Path) -> Iterator[BasePair]:
    """The models of `tests.tiny_models`, whose LoRAs are random."""
    for name in FAMILIES:
        write_loras(name, tiny(name, folder / name), folder / f"{name} lora")
        yield from pairs_of(folder / name, sorted((folder / f"{name} lora").iterdir()))


CASES = (
    "BASE + the LoRA",
    "BASE + the LoRA of another pair",
    "BASE trained on as a whole",
    "another base",
    "BASE itself",
)


def explained(count: int, folder: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Explain checkpoints of random pairs, asked for the pair's LoRA; the rows of the table, and the false claims."""
    rows: dict[str, Counter[str]] = {case: Counter() for case in CASES}
    false: list[str] = []
    errors: list[float] = []
    rng = np.random.default_rng(0)
    pairs = list(random_pairs(count))
    for number, pair in enumerate(pairs):
        other = pairs[number - 1]
        scale = round(float(rng.uniform(0.1, 1.5)), 3)
        trained = {
            name: values + 0.02 * values.std() * rng.standard_normal(values.shape)
            for name, values in pair.weights.items()
        }
        checkpoints = (
            pair.merged(scale),
            replace(pair, factors=other.factors).merged(scale),
            trained,
            other.weights,
            pair.weights,
        )
        base, lora = pair.write(folder / "base", pair.weights)
        for case, weights in zip(CASES, checkpoints, strict=True):
            found = explain(pair.write(folder / "checkpoint", weights)[0], base, [lora])
            (asked,) = found.loras
            rows[case]["asked"] += 1
            rows[case]["claimed"] += asked.found
            rows[case]["right"] += _is_right(case, found)
            if asked.found and case == CASES[0]:
                errors.append(abs(asked.scale - scale))
            elif asked.found:
                false.append(f"{pair.kind}: {case}, the LoRA claimed at {asked.scale:.3g}")
    first, *others = (
        (case, *(str(tally[what]) for what in ("asked", "claimed", "right"))) for case, tally in rows.items()
    )
    return [(*first, f"{max(errors):.1g}"), *((*row, "") for row in others)], false


def _is_right(case: str, found: Explanation) -> bool:
    """True where the explanation is that of the case, whatever it says of the LoRA."""
    whole = not found.is_other_base and not found.is_equal
    answers = {
        CASES[0]: whole and bool(found.found) and not found.unexplained,
        CASES[1]: whole and not found.found and not found.is_full,
        CASES[2]: whole and not found.found and found.is_full,
        CASES[3]: found.is_other_base,
        CASES[4]: found.is_equal,
    }
    return answers[case]


TEXT = "lora_fuse/fusion/*.py"
# What a LoRA differs by from one of rank 8 that was trained for 150 steps on this text, from seed 1.
KIN: Mapping[str, Mapping[str, object]] = {
    "twice as many steps": {"steps": 300},
    "half as many steps": {"steps": 75},
    "the examples in another order": {"order": 2},
    "that, and three times the learning rate": {"order": 2, "rate": 9e-3},
    "another start": {"start": 2},
    "that, and the examples in another order": {"start": 2, "order": 2},
    "that, and four times as many steps": {"start": 2, "order": 2, "steps": 600},
    "that, and twice the rank": {"start": 3, "order": 3, "rank": 16},
    "another text of the same kind, the same start": {"order": 2, "pattern": "tests/lora/*.py"},
    "another text of the same kind, another start": {"start": 4, "order": 4, "pattern": "tests/lora/*.py"},
    "a text of another kind, the same start": {"order": 2, "pattern": "conf/*.yaml"},
    "a text of another kind, another start": {"start": 4, "order": 4, "pattern": "conf/*.yaml"},
}


def kinship(bases: int, folder: Path) -> list[tuple[str, ...]]:
    """Compare LoRAs of small trained bases; the rows of the table."""
    found: dict[str, list[float]] = {name: [] for name in KIN}
    said: dict[str, set[str]] = {name: set() for name in KIN}
    for seed in range(bases):
        base = TrainedBase(seed)
        first = base.pair(pattern=TEXT)
        place, current = first.write(folder / "current", first.weights)
        for name, changes in KIN.items():
            _, other = base.pair(**{"pattern": TEXT, **changes}).write(folder / "other", {})  # type: ignore[arg-type]
            compared = compare_files(LoraInput("lora", current, 1.0), LoraInput("lora", other, 1.0), place)
            found[name].append(compared.cosine or math.nan)
            said[name].add(str(compared.kinship))
    cosines = {
        name: " to ".join(dict.fromkeys(f"{v:.2f}" for v in (min(some), max(some)))) for name, some in found.items()
    }
    return [(name, cosines[name], " or ".join(sorted(said[name]))) for name in KIN]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables; 1 where a claim is false."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description="are claims about a base true?")
    parser.add_argument("what", nargs="*", choices=("presence", "explain", "kinship", []), help="(default: all)")
    parser.add_argument("--random", type=int, default=100, metavar="N", help="random pairs (default 100)")
    parser.add_argument("--trained", type=int, default=10, metavar="N", help="trained bases, with 10 LoRAs each")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables between FILE's markers")
    options = parser.parse_args(arguments)
    tables: dict[str, str] = {}
    false: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "presence" in (options.what or ["presence"]):
            kinds = {
                "random": random_pairs(options.random),
                "small trained transformers": trained_pairs(options.trained, 10),
                "pocket": pairs_of(Path("pocket/model"), sorted(Path("pocket/lora").glob("*.safetensors"))),
                "tiny models of all families": _tiny(folder),
            }
            tallies = {name: presence(pairs, folder) for name, pairs in kinds.items()}
            false = [claim for tally in tallies.values() for claim in tally.false]
            tables["presence"] = markdown(HEAD, (tally.row(name) for name, tally in tallies.items()))
        if "explain" in (options.what or ["explain"]):
            rows, claims = explained(options.random, folder)
            false += claims
            head = ("the checkpoint is", "asked", "the LoRA is claimed", "said so", "largest error of the scale")
            tables["explain"] = markdown(head, rows)
        if "kinship" in (options.what or ["kinship"]):
            rows = kinship(min(3, options.trained), folder)
            tables["kinship"] = markdown(("differs from the current one by", "cosine", "said to be"), rows)
    for name, table in tables.items():
        print(table, end="\n\n")
        if options.markdown and f"<!-- {name} -->" in options.markdown.read_text(encoding="utf-8"):
            between_markers(options.markdown, name, table)
    print(*false, f"{len(false)} false claims", sep="\n")
    return 1 if false else 0


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
