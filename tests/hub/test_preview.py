"""Laws of the dry run: it says what would be sent, and sends nothing."""

import hashlib

from tests.hub_server import LoopbackHub
from tests.support.publications import REPO, ROOT, SHARDS, SIZE, Place, rows


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(place: Place, hub: LoopbackHub) -> None:
    assert place.run().code == 0
    place.fill(seed=0)
    path = place.root / "artifacts/merged" / SHARDS[0]
    hub.push(REPO, {SHARDS[0]: b"other", SHARDS[1]: None})
    before = len(hub.log)
    done = place.run("-m", "stages.publish", "--dry-run")
    assert done.code == 0, done.err
    found = rows(done)
    assert {name: row[0] for name, row in found.items()} == {
        **dict.fromkeys(place.receipt.files, "same"),
        SHARDS[0]: "changed",
        SHARDS[1]: "new",
    }
    assert found[SHARDS[0]][1:] == (SIZE, hashlib.sha256(path.read_bytes()).hexdigest())
    assert f"2 of {len(found)} files, 400kB, would be sent" in done.out
    assert done.out.endswith(hub.read(REPO, "README.md").decode() + "\n")
    assert all(call.line.startswith("GET ") for call in hub.log[before:])


def test_a_dry_run_needs_no_token_and_no_repository(place: Place, hub: LoopbackHub) -> None:
    done = place.run("-m", "stages.publish", "--dry-run", HF_TOKEN="")
    assert done.code == 0, done.err
    assert {row[0] for row in rows(done).values()} == {"unknown"}
    assert "which cannot be read" in done.out
    assert not hub.registry.repos


def test_a_dry_run_takes_overrides_as_every_stage(place: Place, hub: LoopbackHub) -> None:
    (place.root / "conf").symlink_to(ROOT / "conf")
    done = place.run("-m", "stages.publish", "--dry-run", "publish.repo_id=carol/other", "publish.tag=v7")
    assert done.code == 0, done.err
    assert "carol/other" in done.out
    assert "; tag v7" in done.out


def test_a_dry_run_refuses_what_would_be_refused(place: Place, hub: LoopbackHub) -> None:
    (place.root / "artifacts/merged/.env").write_text("x")
    assert ".env" in place.run("-m", "stages.publish", "--dry-run").refusal
