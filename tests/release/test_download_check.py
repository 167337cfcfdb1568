"""A download is checked file by file, by its list, its signature, and its base and LoRA."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from lora_fuse.machine.files import hash_file
from lora_fuse.release.contents import BOM, LIST, PROVENANCE
from lora_fuse.release.signing import SIGNATURE
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.released import (
    LORA_FILE,
    REPO,
    WEIGHTS,
    Project,
    flip,
    on_the_hub,
    private_key,
    public_key,
    tiny_base,
    tiny_lora,
    verify,
)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed repository as users have it: `plain` files, and `links` in the Hub client's cache.

    `signing.pem` is the key.
    """
    return downloaded(tmp_path_factory.mktemp("downloads"))


def downloaded(root: Path, *overrides: str) -> Path:
    """A project that is built, published and fetched in `root`."""
    (root / "project").mkdir()
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(root / "hub").run() as hub:
        for name, value in (("ENDPOINT", hub.url), ("HOME", str(root / "home")), ("TOKEN", "hf_write")):
            patch.setenv(f"HF_{name}", value)
        project = Project(root / "project", patch, [*on_the_hub(hub, root, "apache-2.0", "mit"), *overrides])
        project.build()
        signing = f"publish.signing.key={private_key(root / 'signing.pem')}"
        assert publish(project.params(signing, "publish.tag=v1")) == 0
        snapshot_download(REPO, endpoint=hub.url, token="hf_write", local_dir=root / "plain")  # noqa: S106
        snapshot_download(REPO, endpoint=hub.url, token="hf_write", cache_dir=root / "links")  # noqa: S106
    return root


@pytest.fixture
def signed(downloads: Path, tmp_path: Path) -> Path:
    """A copy of the plain files, to be damaged."""
    return Path(shutil.copytree(downloads / "plain", tmp_path / "fetched"))


@pytest.fixture
def signing_key(downloads: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(downloads / "signing.pem", tmp_path / "owner.pem"))


def test_a_download_is_right_by_its_list_and_its_signature_and_no_more_is_said_than_was_checked(
    signed: Path, signing_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (signed / ".cache").is_dir()  # the client's own
    assert verify(signed) == 0
    assert capsys.readouterr().out.endswith("download: passed, signed by a key that was not checked\n")
    assert verify(signed, "--public-key", public_key(signing_key)) == 0
    assert capsys.readouterr().out.endswith("download: passed, signature right\n")
    (signed / SIGNATURE).unlink()
    assert verify(signed) == 0
    assert capsys.readouterr().out.endswith("download: passed, unsigned\n")


def test_a_download_says_which_release_it_is_and_no_other_stands_in_for_it(
    signed: Path, signing_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older release, and one of another repository, are signed by the same key."""
    by = ["--public-key", public_key(signing_key)]
    assert verify(signed, *by, "--repository", REPO, "--tag", "v1") == 0
    listed = json.loads((signed / LIST).read_text())
    told = f"release, by its list: {REPO}, tag v1, built by lora-fuse {listed['builder']['version']} ("
    out = capsys.readouterr().out
    assert told in out
    assert f"of the base carol/base@{listed['base']['revision']}" in out
    assert verify(signed, *by, "--repository", REPO, "--tag", "v2") == 1
    assert f"{LIST} names the tag v1, expected v2" in capsys.readouterr().err
    assert verify(signed, *by, "--repository", "alice/other") == 1
    assert f"{LIST} names the repository {REPO}, expected alice/other" in capsys.readouterr().err
    (signed / LIST).write_text(json.dumps({**listed, "tag": "v2"}))
    assert verify(signed, *by, "--tag", "v2") == 1
    assert f"{SIGNATURE} is no signature of these files" in capsys.readouterr().err


def test_an_older_list_without_names_is_read_and_is_not_the_release_that_is_asked_for(
    signed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = json.loads((signed / LIST).read_text())
    for name in ("repository", "tag", "builder"):
        del listed[name]
    (signed / LIST).write_text(json.dumps(listed))
    assert verify(signed) == 0
    assert "its list is an older one and names no repository, tag or builder" in capsys.readouterr().out
    assert verify(signed, "--tag", "v1") == 1
    assert f"{LIST} names no tag, expected v1" in capsys.readouterr().err


def test_the_links_of_the_client_s_cache_are_as_good(downloads: Path, signing_key: Path) -> None:
    (folder,) = downloads.glob("links/models--alice--merged/snapshots/*")
    assert (folder / WEIGHTS).is_symlink()
    assert verify(folder, "--public-key", public_key(signing_key)) == 0


def test_the_library_s_own_command_accepts_the_signature(signed: Path, signing_key: Path) -> None:
    shutil.rmtree(signed / ".cache")
    command = [sys.executable, "-m", "model_signing", "verify", "key", signed, "--signature", signed / SIGNATURE]
    arguments = [*map(str, command), "--public_key", str(public_key(signing_key))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "Verification succeeded" in done.stdout, done.stderr


def test_the_merge_of_a_download_is_checked_with_base_and_lora(
    signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base(tmp_path / "b", "mit")
    lora = tiny_lora(tmp_path / "l", "mit") / LORA_FILE
    assert verify(signed, base, "--lora", lora, "--scale", "0.5") == 1
    capsys.readouterr()
    assert verify(signed, base, "--lora", lora, "--scale", "1.0", "--rows", "all") == 0
    recipe = "note: the class QwenImageEditPipeline and the scheduler's settings are expected as the download's own"
    assert recipe in capsys.readouterr().out
    (signed / PROVENANCE).write_text(
        (signed / PROVENANCE).read_text().replace('"scheduler": {', '"scheduler": [0], "x": {')
    )
    assert verify(signed, base, "--lora", lora) == 1
    assert f"{PROVENANCE} does not say the recipe ([0] is no dict)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/model.safetensors",
        "tokenizer/run.py",
        "images/run.py",
        "images/deep/rabbit.png",
        "diffusion_models/deep/x.safetensors",
        "transformer/config.json",
    ],
)
def test_only_what_a_publication_makes_is_generated_whatever_the_list_says(
    signed: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_bytes(b"{}  ")
    listed = json.loads((signed / LIST).read_text())
    listed["files"][name] = {**dataclasses.asdict(hash_file(signed / name)), "from": "generated"}
    (signed / LIST).write_text(json.dumps(listed))
    assert verify(signed) == 1
    assert f"{name} is called generated in {LIST}, and no publication makes" in capsys.readouterr().err
    lora = tiny_lora(tmp_path / "l", "mit") / LORA_FILE
    assert verify(signed, tiny_base(tmp_path / "b", "mit"), "--lora", lora) == 1
    merge = capsys.readouterr().err.partition("no publication makes")[2]
    assert name in merge  # it is no part of the base either


def test_a_download_in_another_dtype_is_checked_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetched = downloaded(tmp_path, "fuse.dtype=float32") / "plain"
    base, lora = tiny_base(tmp_path / "b", "mit"), tiny_lora(tmp_path / "l", "mit") / LORA_FILE
    assert verify(fetched) == 0
    assert verify(fetched, base, "--lora", lora) == 0
    assert "has them, and float32, signed by" in capsys.readouterr().out
    assert verify(fetched, base, "--lora", lora, "--dtype", "float16") == 1
    index = next((fetched / "transformer").glob("*.index.json"))
    index.write_text(index.read_text().replace('"total_size": ', '"total_size": 1'))
    listed = json.loads((fetched / LIST).read_text())
    listed["files"][f"transformer/{index.name}"] |= dataclasses.asdict(hash_file(index))
    (fetched / LIST).write_text(json.dumps(listed))
    assert verify(fetched, base, "--lora", lora) == 1
    assert "index.json: metadata is" in capsys.readouterr().err


def test_what_a_download_says_is_generated_is_made_again_from_base_and_recipe(
    signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base(tmp_path / "b", "mit")
    lora = tiny_lora(tmp_path / "l", "mit") / LORA_FILE
    name = "scheduler/scheduler_config.json"
    content = json.loads((signed / name).read_text())
    (signed / name).write_text(json.dumps(content | {"use_dynamic_shifting": not content["use_dynamic_shifting"]}))
    listed = json.loads((signed / LIST).read_text())
    listed["files"][name] |= dataclasses.asdict(hash_file(signed / name))
    (signed / LIST).write_text(json.dumps(listed))
    assert verify(signed) == 0
    assert verify(signed, base, "--lora", lora) == 1
    assert "scheduler_config.json: use_dynamic_shifting is" in capsys.readouterr().err


PUBLISHED = (WEIGHTS, "README.md", "model_index.json", "images/rabbit.png", "images/blocks.png", PROVENANCE, BOM)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_flipped_byte_is_found_with_and_without_a_key(
    signed: Path, signing_key: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(signed / name)
    assert verify(signed) == 1
    assert f"problem: {name}: sha256" in capsys.readouterr().err
    assert verify(signed, "--public-key", public_key(signing_key)) == 1


def put(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make(path)


def put_folder(path: Path) -> None:
    put(path, lambda path: path.mkdir())
    (path / "run.py").write_text("x")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / WEIGHTS).unlink(), f"{WEIGHTS}: it cannot be read"),
        (lambda root: (root / "transformer/more.safetensors").write_bytes(b"x"), "more.safetensors is not in"),
        (lambda root: (root / "run.py").write_text("x"), "run.py is not in"),
        (lambda root: (root / "LICENSE_x.py").write_text("x"), "LICENSE_x.py is not in"),
        (lambda root: (root / "license.safetensors").write_text("x"), "license.safetensors is not in"),
        (lambda root: (root / "more").symlink_to(root / "vae"), "more is not in"),
        (lambda root: put_folder(root / ".gitattributes"), ".gitattributes/run.py is not in"),
        (lambda root: put(root / ".cache", lambda path: path.symlink_to(root / "vae")), ".cache is not in"),
        (lambda root: put(root / LIST, lambda path: path.symlink_to("/etc/hostname")), f"{LIST} is no list of files"),
        (lambda root: (root / "more.png").symlink_to(root / "vae"), "more.png is not in"),
        (lambda root: (root / LIST).write_text("{}"), f"{LIST} is no list of files"),
        (lambda root: (root / LIST).write_bytes(b"\xff"), f"{LIST} is no list of files"),
        (lambda root: (root / LIST).write_text('"../'.join((root / LIST).read_text().rsplit('"vae/', 1))), "leads out"),
        (lambda root: put(root / WEIGHTS, os.mkfifo), f"{WEIGHTS}: it cannot be read (it is a named pipe, not a"),
        (lambda root: put(root / LIST, os.mkfifo), f"has no {LIST}"),
        (lambda root: put(root / WEIGHTS, lambda path: path.symlink_to("/etc/hostname")), "a link leads to /etc/host"),
    ],
    ids=[
        "missing",
        "more weights",
        "code",
        "notice",
        "licence",
        "folder",
        "folder of git",
        "link in the place of a cache",
        "link of a list",
        "picture",
        "empty list",
        "no text",
        "outside",
        "pipe",
        "pipe of a list",
        "link",
    ],
)
def test_other_files_than_the_list_s_are_found(
    signed: Path, damage: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(signed)
    assert verify(signed) == (2 if "has no" in said else 1)
    assert said in capsys.readouterr().err


def test_a_notice_that_somebody_adds_is_noted_and_does_no_harm(
    signed: Path, signing_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (signed / "LICENSE").write_text("Apache")
    assert verify(signed, "--public-key", public_key(signing_key)) == 0
    assert "note: LICENSE is not in" in capsys.readouterr().out


def test_a_list_that_was_changed_with_its_file_is_found_by_the_signature_only(signed: Path, signing_key: Path) -> None:
    was = json.loads((signed / LIST).read_text())["files"][WEIGHTS]["sha256"]
    flip(signed / WEIGHTS)
    (signed / LIST).write_text((signed / LIST).read_text().replace(was, hash_file(signed / WEIGHTS).sha256))
    assert verify(signed) == 0
    assert verify(signed, "--public-key", public_key(signing_key)) == 1


def test_a_signature_by_another_key_is_found(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = public_key(private_key(tmp_path / "other.pem"))
    assert verify(signed, "--public-key", other) == 1
    assert f"{SIGNATURE} is no signature of these files by the key of {other}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"junk", b"\xff", b"[" * 100_000, None], ids=["", "{}", "junk", "xff", "deep", "none"]
)
def test_a_broken_or_missing_signature_is_found_in_one_line(
    signed: Path, signing_key: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (signed / SIGNATURE).unlink()
    else:
        (signed / SIGNATURE).write_bytes(content)
    assert verify(signed) == 0
    capsys.readouterr()
    assert verify(signed, "--public-key", public_key(signing_key)) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_that_is_none_is_not_opened_for_its_signature(signed: Path, signing_key: Path) -> None:
    put(signed / WEIGHTS, os.mkfifo)
    assert verify(signed, "--public-key", public_key(signing_key)) == 1


def test_sigstore_that_cannot_be_asked_is_one_line(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    for name in ("DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path))
    assert verify(signed, "--identity", "a@example.org", "--issuer", "https://example.org") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Sigstore, which vouches for a@example.org (https://example.org), cannot be asked: ")


@pytest.mark.parametrize("kind", ["missing", "private", "junk"])
def test_what_is_no_public_key_is_refused(
    signed: Path, signing_key: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "junk").write_text("junk")
    path = {"missing": tmp_path / "nowhere", "private": signing_key, "junk": tmp_path / "junk"}[kind]
    assert verify(signed, "--public-key", path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert signing_key.read_text().splitlines()[1] not in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["somewhere"],
        ["somewhere", "base"],
        ["somewhere", "--lora", "l"],
        ["somewhere", "--identity", "me"],
        ["somewhere", "--identity", "me", "--issuer", "url", "--public-key", "k"],
    ],
    ids=["no list", "base alone", "lora alone", "identity alone", "two"],
)
def test_what_cannot_be_checked_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "somewhere").mkdir()
    assert verify(tmp_path / arguments[0], *arguments[1:]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
