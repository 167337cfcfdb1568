"""What may not be had from a Hub is named, with the way out."""

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import BIG, FILE, LORA, Project, fetched


def test_who_may_not_is_told_what_is_missing(hub: LoopbackHub, project: Project) -> None:
    hub.create(LORA, gated=True)
    hub.push(LORA, {FILE: BIG})
    hub.registry.repos["alice/secret"] = hub.create("carol/secret", private=True)
    hub.push("carol/secret", {FILE: BIG})
    project.set_lora()
    page = f"the repository is gated; ask for access at {hub.url}/{LORA}, then"
    assert f"{page} set HF_TOKEN" in project.refused(HF_TOKEN="")
    assert f"{page} give HF_TOKEN the right to read gated repositories, at" in project.refused()
    assert "401" in project.refused(HF_TOKEN="hf_expired")  # noqa: S106
    assert "renew HF_TOKEN" in project.refused(HF_TOKEN="hf_nobody")  # noqa: S106
    project.set_lora(repo_id="carol/secret")
    said = "carol/secret@main: no such repository, or a private one; check the name, or"
    assert f"{said} set HF_TOKEN" in project.refused(HF_TOKEN="")
    assert f"{said} give HF_TOKEN the scope repo.content.read for it" in project.refused()
    assert not fetched(hub)


def test_what_is_not_there_is_named(hub: LoopbackHub, project: Project) -> None:
    commit = hub.push(LORA, {FILE: BIG}).oid
    project.set_lora(repo_id="bob/gone")
    assert "error: bob/gone@main: no such repository" in project.refused()
    project.set_lora(revision="v9")
    assert f"error: {LORA}@v9: no such revision" in project.refused()
    project.set_lora("gone.safetensors")
    assert f"error: {LORA}@{commit} has no gone.safetensors" in project.refused()


@pytest.mark.parametrize(
    ("status", "way_out"),
    [(401, "renew HF_TOKEN"), (403, "give HF_TOKEN the right to do this (scope repo.content.read)")],
)
def test_a_token_that_ends_on_the_way_is_named(hub: LoopbackHub, project: Project, status: int, way_out: str) -> None:
    hub.push(LORA, {FILE: BIG})
    hub.faults.append(Fault("(HEAD|GET) .*/resolve/", times=-1, status=status))
    line = project.refused()
    assert str(status) in line
    assert way_out in line
