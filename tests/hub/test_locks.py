"""Locks: what is pinned, what is fetched, and which bytes are believed. Against a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_fuse.errors import BadLora, BadSource, Refused
from lora_fuse.hub.locks import DEFAULT_TRANSFER, lock_base, lock_lora, verify_files
from lora_fuse.hub.sizes import Sizes, base_sizes, lora_sizes
from lora_fuse.machine.files import FileRecord
from lora_fuse.recipe.hf_cache import cache_dir, locate
from lora_fuse.recipe.records import Lock, from_json, to_json
from tests.hub_server import Fault, LoopbackHub
from tests.support.repositories import BASE, LORA, LORA_FILE, NOWHERE, PIPELINE, STRAYS, text, weights, write
from tests.support.tiny import in_folder, on_hub

ROOT = Path(__file__).resolve().parents[2]


def records(files: dict[str, bytes]) -> dict[str, FileRecord]:
    return {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())}


def lock(previous: Lock | None = None, revision: str = "main", *, offline: bool = False) -> Lock:
    return lock_base(on_hub(BASE, revision), previous=previous, offline=offline)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def refusal(work: Callable[[], object], kind: type[Refused] = BadSource) -> str:
    with pytest.raises(kind) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what is pinned and taken


def test_what_a_lock_will_fetch_is_known_before_any_of_it_is(hub: LoopbackHub) -> None:
    hub.push(BASE, {**PIPELINE, **STRAYS})
    hub.push(LORA, {LORA_FILE: weights(7), "README.md": b"# lora"})
    base, lora, how = on_hub(BASE), on_hub(LORA), DEFAULT_TRANSFER
    sizes = base_sizes(base, None, how)
    assert sizes.files.keys() == PIPELINE.keys() | {"safety_checker/model.safetensors"}  # at most
    assert sizes.to_fetch == sizes.total > sum(map(len, PIPELINE.values()))
    assert sizes.below("transformer") == sum(
        len(PIPELINE[name]) for name in PIPELINE if name.startswith("transformer/")
    )
    assert lora_sizes(lora, LORA_FILE, None, how) == Sizes({LORA_FILE: len(weights(7))}, len(weights(7)))
    assert lora_sizes(lora, "no.safetensors", None, how) == Sizes({})
    assert not list(cache_dir().glob("models--*/snapshots"))
    pinned = lock()
    assert base_sizes(base, pinned, how) == Sizes({name: len(data) for name, data in sorted(PIPELINE.items())})


def test_a_branch_is_pinned_to_its_commit_and_only_the_pipelines_files_are_taken(hub: LoopbackHub) -> None:
    commit = hub.push(BASE, {**PIPELINE, **STRAYS})
    pinned = lock()
    assert pinned == Lock(BASE, None, "main", commit.oid, records(PIPELINE))
    assert from_json(Lock, to_json(pinned), "lock") == pinned
    held = {path.relative_to(locate(pinned)).as_posix() for path in locate(pinned).rglob("*") if path.is_file()}
    assert held == PIPELINE.keys()


@pytest.mark.parametrize("name", STRAYS)
def test_what_is_not_on_the_list_is_never_asked_for(hub: LoopbackHub, name: str) -> None:
    hub.push(BASE, {**PIPELINE, name: STRAYS[name]})
    lock()
    assert not [call for call in hub.calls("/resolve/") if call.line.endswith(name)]


def test_a_local_folder_is_pinned_by_the_same_hashes_and_no_commit(tmp_path: Path) -> None:
    root = write(tmp_path / "base", {**PIPELINE, **STRAYS})
    pinned = lock_base(in_folder(root), previous=None)
    assert pinned == Lock(None, str(root), None, None, records(PIPELINE))
    assert locate(pinned) == root


def test_tags_commits_and_branches_can_be_named(hub: LoopbackHub) -> None:
    commit = hub.push(BASE, PIPELINE)
    hub.registry.repos[BASE].tags["v1"] = commit.oid
    hub.push(BASE, {"vae/config.json": b"{ }"})
    assert lock(revision="v1").revision == commit.oid
    assert lock(revision=commit.oid).revision == commit.oid
    assert lock(revision="main").revision == hub.registry.repos[BASE].head.oid


def test_a_lora_is_one_file_at_a_commit(hub: LoopbackHub) -> None:
    commit = hub.push(LORA, {LORA_FILE: weights(7), "other.safetensors": weights(8)})
    pinned = lock_lora(on_hub(LORA), LORA_FILE, previous=None)
    assert pinned == Lock(LORA, None, "main", commit.oid, records({LORA_FILE: weights(7)}))
    assert (locate(pinned) / LORA_FILE).read_bytes() == weights(7)
    assert not [call for call in hub.calls("/resolve/") if "other" in call.line]


def test_a_name_with_pattern_characters_means_itself(hub: LoopbackHub) -> None:
    hub.push(LORA, {"lora[1].safetensors": weights(7), "lora1.safetensors": weights(8)})
    pinned = lock_lora(on_hub(LORA), "lora[1].safetensors", previous=None)
    assert (locate(pinned) / "lora[1].safetensors").read_bytes() == weights(7)


def test_a_local_lora_may_lie_deep(tmp_path: Path) -> None:
    root = write(tmp_path / "loras", {"a/b/lora.safetensors": weights(7)})
    pinned = lock_lora(in_folder(root), "a/b/lora.safetensors", previous=None)
    assert pinned.files == records({"a/b/lora.safetensors": weights(7)})


def test_links_inside_a_local_base_are_followed(tmp_path: Path) -> None:
    store = write(tmp_path / "store", PIPELINE)
    root = tmp_path / "base"
    root.mkdir()
    for name in ("model_index.json", "scheduler", "tokenizer", "transformer"):
        (root / name).symlink_to(store / name)
    (root / "vae").mkdir()
    for name in ("config.json", "model.safetensors"):
        (root / "vae" / name).symlink_to(store / "vae" / name)
    assert lock_base(in_folder(root), previous=None).files == records(PIPELINE)


# ---------------------------------------------------------------- PEFT folders


PEFT: dict[str, bytes] = {
    "style/adapter_config.json": text({"peft_type": "LORA", "r": 4, "lora_alpha": 8}),
    "style/adapter_model.safetensors": weights(7),
}
PEFT_STRAYS = {"style/README.md": b"# style", "style/optimizer.pt": b"pickle", "other.safetensors": weights(8)}


@pytest.mark.parametrize("folder", ["style", "."])
@pytest.mark.parametrize("local", [True, False], ids=["local", "hub"])
def test_a_peft_folder_is_its_weights_and_its_configuration(
    hub: LoopbackHub, tmp_path: Path, local: bool, folder: str
) -> None:
    files = {(name if folder == "style" else name.removeprefix("style/")): data for name, data in PEFT.items()}
    everything = {**files, **PEFT_STRAYS}
    if local:
        source = in_folder(write(tmp_path / "loras", everything))
    else:
        hub.push(LORA, everything)
        source = on_hub(LORA)
    pinned = lock_lora(source, folder, previous=None)
    assert pinned.files == records(files)
    assert pinned.lora_name == folder
    assert (locate(pinned) / pinned.lora_name / "adapter_config.json").read_bytes() == everything[min(files)]
    assert not [call for call in hub.calls("/resolve/") if "other" in call.line or "optimizer" in call.line]
    asked = len(hub.log)
    assert lock_lora(source, folder, previous=pinned) == pinned
    assert len(hub.log) == asked


def test_a_flipped_byte_in_the_configuration_of_a_peft_folder_is_refused(hub: LoopbackHub) -> None:
    hub.push(LORA, PEFT)
    hub.faults.append(Fault(r"GET .*/resolve/.*/adapter_config\.json", times=-1, flip_at=3))
    message = refusal(lambda: lock_lora(on_hub(LORA), "style", previous=None))
    assert f"style/adapter_config.json of {LORA}@" in message
    assert "git blob" in message


def test_a_peft_folder_and_a_file_of_a_repository_share_its_commit(hub: LoopbackHub) -> None:
    commit = hub.push(LORA, {**PEFT, **PEFT_STRAYS})
    before = lock_lora(on_hub(LORA), "other.safetensors", previous=None)
    hub.push(LORA, {"style/adapter_config.json": b"{}"})
    after = lock_lora(on_hub(LORA), "style", previous=before)
    assert (after.revision, after.files) == (commit.oid, records(PEFT))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"style/adapter_model.safetensors": b"w"}, "there is no style/adapter_config.json; name the .safetensors"),
        ({"style/adapter_config.json": b"{}"}, "there is no style/adapter_model.safetensors"),
        ({"style/adapter_config.json": b"{}", "style/adapter_model.bin": b"p"}, "a pickle (style/adapter_model.bin)"),
    ],
)
def test_a_folder_that_is_not_peft_s_is_refused(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    source = in_folder(write(tmp_path / "loras", files))
    message = refusal(lambda: lock_lora(source, "style", previous=None), BadLora)
    assert "'style' of" in message
    assert said in message


# ---------------------------------------------------------------- the lock stays


def test_a_moved_branch_does_not_move_the_lock(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.push(BASE, PIPELINE)
    before = lock()
    after = hub.push(BASE, {"vae/model.safetensors": weights(9)})
    assert lock(before) == before
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another machine"))
    assert lock(before) == before
    assert lock().revision == after.oid


def test_another_revision_in_the_recipe_makes_another_lock(hub: LoopbackHub) -> None:
    first = hub.push(BASE, PIPELINE)
    before = lock()
    second = hub.push(BASE, {"vae/model.safetensors": weights(9)})
    assert lock(before, revision=second.oid).revision == second.oid != first.oid


def test_another_file_of_a_locked_repository_comes_from_the_same_commit(hub: LoopbackHub) -> None:
    commit = hub.push(LORA, {"a.safetensors": weights(1), "b.safetensors": weights(2)})
    before = lock_lora(on_hub(LORA), "a.safetensors", previous=None)
    hub.push(LORA, {"b.safetensors": weights(3)})
    assert lock_lora(on_hub(LORA), "b.safetensors", previous=before) == Lock(
        LORA, None, None, commit.oid, records({"b.safetensors": weights(2)})
    )


def test_what_is_locked_and_whole_needs_no_network(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(BASE, PIPELINE)
    before = lock()
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    asked = len(hub.log)
    assert lock(before) == before
    assert lock(before, offline=True) == before
    assert (locate(before) / "vae/model.safetensors").read_bytes() == PIPELINE["vae/model.safetensors"]
    assert len(hub.log) == asked


def test_a_changed_local_folder_is_locked_anew(tmp_path: Path) -> None:
    root = write(tmp_path / "base", PIPELINE)
    before = lock_base(in_folder(root), previous=None)
    (root / "vae/model.safetensors").write_bytes(weights(9))
    after = lock_base(in_folder(root), previous=before)
    assert after.files == records({**PIPELINE, "vae/model.safetensors": weights(9)})


def test_a_hub_that_sends_other_bytes_for_a_locked_commit_is_refused(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    pinned = lock()
    claimed = FileRecord(pinned.files["vae/model.safetensors"].size, "0" * 64)
    message = refusal(lambda: lock(replace(pinned, files={**pinned.files, "vae/model.safetensors": claimed})))
    assert "vae/model.safetensors" in message
    assert "0" * 64 in message
    assert pinned.files["vae/model.safetensors"].sha256 in message


# ---------------------------------------------------------------- which bytes are believed


@pytest.mark.parametrize("where", ["GET /_lfs/", r"GET .*/resolve/.*/transformer/config\.json"])
def test_a_byte_flipped_on_the_wire_is_fetched_again(hub: LoopbackHub, where: str) -> None:
    hub.push(BASE, PIPELINE)
    fault = Fault(where, flip_at=5)
    hub.faults.append(fault)
    assert lock().files == records(PIPELINE)
    assert fault.hits == 1


@pytest.mark.parametrize(
    ("where", "name", "hash_name"),
    [
        ("GET /_lfs/", "transformer/model-1-of-2.safetensors", "sha256"),
        (r"GET .*/vae/config\.json", "vae/config.json", "git blob"),
    ],
)
def test_a_byte_flipped_twice_is_refused(hub: LoopbackHub, where: str, name: str, hash_name: str) -> None:
    hub.push(BASE, PIPELINE)
    hub.faults.append(Fault(where, times=-1, flip_at=1))
    message = refusal(lock)
    assert f"{name} of {BASE}@" in message
    assert hash_name in message
    assert "expected" in message
    assert "fetched twice" in message


def test_a_short_answer_is_not_believed(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    hub.faults.append(Fault("GET /_lfs/", times=-1, truncate_to=10))
    assert f"{BASE}@" in refusal(lock)


def test_a_byte_flipped_in_the_cache_is_found_offline_and_mended_online(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    pinned = lock()
    damaged = locate(pinned) / "transformer/model-2-of-2.safetensors"
    flip(damaged)
    assert "transformer/model-2-of-2.safetensors" in refusal(lambda: lock(pinned, offline=True))
    assert "download stage" in refusal(lambda: verify_files(locate(pinned), pinned.files))
    assert lock(pinned) == pinned
    verify_files(locate(pinned), pinned.files)


def test_a_byte_flipped_in_the_cache_is_found_without_a_lock_too(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    flip(locate(lock()) / "vae/config.json")
    assert lock().files == records(PIPELINE)


def test_a_missing_or_cut_file_is_not_located(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    pinned = lock()
    path = locate(pinned) / "vae/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(lambda: locate(pinned))
    assert f"{pinned.files['vae/model.safetensors'].size - 1} bytes" in message
    path.unlink()
    assert "download stage" in refusal(lambda: locate(pinned))


def test_a_lock_of_elsewhere_is_not_located(hub: LoopbackHub, tmp_path: Path) -> None:
    there = Lock(BASE, None, "main", "c" * 40, records(PIPELINE))
    message = refusal(lambda: locate(there))
    assert "model_index.json, scheduler/scheduler_config.json, tokenizer/chat_template.jinja and 8 more of" in message
    assert f"{BASE}@{'c' * 40} are not on this machine" in message
    local = Lock(None, str(tmp_path / "gone"), None, None, records(PIPELINE))
    assert f"{tmp_path / 'gone'} are not on this machine" in refusal(lambda: locate(local))


# ---------------------------------------------------------------- what is refused


def test_a_lora_that_is_no_safetensors_file_is_refused_before_anything_is_fetched(hub: LoopbackHub) -> None:
    hub.push(LORA, {"lora.bin": b"pickle", "lora.ckpt": b"pickle", "lora.txt": b"text"})
    for name in ("lora.bin", "lora.ckpt"):
        assert "a pickle" in refusal(lambda name=name: lock_lora(on_hub(LORA), name, previous=None), BadLora)  # type: ignore[misc]
    assert not hub.log
    assert "not safetensors" in refusal(lambda: lock_lora(on_hub(LORA), "lora.txt", previous=None), BadLora)
    assert not hub.calls("/resolve/")


@pytest.mark.parametrize("name", ["../lora.safetensors", "/etc/lora.safetensors", "a/../../lora.safetensors"])
def test_a_lora_outside_its_source_is_refused(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(lambda: lock_lora(in_folder(tmp_path), name, previous=None))


NO_WEIGHTS = {name: data for name, data in PIPELINE.items() if not name.endswith((".safetensors", "index.json"))}
ONLY_PICKLES = {
    **{name: data for name, data in PIPELINE.items() if name != "vae/model.safetensors"},
    "vae/model.bin": b"pickle",
}
BROKEN = [
    ({"vae/config.json": b"{}"}, "has no model_index.json"),
    ({**NO_WEIGHTS, "model_index.json": PIPELINE["model_index.json"]}, "has no safetensors weights"),
    (ONLY_PICKLES, "vae/ of SOURCE has weights only as pickles"),
    ({k: v for k, v in PIPELINE.items() if "2-of-2" not in k}, "has no transformer/model-2-of-2.safetensors"),
    ({k: v for k, v in PIPELINE.items() if not k.startswith("tokenizer")}, "has no folder tokenizer/"),
    ({**PIPELINE, "model_index.json": b"{"}, "model_index.json of SOURCE is not JSON"),
    ({**PIPELINE, "vae/second.safetensors": weights(9)}, "vae/ of SOURCE has 2 safetensors files and no index"),
]


@pytest.mark.parametrize(("files", "said"), BROKEN, ids=[said for _, said in BROKEN])
@pytest.mark.parametrize("local", [True, False], ids=["local", "hub"])
def test_a_base_that_is_not_whole_is_refused(
    hub: LoopbackHub, tmp_path: Path, files: dict[str, bytes], said: str, local: bool
) -> None:
    if local:
        source = in_folder(write(tmp_path / "base", files))
        label = str(source.path)
    else:
        label = f"{BASE}@{hub.push(BASE, files).oid}"
        source = on_hub(BASE)
    message = refusal(lambda: lock_base(source, previous=None))
    assert label in message
    assert said.replace("SOURCE", label) in message
    assert not hub.calls("GET /_lfs/"), "weights were fetched of a base that is refused"


def test_a_dangling_link_in_a_local_base_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "base", PIPELINE)
    (root / "vae/model.safetensors").unlink()
    (root / "vae/model.safetensors").symlink_to(tmp_path / "gone")
    message = refusal(lambda: lock_base(in_folder(root), previous=None))
    assert "vae/model.safetensors" in message
    assert "cannot be read" in message
    assert "mend the folder" in message


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(lambda: lock_base(in_folder(tmp_path / "gone"), previous=None))


# ---------------------------------------------------------------- what a person is told


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
