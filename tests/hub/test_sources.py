"""Sources that are refused, and why: not whole, not to be had, or with other bytes than the Hub names."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_fuse.errors import BadLora
from lora_fuse.hub.locks import lock_base, lock_lora, verify_files
from lora_fuse.machine.files import MOST
from lora_fuse.recipe.hf_cache import locate
from lora_fuse.recipe.records import Lock, to_json
from tests.hub_server import Fault, LoopbackHub
from tests.support.machine import ROOT
from tests.support.repositories import (
    BASE,
    LORA,
    LORA_FILE,
    NOWHERE,
    PIPELINE,
    flip,
    lock,
    records,
    refusal,
    weights,
    write,
)
from tests.support.tiny import in_folder, on_hub


def test_a_lora_that_is_no_safetensors_file_is_refused_before_anything_is_fetched(hub: LoopbackHub) -> None:
    hub.push(LORA, {"lora.bin": b"pickle", "lora.ckpt": b"pickle", "lora.txt": b"text"})
    for name in ("lora.bin", "lora.ckpt"):
        assert "a pickle" in refusal(lambda name=name: lock_lora(on_hub(LORA), name, previous=None), kind=BadLora)  # type: ignore[misc]
    assert not hub.log
    assert "not safetensors" in refusal(lambda: lock_lora(on_hub(LORA), "lora.txt", previous=None), kind=BadLora)
    assert not hub.calls("/resolve/")


@pytest.mark.parametrize("name", ["../lora.safetensors", "/etc/lora.safetensors", "a/../../lora.safetensors"])
def test_a_lora_outside_its_source_is_refused(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(lambda: lock_lora(in_folder(tmp_path), name, previous=None))


NO_WEIGHTS = {name: data for name, data in PIPELINE.items() if not name.endswith((".safetensors", "index.json"))}

ONLY_PICKLES = {
    **{name: data for name, data in PIPELINE.items() if name != "vae/model.safetensors"},
    "vae/model.bin": b"pickle",
}

TWO_OF_NO_NAME = {
    **{name: data for name, data in PIPELINE.items() if name != "vae/model.safetensors"},
    "vae/first.safetensors": weights(8),
    "vae/second.safetensors": weights(9),
}

ONLY_A_VARIANT = {
    **{name: data for name, data in PIPELINE.items() if name != "vae/model.safetensors"},
    "vae/model.fp16.safetensors": weights(8),
}

BROKEN = [
    (ONLY_A_VARIANT, "vae/ of SOURCE has weights only as a variant (fp16)"),
    ({"vae/config.json": b"{}"}, "has no model_index.json"),
    ({**NO_WEIGHTS, "model_index.json": PIPELINE["model_index.json"]}, "has no safetensors weights"),
    (ONLY_PICKLES, "vae/ of SOURCE has weights only as pickles"),
    ({k: v for k, v in PIPELINE.items() if "2-of-2" not in k}, "has no transformer/model-2-of-2.safetensors"),
    ({k: v for k, v in PIPELINE.items() if not k.startswith("tokenizer")}, "has no folder tokenizer/"),
    ({**PIPELINE, "model_index.json": b"{"}, "model_index.json of SOURCE is not JSON"),
    (TWO_OF_NO_NAME, "vae/ of SOURCE has 2 safetensors files and no index"),
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
    refusal(lambda: lock_base(source, previous=None), label, said.replace("SOURCE", label))
    assert not hub.calls("GET /_lfs/"), "weights were fetched of a base that is refused"


def test_a_dangling_link_in_a_local_base_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "base", PIPELINE)
    (root / "vae/model.safetensors").unlink()
    (root / "vae/model.safetensors").symlink_to(tmp_path / "gone")
    refusal(
        lambda: lock_base(in_folder(root), previous=None), "vae/model.safetensors", "cannot be read", "mend the folder"
    )


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MOST + 1)  # a hole: it takes no room


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer/vocab.json": (os.mkfifo, "it is a named pipe, not a regular file"),
    "tokenizer/merges.txt": (lambda path: path.symlink_to("/dev/zero"), "a link leads to /dev/zero, out of"),
    "tokenizer/notes.txt": (lambda path: path.symlink_to("/etc/hostname"), "a link leads to /etc/hostname, out of"),
    "model_index.json": (
        too_large,
        f"has {MOST + 1} bytes, and at most {MOST} are read",
    ),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_only_what_lies_in_a_local_base_is_opened(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "base", PIPELINE)
    put, said = NO_FILES[name]
    (root / name).unlink(missing_ok=True)
    put(root / name)
    refusal(lambda: lock_base(in_folder(root), previous=None), name, said)


def test_a_link_out_of_the_loras_folder_is_refused(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", {LORA_FILE: weights(7)})
    (tmp_path / "loras" / LORA_FILE).parent.mkdir(parents=True)
    (tmp_path / "loras" / LORA_FILE).symlink_to(elsewhere / LORA_FILE)
    refusal(lambda: lock_lora(in_folder(tmp_path / "loras"), LORA_FILE, previous=None), "a link leads to", "out of")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(lambda: lock_base(in_folder(tmp_path / "gone"), previous=None))


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
    refusal(lock, f"{name} of {BASE}@", hash_name, "expected", "fetched twice")


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
    refusal(lambda: locate(pinned), f"{pinned.files['vae/model.safetensors'].size - 1} bytes")
    path.unlink()
    assert "download stage" in refusal(lambda: locate(pinned))


def test_a_lock_of_elsewhere_is_not_located(hub: LoopbackHub, tmp_path: Path) -> None:
    there = Lock(BASE, None, "main", "c" * 40, records(PIPELINE))
    refusal(
        lambda: locate(there),
        "model_index.json, scheduler/scheduler_config.json, tokenizer/chat_template.jinja and 8 more of",
        f"{BASE}@{'c' * 40} are not on this machine",
    )
    local = Lock(None, str(tmp_path / "gone"), None, None, records(PIPELINE))
    assert f"{tmp_path / 'gone'} are not on this machine" in refusal(lambda: locate(local))


def test_a_missing_and_a_private_repository_look_the_same_and_name_the_way_out(hub: LoopbackHub) -> None:
    missing = refusal(lock)
    hub.create(BASE, private=True)
    assert refusal(lock) == missing
    assert f"{BASE}@main" in missing
    assert "HF_TOKEN" in missing


def test_a_gated_repository_names_the_page_to_visit(hub: LoopbackHub) -> None:
    hub.create(BASE, gated=True)
    hub.push(BASE, PIPELINE)
    refusal(lock, "gated", f"{hub.url}/{BASE}")


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
    refusal(lock, f"{hub.url} answered 503", "try again later")


def test_no_connection_and_no_lock_is_one_line(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    refusal(lock, f"{BASE}@main", "check the connection")


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
