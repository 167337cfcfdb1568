"""Laws of `dvc.lock`: it is the proof that two builds are the same, and no commit that changes no result changes it."""

import json
from pathlib import Path

import pytest

from tests.support.workspace import METRICS, Workspace, ran

RECORDS = ("artifacts/merged.build.json", "artifacts/verify.run.json", "artifacts/regression/run.json")


@pytest.fixture(scope="module")
def first(built: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    copied = built.copy(tmp_path_factory.mktemp("first") / "checkout")
    copied.run("git", "commit", "-q", "--allow-empty", "-am", "dvc.lock, where another kind of machine gives another")
    return copied


def lock(workspace: Workspace) -> bytes:
    return (workspace.root / "dvc.lock").read_bytes()


def changed(workspace: Workspace) -> str:
    return workspace.run("git", "status", "--porcelain").stdout


def test_a_build_at_another_commit_gives_the_same_lock_and_a_clean_checkout(first: Workspace, tmp_path: Path) -> None:
    second = first.clone(tmp_path / "second")
    (second.root / "CHANGELOG.md").write_text("another commit")
    second.commit("another commit")
    second.run("dvc", "repro", env={"HF_HOME": str(tmp_path / "hf")})
    assert (lock(second), changed(second)) == (lock(first), "")
    assert all(second.read(name)["tool"]["git"] != first.read(name)["tool"]["git"] for name in RECORDS)


def test_nothing_runs_after_a_commit_that_changes_no_input(first: Workspace) -> None:
    (first.root / "CHANGELOG.md").write_text("yet another commit")
    first.commit("yet another commit")
    assert ran(first.repro()) == []
    assert changed(first) == ""


def test_a_lock_that_another_scale_would_give_is_another_one(first: Workspace, tmp_path: Path) -> None:
    other = first.copy(tmp_path / "other")
    other.config("fuse.scale=0.9")
    other.run("dvc", "repro", "verify")
    assert lock(other) != lock(first)


def test_no_result_has_the_builder_a_time_or_an_amount_of_memory_in_it(first: Workspace) -> None:
    commit = first.read("artifacts/merged.build.json")["tool"]["git"]
    outs = [first.root / "artifacts" / name for name in ("merged.manifest.json", "verify.json", "goldens.json")]
    outs += [first.root / "artifacts/regression" / name for name in ("candidates.json", "cases.json", "blocks.json")]
    for path in [*outs, first.root / METRICS]:
        text = path.read_text(encoding="utf-8")
        assert commit not in text, path
        assert not [word for word in ("seconds", "steps_per_s", "peak_") if word in text], path
    run = first.read("artifacts/regression/run.json")
    assert {"seconds", "steps_per_s", "peak_host_bytes"} <= next(iter(run["costs"].values())).keys()
    assert json.dumps(run["environment"])
