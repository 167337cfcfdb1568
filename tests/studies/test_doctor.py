"""Every check of the doctor that can fail is given what it has to reject; real disks, folders and a real Hub."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import lora_fuse
from lora_fuse.errors import BadLora, BadSource, Refused
from lora_fuse.hub import sizes
from lora_fuse.lora import LoraInput
from lora_fuse.machine.parsing import parse_yaml
from lora_fuse.machine.space import free_bytes
from lora_fuse.pictures.environment import CPU_PINS, Key
from lora_fuse.recipe.paths import Artifacts
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import Lock
from lora_fuse.recipe.sections import Source
from lora_fuse.studies.doctor import access, disk, memory, software
from lora_fuse.studies.doctor.examination import _places, approved_pictures, in_the_base
from lora_fuse.studies.doctor.finding import Finding, Status, fail, ok, table, verdict, warn
from tests.hub_server import Fault, LoopbackHub
from tests.support.machine import ROOT
from tests.support.machine import small_disk as mounted
from tests.support.repositories import BASE, LORA, LORA_FILE, NOWHERE, PIPELINE, STRAYS, weights, write
from tests.support.tiny import in_folder, on_hub

GB = 10**9
PARTS = {"transformer": 41 * GB, "text_encoder": 16 * GB, "vae": GB // 4}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small", "80m") as folder:
        yield folder


def recipe(base: Source) -> Recipe:
    """The one of params.yaml with another base."""
    tree = parse_yaml((ROOT / "params.yaml").read_text())
    return Recipe.parse(tree | {"base": tree["base"] | base.model_dump()}, "test")


def places(base: Source, out: Path) -> list[Finding]:
    return list(_places(recipe(base), Artifacts(out), {"base": base_size(base, None)}))


def base_size(source: Source, lock: Lock | None) -> sizes.SourceSize:
    return sizes.base_size(source, lock, timeout=10, once=True)


def lora_size(source: Source, filename: str, lock: Lock | None) -> sizes.SourceSize:
    return sizes.lora_size(source, filename, lock, timeout=10, once=True)


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def run(*arguments: str, cwd: Path = ROOT, **env: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "stages.doctor", "--json", *arguments]
    here = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(command, cwd=cwd, env=here, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


# ---------------------------------------------------------------- the whole


def test_a_lora_that_is_in_its_base_is_a_warning_and_one_that_cannot_be_fused_a_failure(tmp_path: Path) -> None:
    (name, lora), *_ = recipe(in_folder(ROOT / "pocket/model")).loras.items()
    given = LoraInput(name, ROOT / str(lora.path) / lora.filename, 1.0)
    merged = tmp_path / "merged"
    lora_fuse.fuse(lora_fuse.plan(ROOT / "pocket/model", [given]), merged, untouched="copy")

    def looked() -> Finding:
        found = {"base": base_size(in_folder(merged), None), f"LoRA {name}": lora_size(lora, lora.filename, None)}
        return in_the_base(recipe(in_folder(merged)), found)

    assert looked().status is Status.FAIL
    assert "is merged already" in looked().found
    for path in merged.glob("transformer/*.safetensors"):  # as other programs write it
        save_file(load_file(path), path, metadata={"format": "pt"})
    assert looked().status is Status.WARN
    assert f"{lora.filename} is in {merged} already, as it seems" in looked().found


def test_pocket_fits_this_machine_and_nothing_is_written(tmp_path: Path) -> None:
    for name in ("params.yaml", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in ("pocket", "artifacts"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("merged*", ".merged*", "regression")
        )
    before = sorted(tmp_path.rglob("*"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code, found, said = run(cwd=tmp_path, PATH=path, PYTHONDONTWRITEBYTECODE="1")
    assert (code, found["fits"]) == (0, True), found
    assert {finding["status"] for finding in found["findings"]} <= {"ok", "warn"}
    assert [one["status"] for one in found["findings"] if one["name"] == "in the base"] == ["ok"]
    assert sorted(tmp_path.rglob("*")) == before
    assert said == "doctor: looks whether pocket fits this machine; no file is fetched, and none stays\n"


def test_a_hub_s_base_that_the_cache_has_no_room_for_is_said_before_a_byte_is_fetched(
    hub: LoopbackHub, small_disk: Path
) -> None:
    hub.push(BASE, PIPELINE | STRAYS | {"vae/model.safetensors": bytes(90_000_000)})
    hub.push(LORA, {LORA_FILE: weights(7)})
    code, found, _ = run(
        *("base.path=null", f"base.repo_id={BASE}", "base.revision=main", "loras.lightning.path=null"),
        *(f"loras.lightning.repo_id={LORA}", "loras.lightning.revision=main", f"loras.lightning.filename={LORA_FILE}"),
        HF_HUB_CACHE=str(small_disk / "hub"),
    )
    failed = {one["name"]: one for one in found["findings"] if one["status"] == "FAIL"}
    assert (code, found["fits"]) == (1, False)
    assert "disk, cache" in failed, found
    assert failed["disk, cache"]["needed"].startswith("90.0MB")
    assert not {"Hub", "base", "token", "LoRA lightning"} & failed.keys()
    assert not hub.calls("/resolve/")
    assert list(small_disk.iterdir()) == []


# ---------------------------------------------------------------- disks


def test_a_merge_needs_room_beside_the_last_one(small_disk: Path) -> None:
    base, out = small_disk / "base", small_disk / "artifacts"
    write(base, PIPELINE | {"transformer/model-1-of-2.safetensors": bytes(5_000_000)})
    (out / "merged").mkdir(parents=True)
    (out / "merged/model.safetensors").write_bytes(bytes(9_000_000))
    found = named(places(in_folder(base), out), "disk")
    assert found.status is Status.FAIL
    assert f"{out / 'merged'} holds 9.00MB until the new merge is whole" in found.found
    assert "72.1MB beside it" in found.needed  # 5 MB, and the 64 MiB that a merge leaves free
    assert f"or remove {out / 'merged'} first" in found.remedy
    shutil.rmtree(out / "merged")
    assert named(places(in_folder(base), out), "disk").status is Status.OK
    (small_disk / "filler").write_bytes(bytes(9_000_000))
    short = named(places(in_folder(base), out), "disk")
    assert (short.status, "make room for" in short.remedy) == (Status.FAIL, True)


def test_where_the_last_merge_is_a_link_its_target_s_disk_counts(small_disk: Path, tmp_path: Path) -> None:
    write(tmp_path / "base", PIPELINE)
    out = tmp_path / "artifacts"
    out.mkdir()
    assert named(places(in_folder(tmp_path / "base"), out), "disk").status is Status.OK
    (out / "merged").symlink_to(small_disk / "merged")
    (small_disk / "filler").write_bytes(bytes(20_000_000))
    found = named(places(in_folder(tmp_path / "base"), out), "disk")
    assert (found.status, str(small_disk) in found.found) == (Status.FAIL, True)


def test_what_is_fetched_and_what_is_merged_are_added_up_on_one_disk(
    hub: LoopbackHub, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(small_disk / "hub"))
    shard = "transformer/model-1-of-2.safetensors"
    hub.push(BASE, PIPELINE | {shard: bytes(6_000_000)})
    free = free_bytes(small_disk)
    assert base_size(on_hub(BASE), None).to_fetch == sum(map(len, PIPELINE.values())) - len(PIPELINE[shard]) + 6_000_000
    (small_disk / "filler").write_bytes(bytes(free - (67_108_864 + 6_001_000)))  # each of them alone would fit
    found = named(places(on_hub(BASE), small_disk), "disk")
    assert (found.status, "on the same disk" in found.needed) == (Status.FAIL, True)


def test_a_merge_that_is_of_this_recipe_already_is_only_a_warning() -> None:
    there = Path("artifacts/merged")
    assert disk.rebuild("disk", there, GB, 41 * GB, 41 * GB, same=True).status is Status.WARN
    assert disk.rebuild("disk", there, GB, 41 * GB, 0, same=False).remedy == "make room for 40.0GB more"


def test_disks_that_share_no_blocks_make_the_rest_a_copy(small_disk: Path, tmp_path: Path) -> None:
    write(small_disk / "base", PIPELINE | {"vae/model.safetensors": bytes(5_000_000)})
    findings = places(in_folder(small_disk / "base"), tmp_path)
    sharing = named(findings, "sharing")
    assert (sharing.status, "5.00MB are copied" in sharing.found, "tmpfs" in sharing.found) == (Status.WARN, True, True)
    assert "copies of the rest" in named(findings, "disk").needed
    assert sorted(path.name for path in small_disk.iterdir()) == ["base"]  # the probes are gone


def test_a_folder_that_cannot_be_written_fails() -> None:
    found = disk.writable("artifacts", Path("/proc/nowhere/artifacts"))
    assert (found.status, found.found.startswith("/proc cannot be written")) == (Status.FAIL, True)


def test_a_filesystem_without_locks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.locks(tmp_path).status is Status.OK
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert disk.locks(tmp_path).found == "flock lets a second run in"

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    found = disk.locks(tmp_path)
    assert (found.status, "No locks available" in found.found) == (Status.FAIL, True)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- sources, the Hub, the token


def test_sources_that_cannot_be_had_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.push(LORA, {LORA_FILE: weights(7)})
    hub.create("bob/gated", gated=True)
    hub.push("bob/peft", {"l/adapter_config.json": b"{}", "l/adapter_model.bin": b"x"})
    for source, said in (
        (in_folder(tmp_path / "nowhere"), "is not a folder"),
        (on_hub(LORA), r"no model_index\.json"),
        (on_hub("bob/none"), "no such repository"),
    ):
        with pytest.raises(BadSource, match=said):
            base_size(source, None)
    for repo_id, filename, error, said in (
        (LORA, "other", BadSource, "has no other"),
        (LORA, "other.safetensors", BadSource, r"has no other\.safetensors"),
        ("bob/peft", "l", BadLora, "pickle"),
    ):
        with pytest.raises(error, match=said):
            lora_size(on_hub(repo_id), filename, None)


def test_the_hub_s_list_is_that_of_the_download(hub: LoopbackHub) -> None:
    from lora_fuse.hub import lock_base

    hub.push(BASE, PIPELINE | STRAYS)
    source = on_hub(BASE)
    before = base_size(source, None)
    lock = lock_base(source, previous=None)
    assert set(lock.files) <= set(before.sizes)
    after = base_size(source, lock)
    assert (after.to_fetch, after.total, after.known_by) == (0, lock.size, "the lock")


def refusal(source: Source) -> dict[str, Refused]:
    try:
        base_size(source, None)
    except Refused as error:
        return {"base": error}
    return {}


def test_a_hub_that_is_down_or_forbidden_fails(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = refusal(on_hub("bob/none"))
    assert access.reach(missing, 0, used=True).status is Status.OK  # it answered that there is none
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    down = access.reach(refusal(on_hub(BASE)), 0, used=True)
    assert (down.status, down.found) == (Status.FAIL, f"{NOWHERE} does not answer")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = refusal(on_hub(BASE))
    assert "its size is unknown" in str(offline["base"])
    assert access.reach(offline, 0, used=True).remedy == "unset it once, for the download"
    assert access.reach({}, 0, used=True).status is Status.OK


def test_a_token_is_asked_about_and_never_shown(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    good = access.token(needed=True, publishes=True)
    assert (good.status, good.found) == (Status.OK, "HF_TOKEN is alice's, role write")
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert access.token(needed=True, publishes=False).status is Status.OK
    assert access.token(needed=True, publishes=True).status is Status.FAIL
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    bad = access.token(needed=True, publishes=False)
    assert (bad.status, "answered 401" in bad.found, "hf_expired" in bad.text) == (Status.FAIL, True, False)
    assert access.token(needed=False, publishes=False).status is Status.WARN
    hub.faults.append(Fault("/whoami", status=200, body=b'{"name": "alice", "auth": null}'))
    assert "gave an answer that the client cannot read" in access.token(needed=True, publishes=False).found
    monkeypatch.delenv("HF_TOKEN")
    assert access.token(needed=True, publishes=False).status is Status.OK
    assert access.token(needed=False, publishes=True).status is Status.WARN


def test_a_fine_grained_token_is_told_by_its_scopes() -> None:
    scoped = [{"entity": {"name": "bob"}, "permissions": ["repo.content.read"]}]
    account = {"name": "bob", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scoped}}}}
    assert access.rights(account, publishes=False).found == "HF_TOKEN is bob's, role fineGrained: repo.content.read"
    assert access.rights(account, publishes=True).status is Status.FAIL
    scoped[0]["permissions"] = ["repo.content.read", "repo.write"]
    assert access.rights(account, publishes=True).status is Status.OK


# ---------------------------------------------------------------- memory, GPUs, software, pictures


@pytest.mark.parametrize(
    ("placement", "gpus", "better"),
    [
        ("cuda", [80 * GB], None),
        ("cuda", [42 * GB], None),  # the text encoder has gone when the transformer comes
        ("cuda", [40 * GB], "group_offload"),
        ("cuda", [30 * GB, 30 * GB], "balanced"),
        ("cuda", [24 * GB], "group_offload"),
        ("balanced", [40 * GB, 40 * GB], None),
        ("balanced", [20 * GB, 20 * GB], "group_offload"),
        ("model_offload", [44 * GB], None),
        ("model_offload", [24 * GB], "group_offload"),
        ("group_offload", [8 * GB], None),
        ("group_offload", [], "cpu"),
        ("balanced", [], "cpu"),
        ("cpu", [], None),
    ],
)
def test_a_placement_that_does_not_fit_names_the_one_that_does(
    placement: str, gpus: list[int], better: str | None
) -> None:
    found = memory.gpu(placement, PARTS, gpus, "bfloat16")
    assert found.status is (Status.FAIL if better else Status.OK)
    assert found.remedy.partition(",")[0] == (f"set regress.placement={better}" if better else "")


def test_memory_is_compared_with_the_weights_that_are_in_it_together() -> None:
    assert memory.ram("model_offload", PARTS, 64 * GB, 60 * GB, "bfloat16").status is Status.OK
    assert memory.ram("balanced", PARTS, 64 * GB, 30 * GB, "bfloat16").status is Status.WARN
    short = memory.ram("cpu", PARTS, 32 * GB, 30 * GB, "bfloat16")
    assert (short.status, short.needed) == (Status.FAIL, "41.2GB (transformer and VAE in bfloat16)")
    assert memory.together({"unet": 5 * GB, "text_encoder": GB, "text_encoder_2": 2 * GB}) == 5 * GB
    assert memory.ram("cuda", PARTS, 24 * GB, 20 * GB, "bfloat16").status is Status.OK
    assert 0 < memory.memory()[1] <= memory.memory()[0]


def test_weights_are_those_of_the_headers_in_the_dtype_of_the_pictures() -> None:
    stock = base_size(in_folder(ROOT / "pocket/model"), None)
    wide, narrow = memory.weights(stock, "float32")[0], memory.weights(stock, "bfloat16")[0]
    assert wide == {part: 2 * size for part, size in narrow.items()}
    assert wide.keys() == {"text_encoder", "transformer", "vae"}


def test_software_that_is_missing_or_of_another_version_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert software.python(">=3.11,<3.14", "3.14.0").status is Status.FAIL
    needed, listed = software.requirements(ROOT / "pyproject.toml")
    assert software.python(needed).status is Status.OK
    assert software.packages(listed).status is Status.OK
    wrong = software.packages(["numpy<1", "nowhere-to-be-had>=2", "tqdm; python_version < '3'"])
    assert wrong.status is Status.FAIL
    assert "numpy 2" in wrong.found
    assert "nowhere-to-be-had is not installed (needs >=2)" in wrong.found
    assert "tqdm" not in wrong.found
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.command("dvc", "make setup") == fail("dvc", "not on PATH", "", "make setup")


def test_an_environment_against_determinism_fails() -> None:
    assert software.determinism({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, on_gpu=True).status is Status.FAIL
    assert software.determinism({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, on_gpu=True).status is Status.OK
    assert software.determinism({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, on_gpu=False).status is Status.OK
    assert software.determinism({"NVIDIA_TF32_OVERRIDE": "1"}, on_gpu=True).status is Status.WARN
    assert software.determinism({"MKL_CBWR": "AVX512"}, on_gpu=False).status is (Status.WARN if CPU_PINS else Status.OK)
    assert software.determinism(CPU_PINS, on_gpu=False).status is Status.OK  # they are what regress sets


def test_goldens_are_looked_for_by_key_and_damaged_ones_fail(tmp_path: Path) -> None:
    (folder,) = (ROOT / "artifacts/golden/pocket").glob("cpu-x86_64-avx2-2threads-*")
    shutil.copytree(folder, tmp_path / folder.name)
    record = json.loads((folder / "rabbit.json").read_text())["provenance"]["environment"]["key"]
    key = Key(**record)
    assert approved_pictures(tmp_path, ["rabbit", "hat"], key).status is Status.OK
    near = approved_pictures(tmp_path, ["rabbit"], Key(**{**record, "threads": 8}))
    assert (near.status, "4 (review)" in near.found) == (Status.WARN, True)
    none = approved_pictures(tmp_path, ["rabbit", "new"], key)
    assert (none.status, "3 (no-golden)" in none.found) == (Status.WARN, True)
    picture = tmp_path / folder.name / "rabbit.png"
    picture.write_bytes(picture.read_bytes()[:-1])
    assert approved_pictures(tmp_path, ["rabbit"], key).status is Status.FAIL


# ---------------------------------------------------------------- how it is said


def test_the_table_is_aligned_and_wrapped_below_its_column() -> None:
    findings = [ok("disk", "9GB free", "1GB"), fail("memory", "1GB", "2GB", "buy some"), warn("Hub", "slow " * 30)]
    lines = table(findings)
    assert lines[0] == "ok    disk    9GB free; needs 1GB"
    assert lines[1] == "FAIL  memory  1GB; needs 2GB; buy some"
    wrapped = table(findings, 60)[2].splitlines()
    assert len(wrapped) > 1
    assert all(len(line) <= 60 for line in wrapped)
    assert all(line.startswith(" " * 14) for line in wrapped[1:])
    assert verdict("r", findings) == "FAIL: r will not build here: memory"
    assert verdict("r", findings[:1]) == "ok: r fits this machine"
