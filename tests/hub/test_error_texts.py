"""What a person is told of a Hub's refusal, and of a token, which is never shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_fuse.hub.locks import lock_base, lock_lora
from lora_fuse.recipe.records import to_json
from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import ROOT
from tests.support.repositories import BASE, LORA, LORA_FILE, NOWHERE, PIPELINE, lock, refusal, weights, write
from tests.support.tiny import on_hub


def test_a_missing_and_a_private_repository_look_the_same_and_name_the_way_out(hub: LoopbackHub) -> None:
    missing = refusal(lock)
    hub.create(BASE, private=True)
    assert refusal(lock) == missing
    assert f"{BASE}@main" in missing
    assert "HF_TOKEN" in missing


def test_a_gated_repository_names_the_page_to_visit(hub: LoopbackHub) -> None:
    hub.create(BASE, gated=True)
    hub.push(BASE, PIPELINE)
    message = refusal(lock)
    assert "gated" in message
    assert f"{hub.url}/{BASE}" in message


def test_a_missing_revision_and_a_missing_file_are_named(hub: LoopbackHub) -> None:
    hub.push(LORA, {LORA_FILE: weights(7)})
    assert f"{LORA}@v9: no such revision" in refusal(lambda: lock_lora(on_hub(LORA, "v9"), LORA_FILE, previous=None))
    assert "has no gone.safetensors" in refusal(lambda: lock_lora(on_hub(LORA), "gone.safetensors", previous=None))


def test_a_token_that_is_not_accepted_is_named_but_never_shown(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.push(BASE, PIPELINE)
    for canary in ("hf_canary_of_nobody", "hf_expired"):
        monkeypatch.setenv("HF_TOKEN", canary)
        message = refusal(lock)
        assert "401" in message
        assert "renew HF_TOKEN" in message
        assert canary not in message + "".join(capfd.readouterr())


def test_a_token_is_used_and_leaves_no_trace_in_the_lock(hub: LoopbackHub, tmp_path: Path) -> None:
    repo = hub.create("alice/private", private=True)
    hub.push(repo.id, PIPELINE)
    pinned = lock_base(on_hub(repo.id), previous=None)
    assert "hf_write" not in to_json(pinned)
    cache = [path for path in (tmp_path / "hf-home").rglob("*") if path.is_file()]
    assert cache
    assert not [path for path in cache if b"hf_write" in path.read_bytes()]


def test_without_a_token_none_is_sent_even_if_one_is_stored(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(BASE, PIPELINE)
    monkeypatch.delenv("HF_TOKEN")
    write(tmp_path / "hf-home", {"token": b"hf_write"})
    # A new process, since the client reads at its import where a token is stored.
    code = (
        "from lora_fuse import hub; from lora_fuse.recipe import Source;"
        f"hub.lock_base(Source(repo_id={BASE!r}, path=None, revision='main'), previous=None)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert len(hub.log) > len(PIPELINE)
    assert not [call for call in hub.log if call.authorized]


def test_no_token_is_sent_to_the_host_that_stores_the_files(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    lock()
    assert hub.calls("GET /_lfs/")
    assert not [call for call in hub.calls("GET /_lfs/") if call.authorized]


def test_a_hub_in_trouble_is_named_with_its_status(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    hub.faults.append(Fault("GET /api/models", times=-1, status=503))
    message = refusal(lock)
    assert f"{hub.url} answered 503" in message
    assert "try again later" in message


def test_no_connection_and_no_lock_is_one_line(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    message = refusal(lock)
    assert f"{BASE}@main" in message
    assert "check the connection" in message


def test_offline_and_not_locked_is_refused_without_a_request(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    assert "not locked yet" in refusal(lambda: lock(offline=True))
    assert not hub.log


def test_an_ill_formed_repository_name_is_refused(hub: LoopbackHub) -> None:
    assert "write owner/name" in refusal(lambda: lock_base(on_hub("a/b/c"), previous=None))


def test_what_is_fetched_is_said_in_plain_lines(hub: LoopbackHub, capfd: pytest.CaptureFixture[str]) -> None:
    commit = hub.push(LORA, {LORA_FILE: weights(7)})
    lock_lora(on_hub(LORA), LORA_FILE, previous=None)
    said = capfd.readouterr().err
    assert said.startswith(f"download: 1 files, 328B from {LORA_FILE} of {LORA}@{commit.oid}: 328B to fetch, ")
    assert said.endswith("GB free\n")
    assert len(said.splitlines()) == 1
