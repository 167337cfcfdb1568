"""The stage that publishes: what it may send, its dry run, whom it serves, and publications beside others."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.machine import ROOT, until
from tests.support.publications import (
    COMMIT,
    MERGE,
    REPO,
    SHARDS,
    SIZE,
    Place,
    check_next_run,
    check_published,
    finish,
    is_untouched,
    repo,
    rows,
)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        (".env", lambda path: path.write_text("HF_TOKEN=1"), ".env is in artifacts/merged and not in the manifest"),
        ("unet/weights.bin", lambda path: path.write_bytes(b"p"), "unet/weights.bin is in artifacts/merged and not"),
        ("key.pem", lambda path: path.symlink_to("/etc/hostname"), "key.pem in artifacts/merged is a symlink"),
        ("more", lambda path: path.symlink_to("transformer"), "more in artifacts/merged is a symlink"),
    ],
    ids=["file", "pickle", "link", "linked-folder"],
)
def test_what_the_manifest_does_not_name_is_refused_by_name(
    place: Place, hub: LoopbackHub, name: str, make: Callable[[Path], object], said: str
) -> None:
    path = place.root / "artifacts/merged" / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    assert said in place.run().refusal
    assert not hub.log


def test_a_file_that_changes_under_way_is_not_published(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault("/preupload/", delay=1.0))
    process = place.start()
    until(lambda: hub.calls("/preupload/"))
    (place.root / "artifacts/merged" / SHARDS[0]).write_bytes(bytes(SIZE))
    assert SHARDS[0] in finish(process).refusal
    assert is_untouched(hub)


@pytest.mark.parametrize("fault", [None, "echo"])
def test_the_token_is_nowhere(place: Place, hub: LoopbackHub, tmp_path: Path, upload: str, fault: str | None) -> None:
    canary = "hf_canaryCanaryCanary"
    hub.registry.tokens[canary] = hub.registry.tokens["hf_write"]
    place.configure(tag="v1")
    if fault:  # a Hub that repeats the token in what it says, once, and then for ever
        header = {"X-Error-Message": f"bad token {canary}"}
        hub.faults += [Fault(COMMIT, status=503, headers=header), Fault(MERGE, times=-1, status=403, headers=header)]
    done = place.run(HF_TOKEN=canary)
    assert done.code == (2 if fault else 0), done.err
    assert "(token)" in done.err or not fault
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 10
    texts = [done.out.encode(), done.err.encode(), *(path.read_bytes() for path in written)]
    for commit in repo(hub).commits.values():
        texts += [commit.title.encode(), commit.message.encode(), *(entry.content for entry in commit.tree.values())]
    texts += [str(pull).encode() for pull in repo(hub).pulls.values()] + [str(hub.log).encode()]
    assert not [text for text in texts if canary.encode() in text]


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


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_expired", '401 (User Access Token "alice-token" is expired); renew HF_TOKEN'), ("hf_read", "403 (")],
)
def test_a_token_that_may_not_is_refused(place: Place, hub: LoopbackHub, token: str, said: str) -> None:
    assert said in place.run(HF_TOKEN=token).refusal
    assert not hub.registry.repos
    check_next_run(place, hub, sends=None)


def test_a_token_that_is_taken_away_under_way_is_refused(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(COMMIT, status=401, times=-1, body=b"{}"))
    assert "answered 401" in place.run().refusal
    assert is_untouched(hub)
    check_next_run(place, hub)


def test_who_may_only_propose_leaves_a_pull_request(place: Place, hub: LoopbackHub) -> None:
    hub.create(REPO)
    place.configure(private=False)
    line = place.run(HF_TOKEN="hf_other").refusal  # noqa: S106
    assert f"{hub.url}/{REPO}/discussions/1" in line
    assert "merge it there" in line
    assert is_untouched(hub)
    assert repo(hub).pulls[1].status == "open"
    assert place.run().code == 0  # the owner does not take over what somebody else may still change
    assert {pull.number: pull.status for pull in repo(hub).pulls.values()} == {1: "open", 2: "merged"}


def test_a_public_repository_gets_no_byte_where_private_is_asked_for(place: Place, hub: LoopbackHub) -> None:
    hub.create(REPO)
    assert f"{REPO} is public" in place.run().refusal
    assert (hub.uploaded(), len(repo(hub).commits), repo(hub).pulls) == (0, 1, {})


def test_a_repository_that_becomes_public_under_way_is_not_filled(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault("GET .*/revision/refs%2Fpr%2F1", delay=1.0))
    process = place.start()
    until(lambda: hub.calls("refs%2Fpr%2F1"))
    repo(hub).private = False
    assert f"{REPO} is public" in finish(process).refusal
    assert is_untouched(hub)


def test_a_second_run_of_the_same_folder_says_so(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(COMMIT, delay=4.0))
    first = place.start()
    until(lambda: hub.calls("/commit/"))
    assert "another run is writing artifacts;" in place.run().refusal
    assert finish(first).code == 0
    check_published(place, hub)


@pytest.mark.parametrize("seed", [0, 1], ids=["same-bytes", "other-bytes"])
def test_two_publications_at_once_do_not_mix(place: Place, hub: LoopbackHub, tmp_path: Path, seed: int) -> None:
    hub.create(REPO, private=True)
    other = Place(tmp_path / "other", {**place.env, "HF_HOME": str(tmp_path / "other-home")})
    other.fill(seed)
    other.configure()
    hub.faults.append(Fault(COMMIT, times=2, delay=2.0))  # both see an empty main
    processes = [place.start(), other.start()]
    ends = [finish(process) for process in processes]
    winners = [one for one, end in zip((place, other), ends, strict=True) if end.code == 0]
    assert winners
    assert len(winners) == 1 or seed == 0
    check_files = {name: file.sha256 for name, file in winners[0].manifest.files.items()}
    assert {name: hashlib.sha256(hub.read(REPO, name)).hexdigest() for name in check_files} == check_files
    for end in ends:
        assert end.code == 0 or end.refusal


def test_pull_requests_that_are_not_ours_are_left_alone(place: Place, hub: LoopbackHub) -> None:
    """Of other bytes, and one of somebody else under our name, with a file too many."""
    hub.create(REPO, private=True)
    key = hashlib.sha256((place.root / "artifacts/merged.manifest.json").read_bytes()).hexdigest()
    stale = repo(hub).open_pull("pocket, scale 1, manifest 1234", "alice")
    foreign = repo(hub).open_pull(f"pocket, manifest {key}", "mallory")
    hub.push(REPO, {"evil.py": b"import os"}, revision=f"refs/pr/{foreign.number}")
    assert place.run().code == 0
    check_published(place, hub)
    assert (stale.status, foreign.status, place.receipt.pull_request) == ("open", "open", 3)


def test_our_own_pull_request_with_more_on_it_is_closed_with_a_word(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(MERGE, status=403, times=-1, body=b"{}"))
    assert place.run().refusal
    hub.push(REPO, {"evil.py": b"import os"}, revision="refs/pr/1")
    check_next_run(place, hub)
    pull = repo(hub).pulls[1]
    assert (pull.status, place.receipt.pull_request) == ("closed", 2)
    assert any("a new one takes its place" in str(event) for event in pull.events)
