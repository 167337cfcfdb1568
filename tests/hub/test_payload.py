"""What may be sent: the manifest's files as they are, and never the token."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.publications import COMMIT, MERGE, SHARDS, SIZE, Place, finish, is_untouched, repo
from tests.support.waiting import until


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
