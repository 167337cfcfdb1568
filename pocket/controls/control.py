"""Controls, and the three gates that judge them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lora_fuse.models import COMPONENT
from lora_fuse.pictures import pairs
from lora_fuse.regression import case_judgement, verdicts
from lora_fuse.verification import Expectation, verify_merge
from pocket.controls.rig import Built, Rig

GATES = ("weights", "unfused", "golden")
WEIGHTS, UNFUSED, GOLDEN = GATES
SEED = 0  # of the rows that `verify` draws, so that the table is the same every time


@dataclass(frozen=True, slots=True)
class Control:
    """Something that is done to the right merge or to how it is run.

    `seen_by` are those of `GATES` that have to see it in float32, others may; in 16 bits any of them will do. It is
    empty for a change that all have to let through.
    """

    name: str
    what: str  # is done, in one line
    build: Callable[[Rig, Path], Built]  # does it, in an empty folder
    seen_by: tuple[str, ...] = ()
    verdict: verdicts.Verdict | None = None  # of the pictures; None where the weights alone have to tell

    @property
    def is_fault(self) -> bool:
        """True if it has to be caught."""
        return bool(self.seen_by)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The findings of the gates about a control."""

    control: Control
    same_files: bool  # as in `Built`
    problems: Sequence[str]  # of the weights and of the repository's other files
    results: Sequence[verdicts.CaseResult]  # one a case
    beyond_golden: Sequence[str]  # differences between the pictures and the goldens
    sharp: bool = True  # the pictures are of float32

    @property
    def seen_by(self) -> tuple[str, ...]:
        """The gates that saw something wrong."""
        apart = [result for result in self.results if not result.agrees]
        seen = {WEIGHTS: self.problems, UNFUSED: apart, GOLDEN: self.beyond_golden}
        return tuple(gate for gate in GATES if seen[gate])

    @property
    def verdict(self) -> verdicts.Verdict:
        """The verdict on the pictures, the worst case's; wrong weights stop a run whatever it is."""
        return verdicts.worst(result.verdict for result in self.results)

    @property
    def as_expected(self) -> bool:
        """True if a fault was caught by the gates that have to and with its verdict, or if a change passed."""
        control = self.control
        if not control.is_fault:
            return not self.seen_by and self.verdict.passed
        if not self.sharp:
            return bool(self.seen_by)
        return set(control.seen_by) <= set(self.seen_by) and control.verdict in {None, self.verdict}

    def values(self, pair: str, metric: str) -> list[float]:
        """A metric for each case: of merged against `UNFUSED` or against `GOLDEN`."""
        compared = [result.vs_unfused if pair == UNFUSED else result.vs_golden for result in self.results]
        return [comparison.values[metric] for comparison in compared if comparison is not None]


def judge(rig: Rig, control: Control) -> Outcome:
    """Carry out a control and let all three gates look at it, also those that a run would not come to."""
    with tempfile.TemporaryDirectory(dir=rig.work) as folder:
        built = control.build(rig, Path(folder))
        problems = _verify(rig, built.folder) if built.same_files else _differences(built.folder, rig.right)
    rendered = pairs.pair_up(rig.cases, built.pictures, built.references or rig.unfused)
    results = [judged.result for judged in case_judgement.judge_pairs(rendered, rig.goldens, rig.rules)]
    apart = [sentence for result in results for sentence in _beyond_golden(result)]
    return Outcome(control, built.same_files, problems, results, apart, rig.setup.dtype == "float32")


def _verify(rig: Rig, folder: Path) -> list[str]:
    """The problems that stage `verify` would find; the LoRA is always the recipe's own file."""
    rows = None if rig.params.verify.rows == "all" else rig.params.verify.rows
    expected = Expectation(rig.setup.pipeline, rig.setup.scheduler)
    inputs = rig.plan().inputs
    found = verify_merge(folder, rig.base, inputs, component=COMPONENT, rows=rows, expected=expected, seed=SEED)
    return found.problems


def _differences(folder: Path, right: Path) -> list[str]:
    ours = _tensors(folder / COMPONENT)
    theirs = _tensors(right / COMPONENT)
    both = ours.keys() & theirs.keys()
    same = {name for name in both if ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])}
    return [f"{name} is not that of the right merge" for name in sorted((ours.keys() | theirs.keys()) - same)]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a component, whichever shard it is in."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _beyond_golden(result: verdicts.CaseResult) -> list[str]:
    if result.vs_golden is None:
        return [f"{result.case.name} was not compared with its golden."]
    return verdicts.beyond(result.vs_golden, result.golden_limits, "the golden")
