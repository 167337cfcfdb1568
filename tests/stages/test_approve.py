"""Laws of approval: by somebody, with a reason, of what a commit made; and nothing else becomes a golden."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lora_fuse.recipe.records import Tool, from_json, to_json
from lora_fuse.regression.candidates import Candidate, Candidates
from lora_fuse.regression.goldens import GoldenRecord, Goldens
from tests.support.approved import KEY, LORA, PROVENANCE, candidate, picture, png, run_record, weight_check

ROOT = Path(__file__).resolve().parents[2]
CASES = ("a", "b")
VERIFY = weight_check()
WRONG = weight_check(passed=False, problem_count=1, problems=["a row differs"])
IDENTITY = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in {"NAME": "A Person", "EMAIL": "a@example.org"}.items()
}

RUN = "artifacts/regression/run.json"


class Run:
    """A git checkout with a finished run of which no picture was approved."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.golden = root / "artifacts/golden/pocket" / str(KEY)
        self.images = root / "artifacts/regression/images"
        self.images.mkdir(parents=True)
        shutil.copytree(ROOT / "conf", root / "conf")
        shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
        (root / ".gitignore").write_text("/artifacts/*\n!/artifacts/golden/\n")
        self.write("verify.json", VERIFY)
        self.render(0)
        for command in (["init", "-q"], ["config", "user.name", "A Person"], ["config", "user.email", "a@example.org"]):
            self.git(*command)
        self.git("add", "-A")
        self.git("commit", "-qm", "start")

    def git(self, *command: str) -> None:
        subprocess.run(["git", *command], cwd=self.root, env={**os.environ, **IDENTITY}, check=True)

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.root / "artifacts" / name).write_text(json.dumps(content))

    def render(self, seed: int) -> None:
        for number, name in enumerate(CASES):
            (self.images / f"{name}.merged.png").write_bytes(png(seed + number))
        self.leave({name: candidate(png(seed + number), name) for number, name in enumerate(CASES)})
        self.write(
            "regression/metrics.json",
            {"passed": False, "verdict": "no-golden", "recipe": "pocket", "manifest_sha256": "m"}
            | {f"{name}.verdict": "no-golden" for name in CASES}
            | {f"{name}.agrees": True for name in CASES},
        )

    def record_run(self, **about: Any) -> None:
        """Leave the record of the run that made the candidates."""
        about = {"candidates": self.candidates.read_text(), **about}
        (self.root / RUN).write_text(to_json(run_record(**about)))

    def leave(self, cases: dict[str, Candidate], manifest_sha256: str = "m") -> None:
        self.candidates.write_text(to_json(Candidates(1, manifest_sha256, cases)))
        self.record_run()

    @property
    def candidates(self) -> Path:
        return self.root / "artifacts/regression/candidates.json"

    def change(self, **changes: Any) -> None:
        found = from_json(Candidates, self.candidates.read_text(), "")
        self.leave({**found.cases, "b": replace(found.cases["b"], **changes)})

    def stage(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", f"stages.{name}", *arguments]
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, check=False)

    def approve(self, *arguments: str, reason: str = "it is purple") -> subprocess.CompletedProcess[str]:
        return self.stage("approve", "--reason", reason, *arguments)

    def goldens(self) -> list[str]:
        return sorted(
            path.name for path in (self.root / "artifacts/golden").rglob("*") if path.suffix in (".png", ".json")
        )

    def record(self, name: str) -> GoldenRecord:
        return from_json(GoldenRecord, (self.golden / f"{name}.json").read_text(), name)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_an_approval_has_who_when_and_why_beside_the_picture(run: Run) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    done = run.approve(reason="they are purple ")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"approved: artifacts/golden/pocket/{KEY}/{name}.png" for name in CASES]
    assert run.goldens() == ["a.json", "a.png", "b.json", "b.png"]
    record = run.record("b")
    assert (record.approval.by, record.approval.reason) == ("A Person <a@example.org>", "they are purple")
    assert before <= datetime.fromisoformat(record.approval.at) <= datetime.now(UTC)
    assert record.provenance == replace(PROVENANCE, case=replace(PROVENANCE.case, name="b"))
    found = Goldens(run.golden.parent).for_run(KEY, CASES)
    assert [(found[name][0].levels == picture(seed)).all() for seed, name in enumerate(CASES)] == [True, True]


def test_goldens_without_a_list_are_refused_until_somebody_binds_them(run: Run) -> None:
    run.approve()
    listed = run.golden / "SHA256SUMS"
    text = listed.read_text()
    listed.unlink()
    run.render(5)
    refused = run.approve()
    assert refused.returncode == 2
    assert refused.stderr.endswith('; next: python -m stages.approve --bind --reason "…"\n')
    bound = run.approve("--bind", reason="as they were")
    assert (bound.returncode, bound.stdout) == (0, f"bound: artifacts/golden/pocket/{KEY}/SHA256SUMS\n")
    assert listed.read_text().partition("\n")[2] == text.partition("\n")[2]
    assert listed.read_text().partition("\n")[0].endswith(": as they were")
    assert run.approve().returncode == 0


def test_one_case_can_be_approved_and_the_others_keep_theirs(run: Run) -> None:
    run.approve(reason="first")
    run.render(5)
    assert run.approve("--case", "b", reason="second").returncode == 0
    assert [run.record(name).approval.reason for name in CASES] == ["first", "second"]
    assert run.record("b").approval.replaces == (candidate(png(1)).sha256,)
    assert (run.golden / "a.png").read_bytes() == png(0)


def test_goldens_are_replaced_unless_they_are_added_to(run: Run) -> None:
    run.approve()
    run.render(5)
    assert run.approve("--add", "--case", "a").returncode == 0
    assert run.goldens() == ["a.2.json", "a.2.png", "a.json", "a.png", "b.json", "b.png"]
    assert (run.record("a").approval.replaces, run.record("a.2").approval.replaces) == ((), ())
    assert run.approve().returncode == 0
    assert run.goldens() == ["a.json", "a.png", "b.json", "b.png"]
    assert len(run.record("a").approval.replaces) == 2


def test_goldens_themselves_and_what_a_build_writes_do_not_make_the_checkout_a_modified_one(run: Run) -> None:
    run.approve()
    (run.root / "dvc.lock").write_text("a build writes it")
    assert run.approve("--add").returncode == 0


def test_an_approval_changes_no_verdict_of_the_run_that_it_approves(run: Run) -> None:
    metrics = run.root / "artifacts/regression/metrics.json"
    text = metrics.read_bytes()
    assert run.approve().returncode == 0
    assert metrics.read_bytes() == text


# What is refused


def change(**changes: Any) -> Callable[[Run], None]:
    return lambda run: run.change(**changes)


def tool(git: str | None, dirty: bool | None) -> Callable[[Run], None]:
    return lambda run: run.record_run(tool=Tool("0.1.0", git, dirty))


def tamper(run: Run) -> None:
    path = run.images / "b.merged.png"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def write(name: str, text: str) -> Callable[[Run], None]:
    return lambda run: void((run.root / name).write_text(text))


def void(_: object) -> None:
    return


REFUSED: dict[str, tuple[Callable[[Run], None], int, str]] = {
    "wrong weights": (lambda run: run.write("verify.json", WRONG), 1, "not verified"),
    "a check that contradicts itself": (lambda run: run.write("verify.json", {**VERIFY, "passed": False}), 2, "gives"),
    "an empty check": (lambda run: run.write("verify.json", {}), 2, "verify.json is not a WeightCheck"),
    "another merge": (lambda run: run.write("verify.json", {**VERIFY, "manifest_sha256": "o"}), 1, "not verified"),
    "no check": (lambda run: (run.root / "artifacts/verify.json").unlink(), 2, "dvc repro verify"),
    "sides that disagree": (change(agrees=False, reasons=("PSNR is 20 dB.",)), 1, "b: PSNR is 20 dB. Mend the merge"),
    "a modified file": (write("conf/config.yaml", "changed"), 1, "no commit has conf/config.yaml"),
    "a new file": (write("new.py", ""), 1, "no commit has new.py"),
    "no checkout": (lambda run: shutil.rmtree(run.root / ".git"), 1, "no git checkout"),
    "made without a checkout": (tool(None, None), 1, "no git checkout"),
    "a modified tool": (tool("f" * 40, dirty=True), 1, "modified checkout of ffffffffffff"),
    "a picture that was changed": (tamper, 2, "the picture of b is not the one that was judged"),
    "a picture that is gone": (lambda run: (run.images / "b.merged.png").unlink(), 2, "b.merged.png cannot be read"),
    "no run": (lambda run: run.candidates.unlink(), 2, "dvc repro regress"),
    "no record of the run": (lambda run: (run.root / RUN).unlink(), 2, "run.json is not there; next: dvc repro -f"),
    "the record of another run": (lambda run: run.record_run(candidates="o"), 1, "of other pictures"),
    "half a record": (lambda run: void(run.candidates.write_text("{")), 2, "candidates.json is not a Candidates"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_right_or_cannot_be_repeated_is_refused_in_one_line_and_no_golden_written(
    run: Run, kind: str
) -> None:
    spoil, code, said = REFUSED[kind]
    spoil(run)
    refused = run.approve()
    assert (refused.returncode, len(refused.stderr.splitlines())) == (code, 1), refused.stderr
    assert refused.stderr.startswith("error: ")
    assert said in refused.stderr
    assert (refused.stdout, run.goldens()) == ("", [])


def test_a_run_of_overrides_is_refused(run: Run) -> None:
    assert run.stage("config", "fuse.scale=0.9").returncode == 0
    refused = run.approve()
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "params.yaml is not what recipe pocket composes to" in refused.stderr
    assert run.goldens() == []
    assert run.stage("config").returncode == 0
    assert run.approve().returncode == 0


def test_pictures_of_a_run_with_other_values_are_refused(run: Run) -> None:
    """params.yaml is the recipe's, and a stage was run by hand with an override."""
    made = from_json(Candidates, run.candidates.read_text(), "").cases["b"].provenance
    for change, said in (
        ({"steps": 8}, "scale 1 in 8 steps"),
        ({"loras": (replace(LORA, scale=0.5),)}, "scale 0.5 in"),
    ):
        run.change(provenance=replace(made, **change))
        refused = run.approve()
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert said in refused.stderr
        assert "and the recipe says lightning at scale 1 in 4 steps; " in refused.stderr
        assert refused.stderr.endswith("next: dvc repro\n")
        assert run.goldens() == []


def test_a_side_that_disagrees_does_not_stand_in_the_way_of_another_case(run: Run) -> None:
    run.change(agrees=False, reasons=("PSNR is 20 dB.",))
    assert run.approve("--case", "a").returncode == 0
    assert run.goldens() == ["a.json", "a.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reason", " "], "a --reason and known cases are needed"),
        (["--reason", "x", "--case", "c"], "['c'], of a, b"),
        (["--reason", "x", "--case", "a", "--case", "../a"], "'../a'"),
    ],
)
def test_a_reason_and_known_cases_are_needed(run: Run, arguments: list[str], said: str) -> None:
    refused = run.stage("approve", *arguments)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert said in refused.stderr
    assert run.goldens() == []


def test_without_a_reason_the_usage_is_shown(run: Run) -> None:
    refused = run.stage("approve")
    assert refused.returncode == 2
    assert "--reason" in refused.stderr
    assert run.goldens() == []
