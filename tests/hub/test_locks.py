"""Locks: what is pinned and what is fetched, also of PEFT folders. Against a Hub on the loopback interface."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lora_fuse.errors import BadLora, BadSource
from lora_fuse.hub.locks import lock_base, lock_lora
from lora_fuse.hub.sizes import base_size, lora_size
from lora_fuse.machine.file_state import FileState
from lora_fuse.machine.files import FileRecord
from lora_fuse.recipe.hf_cache import cache_dir, locate
from lora_fuse.recipe.records import Lock, from_json, to_json
from lora_fuse.recipe.sections import DownloadParams
from tests.hub_server import Fault, LoopbackHub
from tests.support.repositories import (
    BASE,
    LORA,
    LORA_FILE,
    NOWHERE,
    PIPELINE,
    STRAYS,
    lock,
    records,
    refusal,
    text,
    weights,
    write,
)
from tests.support.tiny import in_folder, on_hub

# ---------------------------------------------------------------- what is pinned and taken


def test_what_a_lock_will_fetch_is_known_before_any_of_it_is(hub: LoopbackHub) -> None:
    hub.push(BASE, {**PIPELINE, **STRAYS})
    hub.push(LORA, {LORA_FILE: weights(7), "README.md": b"# lora"})
    base, lora = on_hub(BASE), on_hub(LORA)
    sizes = base_size(base, None, timeout=60)
    assert sizes.sizes.keys() == PIPELINE.keys() | {"safety_checker/model.safetensors"}  # at most
    assert sizes.to_fetch == sizes.total > sum(map(len, PIPELINE.values()))
    assert sizes.fused([None]) == sum(len(PIPELINE[name]) for name in PIPELINE if name.startswith("transformer/"))
    one = lora_size(lora, LORA_FILE, None, timeout=60)
    assert (one.sizes, one.missing) == ({LORA_FILE: len(weights(7))}, frozenset({LORA_FILE}))
    with pytest.raises(BadSource, match=r"has no no\.safetensors"):
        lora_size(lora, "no.safetensors", None, timeout=60)
    assert not list(cache_dir().glob("models--*/snapshots"))
    pinned = lock()
    known = base_size(base, pinned, timeout=60)
    assert (known.sizes, known.missing) == ({name: len(data) for name, data in PIPELINE.items()}, frozenset())


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


def test_a_file_is_hashed_while_the_next_one_is_on_its_way(hub: LoopbackHub) -> None:
    hub.push(BASE, PIPELINE)
    last = records(PIPELINE)["vae/model.safetensors"].sha256
    slow = Fault(f"GET /_lfs/.*{last}", times=-1, trickle=1)  # a byte a second, until another file is hashed
    hub.faults.append(slow)

    def note(path: Path, _: FileState, __: FileRecord) -> None:
        if path.name == "model-1-of-2.safetensors":
            slow.trickle = 0

    transfer = DownloadParams(workers=8, stall_seconds=8)
    assert lock_base(on_hub(BASE), previous=None, transfer=transfer, note=note).files == records(PIPELINE)
    assert slow.hits == 1


def test_a_local_folder_is_pinned_by_the_same_hashes_and_no_commit(tmp_path: Path) -> None:
    root = write(tmp_path / "base", {**PIPELINE, **STRAYS})
    pinned = lock_base(in_folder(root), previous=None)
    assert pinned == Lock(None, str(root), None, None, records(PIPELINE))
    assert locate(pinned) == root


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil/code--m.X", None]}}),
        ("model_index.json", {"_class_name": "P", "transformer": ["diffusers", "T"], "vae": ["os", "system"]}),
        ("vae/config.json", {"_class_name": ["own", "Vae"]}),
    ],
)
def test_a_base_that_asks_for_code_is_refused_before_its_weights_come(
    name: str, content: object, hub: LoopbackHub
) -> None:
    hub.push(BASE, {**PIPELINE, name: text(content)})
    refusal(lock, f"{BASE}@", f"{name} says ", "no code of a base is run here")
    assert not [call.line for call in hub.calls(BASE) if "resolve" in call.line and ".safetensors" in call.line[-20:]]


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
    for name in ("scheduler", "tokenizer", "transformer", "vae"):
        (root / name).symlink_to(store / name)
    shutil.copy(store / "model_index.json", root / "index")
    (root / "model_index.json").symlink_to("index")
    assert lock_base(in_folder(root), previous=None).files == records(PIPELINE)


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
        LORA, None, "main", commit.oid, records({"b.safetensors": weights(2)})
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
    refusal(
        lambda: lock(replace(pinned, files={**pinned.files, "vae/model.safetensors": claimed})),
        "vae/model.safetensors",
        "0" * 64,
        pinned.files["vae/model.safetensors"].sha256,
    )


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


@pytest.mark.parametrize("named", ["style/adapter_model.safetensors", "style/mine.safetensors"])
@pytest.mark.parametrize("local", [True, False], ids=["local", "hub"])
def test_a_file_that_is_named_itself_brings_the_configuration_beside_it(
    hub: LoopbackHub, tmp_path: Path, local: bool, named: str
) -> None:
    files = {named: weights(7), "style/adapter_config.json": PEFT["style/adapter_config.json"]}
    source = in_folder(write(tmp_path / "loras", {**files, **PEFT_STRAYS})) if local else on_hub(LORA)
    if not local:
        hub.push(LORA, {**files, **PEFT_STRAYS})
    pinned = lock_lora(source, named, previous=None)
    assert pinned.files == records(files)
    assert (locate(pinned) / pinned.lora_name).name == ("style" if "adapter" in named else "mine.safetensors")
    asked = len(hub.log)
    assert lock_lora(source, named, previous=pinned) == pinned
    assert len(hub.log) == asked


def test_a_configuration_of_another_file_is_left_there(tmp_path: Path) -> None:
    files = {**PEFT, "style/mine.safetensors": weights(9)}
    pinned = lock_lora(in_folder(write(tmp_path / "loras", files)), "style/mine.safetensors", previous=None)
    assert list(pinned.files) == ["style/mine.safetensors"]


def test_a_flipped_byte_in_the_configuration_of_a_peft_folder_is_refused(hub: LoopbackHub) -> None:
    hub.push(LORA, PEFT)
    hub.faults.append(Fault(r"GET .*/resolve/.*/adapter_config\.json", times=-1, flip_at=3))
    refusal(
        lambda: lock_lora(on_hub(LORA), "style", previous=None), f"style/adapter_config.json of {LORA}@", "git blob"
    )


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
    refusal(lambda: lock_lora(source, "style", previous=None), "'style' of", said, kind=BadLora)
