"""Revisions: a lock stays until it is told to move, and is enough where there is no network."""

import os
from pathlib import Path

from tests.hub_server import LoopbackHub
from tests.support.downloads import BASE, BIG, FILE, LORA, Project
from tests.support.repositories import PIPELINE


def test_the_lock_stays_until_it_is_told_to_move(hub: LoopbackHub, project: Project) -> None:
    first = hub.push(BASE, PIPELINE).oid
    lora = hub.push(LORA, {FILE: BIG}).oid
    project.set(repo_id=BASE, revision="main")
    project.run()
    changed = {"vae/config.json": b"{ }", "vae/tokens.txt": b"new", "tokenizer/merges.txt": None}
    second = hub.push(BASE, changed).oid
    before = project.locks()
    project.run()
    assert project.locks() == before
    output = project.run("--update")
    assert [line for line in output.splitlines() if line.startswith("update: ")] == [
        f"update: {BASE} main: {first} -> {second}: 1 added, 1 removed, 1 changed",
        "update:   added vae/tokens.txt",
        "update:   removed tokenizer/merges.txt",
        "update:   changed vae/config.json",
        f"update: {LORA} main: still {lora}",
    ]
    assert project.lock("base")["revision"] == second
    assert "unset HF_HUB_OFFLINE" in project.refused("--update", HF_HUB_OFFLINE="1")


def test_an_update_goes_with_overrides(hub: LoopbackHub, project: Project) -> None:
    hub.push(LORA, {FILE: BIG})
    project.run()
    moved = hub.push(LORA, {FILE: BIG[:1000]}).oid
    lora = "loras={l: {filename: lora.safetensors, path: null, repo_id: bob/lora, revision: main}}"
    project.run("--update", "base.path=base", "loras=null", f"++{lora}")
    assert project.lock()["revision"] == moved
    assert "--unknown" in project.refused("--unknown")


def test_a_pull_request_a_tag_and_a_branch_can_be_named(hub: LoopbackHub, project: Project) -> None:
    commit = hub.push(LORA, {FILE: BIG})
    repo = hub.registry.repos[LORA]
    repo.tags["v1"] = commit.oid
    pull = repo.open_pull("better", "carol")
    better = hub.push(LORA, {FILE: BIG[:1000]}, revision=f"refs/pr/{pull.number}").oid
    hub.push(LORA, {FILE: BIG[:2000]}, revision="main")
    for revision, oid in ((f"refs/pr/{pull.number}", better), ("v1", commit.oid), (commit.oid, commit.oid)):
        project.set_lora(revision=revision)
        project.run()
        assert (project.lock()["requested"], project.lock()["revision"]) == (revision, oid)


def test_offline_everything_is_there_or_what_is_missing_is_named(hub: LoopbackHub, project: Project) -> None:
    hub.push(BASE, PIPELINE)
    commit = hub.push(LORA, {FILE: BIG}).oid
    project.set(repo_id=BASE, revision="main")
    project.run()
    asked = len(hub.log)
    project.run(HF_HUB_OFFLINE="1")
    assert len(hub.log) == asked
    next(Path(os.environ["HF_HOME"]).rglob(f"snapshots/{commit}/{FILE}")).unlink()
    line = project.refused(HF_HUB_OFFLINE="1")
    assert f"error: {FILE} of {LORA}@{commit} is not on this machine" in line
    assert len(hub.log) == asked
