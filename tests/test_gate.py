"""Laws of the gate and of approval: nothing wrong passes, and nothing wrong becomes a golden."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_fuse.regression.metrics import METRICS as NAMES
from stages.gate import decide

ROOT = Path(__file__).resolve().parents[1]
VERIFY: dict[str, Any] = {"passed": True, "problem_count": 0, "manifest_sha256": "m"}
PAIR = {**dict.fromkeys(NAMES, 0.0), "psnr_db": 65.0, "max_abs": 4}
METRICS: dict[str, Any] = {
    "passed": False,
    "verdict": "no-golden",
    "recipe": "pocket",
    "environment": "cpu-float32",
    "manifest_sha256": "m",
    **{f"{case}.verdict": "no-golden" for case in ("a", "b")},
    **{f"{case}.reasons": "none approved" for case in ("a", "b")},
    **{f"{case}.unfused.{name}": value for case in ("a", "b") for name, value in PAIR.items()},
}


@pytest.mark.parametrize(
    ("verify", "metrics", "code", "word"),
    [
        ({}, {"passed": True, "verdict": "exact"}, 0, "exact"),
        ({}, {"passed": True, "verdict": "drift"}, 0, "drift"),
        ({}, {}, 3, "stages.approve"),
        ({}, {"verdict": "regression"}, 1, "regression"),
        ({}, {"verdict": "invalid"}, 1, "invalid"),
        ({"passed": False, "problem_count": 2}, {"passed": True, "verdict": "exact"}, 1, "2 problems"),
        ({"manifest_sha256": "other"}, {"passed": True, "verdict": "exact"}, 1, "different merges"),
    ],
)
def test_the_gate_passes_only_what_is_right(
    verify: dict[str, Any], metrics: dict[str, Any], code: int, word: str
) -> None:
    decided, sentence = decide({**VERIFY, **verify}, {**METRICS, **metrics})
    assert (decided, word in sentence) == (code, True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with two candidates and no golden."""
    images = tmp_path / "artifacts/regression/images"
    images.mkdir(parents=True)
    for case in ("a", "b"):
        Image.new("RGB", (4, 4), "purple").save(images / f"{case}.merged.png")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    write(tmp_path, "verify.json", VERIFY)
    write(tmp_path, "regression/metrics.json", METRICS)
    write(tmp_path, "merged.manifest.json", {"loras": [{"name": "l", "scale": 1.0}], "tool": {"version": "1"}})
    return tmp_path


def write(root: Path, name: str, content: dict[str, Any]) -> None:
    (root / "artifacts" / name).write_text(json.dumps(content))


def approve(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.approve", *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)


def goldens(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "artifacts/golden").rglob("*") if path.is_file())


def test_approval_copies_the_candidates_and_says_why(run: Path) -> None:
    assert approve(run, "--reason", "they are purple").returncode == 0
    assert goldens(run) == ["a.png", "approved.json", "b.png"]
    record = json.loads((run / "artifacts/golden/pocket/cpu-float32/approved.json").read_text())
    assert record["a"]["reason"] == "they are purple"
    assert record["a"]["loras"] == [{"name": "l", "scale": 1.0}]


def test_one_case_can_be_approved_and_the_others_keep_their_record(run: Path) -> None:
    approve(run, "--reason", "first")
    approve(run, "--reason", "second", "--case", "b")
    record = json.loads((run / "artifacts/golden/pocket/cpu-float32/approved.json").read_text())
    assert {case: entry["reason"] for case, entry in record.items()} == {"a": "first", "b": "second"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("verify.json", {**VERIFY, "passed": False}),
        ("verify.json", {**VERIFY, "manifest_sha256": "other"}),
        ("regression/metrics.json", {**METRICS, "b.verdict": "invalid"}),
        ("regression/metrics.json", {**METRICS, "b.unfused.psnr_db": 30.0}),
        ("regression/metrics.json", {**METRICS, "b.unfused.max_abs": 200}),
    ],
)
def test_a_broken_run_cannot_be_approved(run: Path, name: str, change: dict[str, Any]) -> None:
    write(run, name, change)
    refused = approve(run, "--reason", "because")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1), refused.stderr
    assert goldens(run) == []


@pytest.mark.parametrize("arguments", [["--reason", " "], ["--reason", "x", "--case", "c"], []])
def test_approval_needs_a_reason_and_known_cases(run: Path, arguments: list[str]) -> None:
    assert approve(run, *arguments).returncode == 2
    assert goldens(run) == []
