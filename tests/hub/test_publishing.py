"""Publishing: what is sent, to whom it is visible, and when success is claimed. Against a Hub on the loopback."""

import hashlib
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fuse.errors import PublishRefused
from lora_fuse.hub import Receipt, lock_lora, preview, publish, pull_request
from lora_fuse.machine.files import FileRecord
from lora_fuse.recipe.records import Manifest, MergedFile, MergedLora, from_json, to_json
from tests.hub_server import Fault, LoopbackHub
from tests.support import repositories
from tests.support.tiny import on_hub

REPO = "alice/merged"
CARD = "---\nlibrary_name: diffusers\n---\n# merged\n"
WEIGHTS = "transformer/model.safetensors"
FILES = {
    "model_index.json": b'{"_class_name": "P"}',
    "scheduler/scheduler_config.json": b"{}",
    WEIGHTS: np.arange(30_000, dtype=np.float32).tobytes(),
}

refusal = partial(repositories.refusal, kind=PublishRefused)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    root = tmp_path / "artifacts/merged"
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def manifest(**changed: MergedFile) -> Manifest:
    files = {name: MergedFile(len(data), hashlib.sha256(data).hexdigest(), "fused") for name, data in FILES.items()}
    lora = MergedLora("lightning", 1.0, "5" * 64)
    return Manifest(1, "pocket", None, (lora,), 1.0, 12, files | changed)


def push(merged: Path, what: Manifest | None = None, **changes: Any) -> Receipt:
    return publish(merged, what or manifest(), **({"card": CARD, "repo_id": REPO, "message": "merged"} | changes))


def uploads(hub: LoopbackHub) -> int:
    writing = ("POST", "PUT")
    harmless = ("/api/repos/create", "/api/validate-yaml", "/preupload/")
    return len([c for c in hub.log if c.line.startswith(writing) and not any(part in c.line for part in harmless)])


# ---------------------------------------------------------------- what is sent


def test_exactly_the_manifests_files_and_the_card_are_published_in_one_pull_request(
    hub: LoopbackHub, merged: Path
) -> None:
    receipt = push(merged)
    head = hub.registry.repos[REPO].head
    assert head.tree.keys() == FILES.keys() | {"README.md", ".gitattributes"}
    assert {name: hub.read(REPO, name) for name in FILES} == FILES
    assert hub.read(REPO, "README.md").decode() == CARD
    (pull,) = hub.registry.repos[REPO].pulls.values()
    assert pull.title == f"merged, manifest {receipt.manifest_sha256}"
    assert (receipt.status, receipt.commit, receipt.pull_request) == ("published", head.oid, pull.number)
    assert (pull.status, head.title, head.parent) == ("merged", f"{pull.title} (#1)", pull.base)


def test_the_receipt_tells_every_file_and_stands_for_the_manifest(hub: LoopbackHub, merged: Path) -> None:
    receipt = push(merged)
    expected = {**FILES, "README.md": CARD.encode()}
    assert receipt.files == {name: FileRecord(len(d), hashlib.sha256(d).hexdigest()) for name, d in expected.items()}
    assert receipt.manifest_sha256 == hashlib.sha256(to_json(manifest()).encode()).hexdigest()
    assert receipt.url == f"{hub.url}/{REPO}/tree/{receipt.commit}"
    assert from_json(Receipt, to_json(receipt), "receipt") == receipt


def test_what_is_published_can_be_locked_and_fetched_through_xet(hub: LoopbackHub, merged: Path) -> None:
    receipt = push(merged)
    pinned = lock_lora(on_hub(REPO), WEIGHTS, previous=None)
    assert (pinned.revision, pinned.files[WEIGHTS]) == (receipt.commit, receipt.files[WEIGHTS])
    assert hub.calls("/reconstructions/")


def test_publishing_again_sends_nothing_and_gives_the_same_receipt(hub: LoopbackHub, merged: Path) -> None:
    receipt = push(merged)
    before = uploads(hub)
    assert push(merged) == receipt
    assert uploads(hub) == before > 0


def test_only_what_changed_is_sent_again(hub: LoopbackHub, merged: Path) -> None:
    first = push(merged)
    before = len(hub.calls("/xorbs/"))
    second = push(merged, card=CARD + "more\n")
    assert second.commit != first.commit
    assert hub.read(REPO, "README.md").decode() == CARD + "more\n"
    assert len(hub.calls("/xorbs/")) == before


def test_hardlinked_files_are_as_good_as_any(hub: LoopbackHub, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "twin").hardlink_to(merged / WEIGHTS)
    assert push(merged).status == "published"


def test_a_skipped_publication_has_a_receipt_that_says_so() -> None:
    receipt = Receipt.skipped("publish.enabled is false", "5" * 64)
    assert (receipt.status, receipt.reason, receipt.commit, receipt.files) == (
        "skipped",
        "publish.enabled is false",
        None,
        {},
    )


# ---------------------------------------------------------------- who may see it


def test_a_new_repository_is_private_unless_public_is_asked_for(hub: LoopbackHub, merged: Path) -> None:
    assert push(merged).private is True
    assert hub.registry.repos[REPO].private
    assert push(merged, repo_id="alice/open", private=False).private is False
    assert not hub.registry.repos["alice/open"].private


def test_a_public_repository_is_refused_where_private_is_asked_for(hub: LoopbackHub, merged: Path) -> None:
    before = hub.create(REPO).head
    refusal(lambda: push(merged), f"{REPO} is public", f"{hub.url}/{REPO}/settings")
    assert hub.registry.repos[REPO].head == before
    assert uploads(hub) == 0


def test_a_private_repository_stays_private_where_public_is_allowed(hub: LoopbackHub, merged: Path) -> None:
    hub.create(REPO, private=True)
    assert push(merged, private=False).private is True


# ---------------------------------------------------------------- what is refused before anything is sent


def test_no_token_is_refused_before_a_request(hub: LoopbackHub, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN" in refusal(lambda: push(merged))
    assert not hub.log


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "size 119999, expected 120000"),
        (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), "sha256"),
    ],
    ids=["missing", "cut", "flipped"],
)
def test_files_that_are_not_the_manifests_are_refused(
    hub: LoopbackHub, merged: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(merged / WEIGHTS)
    refusal(lambda: push(merged), WEIGHTS, said)
    assert not hub.log


def test_a_pickle_in_the_manifest_is_refused(hub: LoopbackHub, merged: Path) -> None:
    (merged / "model.bin").write_bytes(b"p")
    pickle = MergedFile(1, hashlib.sha256(b"p").hexdigest(), "base")
    assert "model.bin is a pickle" in refusal(lambda: push(merged, manifest(**{"model.bin": pickle})))
    assert not hub.log


def test_a_link_that_leaves_the_folder_is_refused_though_its_bytes_are_right(
    hub: LoopbackHub, merged: Path, tmp_path: Path
) -> None:
    outside = (merged / WEIGHTS).rename(tmp_path / "outside")
    (merged / WEIGHTS).symlink_to(outside)
    assert f"{WEIGHTS} in {merged} is a symlink to {outside}" in refusal(lambda: push(merged))
    assert not hub.log


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_name_that_leaves_the_folder_is_refused(hub: LoopbackHub, merged: Path, name: str) -> None:
    (merged.parent / "outside").write_bytes(b"x")
    stray = MergedFile(1, hashlib.sha256(b"x").hexdigest(), "base")
    assert "leads out of" in refusal(lambda: push(merged, manifest(**{name: stray})))
    assert not hub.log


def test_a_manifest_with_a_card_of_its_own_is_refused(hub: LoopbackHub, merged: Path) -> None:
    own = MergedFile(1, "5" * 64, "base")
    assert "README.md" in refusal(lambda: push(merged, manifest(**{"README.md": own})))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "transformer/model-9.safetensors", "modeling.py", "vae/config.json", "LICENSE_x.py"]
)
def test_a_repository_with_files_that_a_download_s_check_refuses_is_refused(
    hub: LoopbackHub, merged: Path, name: str
) -> None:
    hub.create(REPO, private=True)
    hub.push(REPO, {name: b"other weights", "LICENSE": b"kept"})
    refusal(lambda: push(merged), f"{REPO} holds {name}")
    refusal(lambda: preview(merged, manifest(), CARD, repo_id=REPO, tag=None), f"{REPO} holds {name}")
    assert uploads(hub) == 0


def test_what_only_people_read_is_left_in_the_repository(hub: LoopbackHub, merged: Path) -> None:
    hub.create(REPO, private=True)
    hub.push(REPO, {"LICENSE": b"kept", "assets/a.png": b"kept"})
    push(merged)
    assert hub.read(REPO, "LICENSE") == b"kept"


def test_a_repository_of_somebody_else_is_refused_and_named(hub: LoopbackHub, merged: Path) -> None:
    refusal(lambda: push(merged, repo_id="carol/merged"), "carol/merged", "403", "HF_TOKEN")


def test_a_token_that_may_only_read_is_refused_and_never_shown(
    hub: LoopbackHub, merged: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    message = refusal(lambda: push(merged))
    assert "give HF_TOKEN the right" in message
    assert "hf_read" not in message + "".join(capfd.readouterr())


def test_the_token_is_in_nothing_that_is_kept_or_published(
    hub: LoopbackHub, merged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    receipt = push(merged)
    published = b"".join(hub.read(REPO, name) for name in hub.registry.repos[REPO].head.tree)
    assert b"hf_write" not in published + to_json(receipt).encode() + "".join(capfd.readouterr()).encode()


def test_a_token_that_got_into_a_title_or_receipt_is_taken_out(hub: LoopbackHub, merged: Path, tmp_path: Path) -> None:
    receipt = push(merged, message="merged with hf_write", tag="v-hf_write")
    (pull,) = hub.registry.repos[REPO].pulls.values()
    assert pull.title.startswith("merged with (token), manifest ")
    receipt.write(tmp_path / "publish.json")
    assert '"tag": "v-(token)"' in (tmp_path / "publish.json").read_text()


# ---------------------------------------------------------------- when success is claimed


@pytest.mark.parametrize(("name", "said"), [(WEIGHTS, "has sha256"), ("model_index.json", "git blob")])
def test_success_is_not_claimed_of_other_bytes_than_were_sent(
    hub: LoopbackHub, merged: Path, name: str, said: str
) -> None:
    hub.tamper(name, bytes(len(FILES[name])))
    message = refusal(lambda: push(merged))
    repo = hub.registry.repos[REPO]
    assert f"{REPO}@{repo.at('refs/pr/1').oid}: {name}" in message
    assert (repo.pulls[1].status, set(repo.head.tree)) == ("open", {".gitattributes"})
    assert said in message


def test_a_hub_that_takes_commits_and_never_says_so_is_left(
    hub: LoopbackHub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pull request moves each time, and never to what was sent."""
    monkeypatch.setattr(pull_request, "DELAYS", (0.0,))
    hub.tamper(WEIGHTS, b"else")
    hub.faults.append(Fault("POST .*/commit/", times=-1, after=True, status=504))
    refusal(lambda: push(merged), "answered 504")
    assert len(hub.calls("/commit/")) == 2


def test_a_regular_file_that_differs_is_noticed_by_its_git_id(hub: LoopbackHub, merged: Path) -> None:
    push(merged)
    hub.push(REPO, {"model_index.json": b'{"_class_name": "Q"}'})  # of the same size
    assert push(merged).status == "published"
    assert hub.read(REPO, "model_index.json") == FILES["model_index.json"]


def test_somebody_elses_commit_in_between_is_not_overwritten(hub: LoopbackHub, merged: Path) -> None:
    push(merged)
    hub.log.clear()
    hub.faults.append(Fault("/preupload/", delay=0.5))

    def meanwhile() -> None:
        while not hub.calls("/preupload/"):
            time.sleep(0.005)
        hub.push(REPO, {"README.md": b"theirs"})

    other = threading.Thread(target=meanwhile)
    other.start()
    message = refusal(lambda: push(merged, card=CARD + "more\n"))
    other.join()
    assert "somebody changed README.md on main meanwhile" in message
    assert "publish again" in message
    assert hub.read(REPO, "README.md") == b"theirs"
    assert push(merged, card=CARD + "more\n").pull_request == 3
    assert hub.registry.repos[REPO].pulls[2].status == "closed"
