"""Answers of a Hub that are lost or refusals: `main` never holds half of a publication."""

import time

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.publications import (
    COMMIT,
    MERGE,
    REPO,
    SHARDS,
    TAG,
    Place,
    check_next_run,
    check_published,
    is_untouched,
    large,
    repo,
)


@pytest.mark.parametrize(("line", "status"), [(COMMIT, None), (COMMIT, 504), (MERGE, 504), (TAG, None)])
def test_an_answer_that_is_lost_changes_nothing(place: Place, hub: LoopbackHub, line: str, status: int | None) -> None:
    place.configure(tag="v1")
    hub.faults.append(Fault(line, after=True, status=status))
    done = place.run()
    assert done.code == 0, done.err
    assert hub.faults[0].hits == 1
    check_published(place, hub)
    assert len(repo(hub).pulls) == 1
    assert repo(hub).tags == {"v1": repo(hub).head.oid}


def test_a_commit_is_tried_again_when_the_hub_is_busy(place: Place, hub: LoopbackHub, upload: str) -> None:
    hub.faults += [Fault(COMMIT, status=503), Fault(COMMIT, status=429, headers={"Retry-After": "2"})]
    begun = time.monotonic()
    done = place.run()
    assert done.code == 0, done.err
    assert "once more in 2 s" in done.err
    assert time.monotonic() - begun > 3
    check_published(place, hub)
    assert hub.uploaded() < large(place) + 2000  # nothing twice


@pytest.mark.parametrize(("status", "said"), [(412, "somebody else was faster"), (503, "answered 503")])
def test_a_commit_that_is_refused_is_one_line(
    place: Place, hub: LoopbackHub, upload: str, status: int, said: str
) -> None:
    hub.faults.append(Fault(COMMIT, status=status, times=-1, body=b"{}"))
    assert said in place.run().refusal
    assert (is_untouched(hub), repo(hub).pulls) == (True, {})
    check_next_run(place, hub)


@pytest.mark.parametrize("status", [403, 409])
def test_a_merge_that_is_refused_leaves_a_whole_pull_request(place: Place, hub: LoopbackHub, status: int) -> None:
    hub.faults.append(Fault(MERGE, status=status, times=-1, body=b"{}"))
    line = place.run().refusal
    assert f"answered {status}" in line
    assert f"{hub.url}/{REPO}/discussions/1" in line
    assert is_untouched(hub)
    assert {*place.manifest.files, "README.md"} <= repo(hub).at("refs/pr/1").tree.keys()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1


def test_what_arrives_as_something_else_is_not_merged(place: Place, hub: LoopbackHub) -> None:
    name = SHARDS[1]
    hub.tamper(name, b"something else")
    assert f": {name} " in place.run().refusal
    assert is_untouched(hub)
    hub._api.tampered.clear()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1


@pytest.mark.parametrize("is_the_same", [True, False])
def test_a_tag_that_exists_counts_only_on_the_same_commit(place: Place, hub: LoopbackHub, is_the_same: bool) -> None:
    assert place.run().code == 0
    repo(hub).tags["v1"] = repo(hub).head.oid if is_the_same else next(iter(repo(hub).commits))
    place.configure(tag="v1")
    commits = dict(repo(hub).commits)
    done = place.run()
    if is_the_same:
        assert (done.code, place.receipt.tag) == (0, "v1")
    else:
        assert f"the tag v1 on commit {repo(hub).tags['v1']}" in done.refusal
        assert repo(hub).head.oid in done.refusal
    assert repo(hub).commits == commits


def test_a_tag_on_other_bytes_is_refused_before_anything_is_sent(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="v1")
    assert place.run().code == 0
    place.fill(seed=1)
    sent, tagged = hub.uploaded(), dict(repo(hub).tags)
    assert "set publish.tag to a new name" in place.run().refusal
    assert (hub.uploaded(), len(repo(hub).pulls), repo(hub).tags) == (sent, 1, tagged)


def test_what_is_tagged_stays_published_when_main_moves_on(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="v1")
    assert place.run().code == 0
    before = place.receipt
    hub.push(REPO, {"LICENSE": b"theirs"})
    assert place.run().code == 0
    assert place.receipt == before


def test_two_variants_of_one_repository_are_each_had_by_their_tag(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="soft")
    assert place.run().code == 0
    soft = place.receipt
    place.fill(seed=1)
    place.configure(tag="strong")
    assert place.run().code == 0
    assert repo(hub).tags == {"soft": soft.commit, "strong": repo(hub).head.oid}
    place.fill()
    place.configure(tag="soft")
    sent, commits = hub.uploaded(), dict(repo(hub).commits)
    assert place.run().code == 0
    assert (place.receipt, hub.uploaded(), repo(hub).commits) == (soft, sent, commits)
