"""What is published beside the weights, by a Hub on the loopback and back: licences, list, signature, statements."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from huggingface_hub import snapshot_download
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from PIL import Image

from lora_fuse.cli import main
from lora_fuse.errors import BadConfig, BadKey, MissingExtra, PublishRefused
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.hub import lock_base, lock_lora
from lora_fuse.recipe import checkout as provenance
from lora_fuse.recipe.paths import HERE as at  # noqa: N811
from lora_fuse.recipe.records import License
from lora_fuse.recipe.sections import Signer
from lora_fuse.release.block_plot import block_plot
from lora_fuse.release.contents import BOM, LIST, PROVENANCE
from lora_fuse.release.signing import SIGNATURE, keep_or_sign, sign
from lora_fuse.release.slsa import provenance_json, purl
from stages.export import export_formats
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support import tiny
from tests.support.released import REPO, ROOT, Project
from tests.support.tiny import in_folder, on_hub

WEIGHTS = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
LORA_FILE = "lightning/l.safetensors"


# ---------------------------------------------------------------- keys


def private_key(path: Path, key: Any = None, password: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = (key or ec.generate_private_key(ec.SECP256R1())).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    path.write_bytes(pem)
    return path


def public_key(private: Path) -> Path:
    key = serialization.load_pem_private_key(private.read_bytes(), None).public_key()
    path = private.with_suffix(".pub")
    path.write_bytes(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return private_key(tmp_path / "signing.pem")


# ---------------------------------------------------------------- a project, and what a user downloads


def tiny_base(folder: Path, licence: str | None) -> Path:
    tiny.write_pipeline(folder, tiny.weights())
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer": ["diffusers", "Tiny"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae/diffusion_pytorch_model.bin").unlink()
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "no front matter\n")
    (folder / "transformer/config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    return folder


def tiny_lora(folder: Path, licence: str | None) -> Path:
    tiny.write_lora(folder / LORA_FILE, tiny.lora_tensors())
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "")
    return folder


def on_the_hub(hub: LoopbackHub, tmp_path: Path, base: str | None, lora: str | None) -> list[str]:
    """Push a base and a LoRA, and the overrides that name them."""
    for repo_id, folder in (
        ("carol/base", tiny_base(tmp_path / "base", base)),
        ("dave/lora", tiny_lora(tmp_path / "lora", lora)),
    ):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        hub.push(repo_id, files)
        shutil.rmtree(folder)
    return [
        *("base.path=null", "base.repo_id=carol/base", "base.revision=main"),
        *("loras.lightning.path=null", "loras.lightning.repo_id=dave/lora", "loras.lightning.revision=main"),
        f"loras.lightning.filename={LORA_FILE}",
    ]


Build = Callable[..., Project]


@pytest.fixture
def build(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    def made(base: str | None = "apache-2.0", lora: str | None = "mit") -> Project:
        (tmp_path / "project").mkdir()
        project = Project(tmp_path / "project", monkeypatch, on_the_hub(hub, tmp_path, base, lora))
        project.build()
        return project

    return made


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed repository as users have it: `plain` files, and `links` in the Hub client's cache.

    `signing.pem` is the key.
    """
    root = tmp_path_factory.mktemp("downloads")
    (root / "project").mkdir()
    with pytest.MonkeyPatch.context() as patch, LoopbackHub(root / "hub").run() as hub:
        for name, value in (("ENDPOINT", hub.url), ("HOME", str(root / "home")), ("TOKEN", "hf_write")):
            patch.setenv(f"HF_{name}", value)
        project = Project(root / "project", patch, on_the_hub(hub, root, "apache-2.0", "mit"))
        project.build()
        assert publish(project.params(f"publish.signing.key={private_key(root / 'signing.pem')}")) == 0
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


def verify(*arguments: object) -> int:
    return main(["verify", *map(str, arguments)])


# ---------------------------------------------------------------- a download is checked file by file


def test_a_download_is_right_by_its_list_and_its_signature(signed: Path, signing_key: Path) -> None:
    assert (signed / ".cache").is_dir()  # the client's own
    assert verify(signed) == 0
    assert verify(signed, "--public-key", public_key(signing_key)) == 0


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


def test_the_merge_of_a_download_is_checked_with_base_and_lora(signed: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "b", "mit")
    lora = tiny_lora(tmp_path / "l", "mit") / LORA_FILE
    assert verify(signed, base, "--lora", lora, "--scale", "1.0", "--rows", "all") == 0
    assert verify(signed, base, "--lora", lora, "--scale", "0.5") == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


PUBLISHED = (WEIGHTS, "README.md", "model_index.json", "images/rabbit.png", "images/blocks.png", PROVENANCE, BOM)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_flipped_byte_is_found_with_and_without_a_key(
    signed: Path, signing_key: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(signed / name)
    assert verify(signed) == 1
    assert f"problem: {name}: sha256" in capsys.readouterr().err
    assert verify(signed, "--public-key", public_key(signing_key)) == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / WEIGHTS).unlink(), f"{WEIGHTS}: it cannot be read"),
        (lambda root: (root / "transformer/more.safetensors").write_bytes(b"x"), "more.safetensors is not in"),
        (lambda root: (root / "run.py").write_text("x"), "run.py is not in"),
        (lambda root: (root / LIST).write_text("{}"), f"{LIST} is no list of files"),
        (lambda root: (root / LIST).write_bytes(b"\xff"), f"{LIST} is no list of files"),
        (lambda root: (root / LIST).write_text('"../'.join((root / LIST).read_text().rsplit('"vae/', 1))), "leads out"),
    ],
    ids=["missing", "more weights", "code", "empty list", "no text", "outside"],
)
def test_other_files_than_the_list_s_are_found(
    signed: Path, damage: Callable[[Path], object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(signed)
    assert verify(signed) == 1
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
    from lora_fuse.machine.files import hash_file

    (signed / LIST).write_text((signed / LIST).read_text().replace(was, hash_file(signed / WEIGHTS).sha256))
    assert verify(signed) == 0
    assert verify(signed, "--public-key", public_key(signing_key)) == 1


def test_a_signature_by_another_key_is_found(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = public_key(private_key(tmp_path / "other.pem"))
    assert verify(signed, "--public-key", other) == 1
    assert f"{SIGNATURE} is no signature of these files by the key of {other}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", b"junk", b"\xff", None], ids=str)
def test_a_broken_or_missing_signature_is_found(signed: Path, signing_key: Path, content: bytes | None) -> None:
    if content is None:
        (signed / SIGNATURE).unlink()
    else:
        (signed / SIGNATURE).write_bytes(content)
    assert verify(signed) == 0
    assert verify(signed, "--public-key", public_key(signing_key)) == 1


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


# ---------------------------------------------------------------- signing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model/sub").mkdir(parents=True)
    (tmp_path / "model/a.txt").write_text("a")
    (tmp_path / "model/sub/b.txt").write_text("b")
    return tmp_path / "model"


def test_the_signature_of_the_last_time_is_kept_while_it_is_right(folder: Path, key: Path, tmp_path: Path) -> None:
    first = keep_or_sign(folder, Signer(key), None)
    assert keep_or_sign(folder, Signer(key), first) == first
    other = private_key(tmp_path / "other.pem")
    assert keep_or_sign(folder, Signer(other), first) != first
    assert keep_or_sign(folder, Signer(key), b"junk") not in (first, b"junk")
    (folder / "a.txt").write_text("c")
    assert keep_or_sign(folder, Signer(key), first) != first
    assert sorted(path.name for path in folder.rglob("*")) == ["a.txt", "b.txt", "sub"]


def bad_key(path: Path, kind: str) -> Path:
    if kind == "rsa":
        return private_key(path, rsa.generate_private_key(65537, 2048))
    if kind == "curve":
        return private_key(path, ec.generate_private_key(ec.SECP256K1()))
    if kind == "password":
        return private_key(path, password=b"secret")
    if kind == "public":
        return public_key(private_key(path))
    if kind == "junk":
        path.write_text("-----BEGIN PRIVATE KEY-----\nTOPSECRET\n-----END PRIVATE KEY-----\n")
    return path


@pytest.mark.parametrize("kind", ["missing", "rsa", "curve", "password", "public", "junk"])
def test_a_key_that_cannot_sign_is_refused_and_never_shown(
    build: Build, hub: LoopbackHub, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = bad_key(tmp_path / "bad.pem", kind)
    project = build()
    with pytest.raises(BadKey) as caught:
        publish(project.params(f"publish.signing.key={path}"))
    assert str(path) in str(caught.value)
    assert REPO not in hub.registry.repos
    lines = path.read_text().splitlines() if path.exists() else []
    said = str(caught.value) + repr(caught.value.__cause__) + "".join(capfd.readouterr())
    assert not [line for line in lines if line and not line.startswith("-----") and line in said]


def test_nothing_of_the_key_is_published_or_kept(
    build: Build, hub: LoopbackHub, key: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = build()
    publish(project.params(f"publish.signing.key={key}"))
    published = b"".join(hub.read(REPO, name) for name in hub.registry.repos[REPO].head.tree)
    kept = b"".join(p.read_bytes() for p in project.root.rglob("artifacts/**/*") if p.is_file())
    said = "".join(capfd.readouterr()).encode()
    for line in key.read_bytes().splitlines():
        assert line.startswith(b"-----") or line not in published + kept + said
    assert str(key.parent).encode() not in published


def test_a_key_and_keyless_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path, monkeypatch, [])
    with pytest.raises(BadConfig, match="not both"):
        project.params("publish.signing.key=k", "publish.signing.keyless=true")
    assert project.params().publish.signing.signer is None
    assert project.params("publish.signing.keyless=true").publish.signing.signer == Signer(None)


def test_without_the_package_the_extra_is_named(folder: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingExtra, match=r"a signature needs model_signing.*'lora-fuse\[sign\]'"):
        sign(folder, Signer(key))


# ---------------------------------------------------------------- licences


def test_locks_say_the_licence_at_their_commit_and_keep_it(hub: LoopbackHub, tmp_path: Path) -> None:
    on_the_hub(hub, tmp_path, "apache-2.0", None)
    base = lock_base(on_hub("carol/base"), previous=None)
    lora = lock_lora(on_hub("dave/lora"), LORA_FILE, previous=None)
    assert (base.license, lora.license) == (License("apache-2.0"), None)
    hub.push("carol/base", {"README.md": b"---\nlicense: mit\n---\n"})
    assert lock_base(on_hub("carol/base"), previous=base, offline=True) == base
    assert lock_base(on_hub("carol/base"), previous=None).license == License("mit")


def test_a_local_folder_s_licence_is_in_its_lock(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base", "cc0-1.0")
    assert lock_base(in_folder(folder), previous=None).license == License("cc0-1.0", origin="front matter")


@pytest.mark.parametrize(
    ("base", "lora", "words"),
    [
        ("apache-2.0", "openrail++", ["carol/base is under apache-2.0", "dave/lora under openrail++"]),
        ("apache-2.0", None, ["carol/base: apache-2.0", "dave/lora states no licence"]),
        (None, "mit", ["carol/base states no licence", "dave/lora: mit"]),
    ],
)
def test_a_licence_that_is_not_settled_is_not_published_for_everybody(
    build: Build, hub: LoopbackHub, base: str | None, lora: str | None, words: list[str]
) -> None:
    project = build(base, lora)
    with pytest.raises(PublishRefused) as caught:
        publish(project.params())
    for word in (*words, "publish.license"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert REPO not in hub.registry.repos
    publish(project.params("publish.private=true"))
    card = hub.read(REPO, "README.md").decode()
    assert "license: other\n" in card
    assert "**Warning:** the licence of this merge is not settled" in card


def test_a_licence_that_is_stated_by_hand_is_published(build: Build, hub: LoopbackHub) -> None:
    project = build("apache-2.0", None)
    publish(project.params("publish.license=apache-2.0"))
    assert not hub.registry.repos[REPO].private
    assert "license: apache-2.0\n" in hub.read(REPO, "README.md").decode()


# ---------------------------------------------------------------- what is published


def test_everything_is_published_once_and_again_is_nothing_new(build: Build, hub: LoopbackHub, key: Path) -> None:
    project = build()
    params = project.params(f"publish.signing.key={key}", "export.formats=[single_file]")
    export_formats(params)
    publish(params)
    manifest, _ = read_manifest(at.manifest)
    beside = {"README.md", LIST, SIGNATURE, PROVENANCE, BOM, "images/blocks.png", "diffusion_models/pocket.safetensors"}
    beside |= {f"images/{case}{kind}.png" for case in ("rabbit", "hat") for kind in ("", ".input")}
    head = hub.registry.repos[REPO].head
    assert head.tree.keys() == {*manifest.files, *beside, ".gitattributes"}
    publish(params)
    assert hub.registry.repos[REPO].head.oid == head.oid
    assert not [path for path in Path("artifacts").iterdir() if path.name.startswith(".release")]


def test_no_path_of_this_machine_is_published(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    base, lora = tiny_base(tmp_path / "secret/base", "mit"), tiny_lora(tmp_path / "secret/lora", "mit")
    overrides = [f"base.path={base}", f"loras.lightning.path={lora}", f"loras.lightning.filename={LORA_FILE}"]
    project = Project(tmp_path / "project", monkeypatch, overrides)
    project.build()
    publish(project.params())
    for name in hub.registry.repos[REPO].head.tree:
        assert b"secret" not in hub.read(REPO, name), name


def test_pictures_that_were_changed_or_are_of_another_merge_are_refused(build: Build, hub: LoopbackHub) -> None:
    project = build()
    picture = at.images / "rabbit.merged.png"
    content = picture.read_bytes()
    Image.new("RGB", (48, 32)).save(picture)
    with pytest.raises(PublishRefused, match=r"rabbit\.merged\.png is not the picture that was judged"):
        publish(project.params())
    picture.write_bytes(content)
    text = at.candidates.read_text()
    at.candidates.write_text(text.replace(json.loads(text)["manifest_sha256"], "5" * 64))
    with pytest.raises(PublishRefused, match="of another merge"):
        publish(project.params())
    assert REPO not in hub.registry.repos


def test_exports_of_another_merge_or_that_were_changed_are_refused(build: Build, hub: LoopbackHub) -> None:
    project = build()
    params = project.params("export.formats=[single_file]")
    export_formats(params)
    exported = at.exported / "diffusion_models/pocket.safetensors"
    flip(exported)
    with pytest.raises(PublishRefused, match=r"pocket\.safetensors is not what the manifest says"):
        publish(params)
    text = at.exports.read_text()
    at.exports.write_text(text.replace(json.loads(text)["manifest_sha256"], "5" * 64))
    with pytest.raises(PublishRefused, match=r"export\.json is of another merge"):
        publish(params)
    assert REPO not in hub.registry.repos


# ---------------------------------------------------------------- the card is true


def bash(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    python = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment = {**os.environ, **paths, **python}
    return subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def block(card: str, after: str, language: str = "bash") -> str:
    return card.partition(after)[2].partition(f"```{language}\n")[2].partition("```")[0]


def test_the_card_s_commands_check_the_download_and_build_the_same_bytes(
    build: Build, hub: LoopbackHub, tmp_path: Path
) -> None:
    publish(build().params())
    card = hub.read(REPO, "README.md").decode()
    checked = bash(block(card, "## Check it"), tmp_path)
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "download: passed"), checked.stderr
    rebuilt = bash(block(card, "## Build it again"), tmp_path)
    assert rebuilt.returncode == 0, rebuilt.stderr
    promised = card.partition("come to these sha256:")[2].partition("```\n")[2].partition("```")[0]
    assert len(promised.splitlines()) == 2
    summed = bash(f"cd OUT && sha256sum --check <<'END'\n{promised}END\n", tmp_path)
    assert summed.returncode == 0, summed.stdout


def test_the_card_s_snippet_runs_as_it_stands(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against pocket, from the Hub; without torchvision the line that the README names goes before it."""
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", monkeypatch, [])
    project.build()
    publish(project.params())
    card = hub.read(REPO, "README.md").decode()
    script = block(card, "\n# merged", "python")
    (tmp_path / "snippet.py").write_text(
        "from lora_fuse.pictures.render import allow_missing_torchvision\nallow_missing_torchvision()\n" + script
    )
    done = bash("python snippet.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    made = np.asarray(Image.open(tmp_path / "output.png").convert("RGB"), dtype=float)
    assert made.shape == (128, 128, 3)
    rabbit = made[40:110, 48:80].mean((0, 1))
    assert rabbit[2] > rabbit[1] + 20  # the rabbit of the case is purple: more blue than green
    assert made.std() > 30


# ---------------------------------------------------------------- statements


def test_the_statement_is_in_toto_s_and_names_every_file_and_source(build: Build, hub: LoopbackHub) -> None:
    project = build()
    publish(project.params())
    text = hub.read(REPO, PROVENANCE).decode()
    message = json_format.Parse(text, statement_pb2.Statement())  # of an unknown field an error
    Statement.copy_from_pb(message).validate()
    assert message.predicate_type == "https://slsa.dev/provenance/v1"
    found = json_format.ParseDict(json.loads(text)["predicate"], provenance_pb2.Provenance())
    manifest, _ = read_manifest(at.manifest)
    assert {one.name: one.digest["sha256"] for one in message.subject} == {
        name: file.sha256 for name, file in manifest.files.items()
    }
    base, (lora,) = manifest.base, manifest.loras
    assert base is not None
    dependencies = {one.uri: dict(one.digest) for one in found.build_definition.resolved_dependencies}
    assert dependencies == {
        purl("carol/base", base.revision): {"gitCommit": base.revision},
        **{purl("carol/base", base.revision, name): {"sha256": file.sha256} for name, file in base.files.items()},
        purl("dave/lora", lora.revision): {"gitCommit": lora.revision},
        purl("dave/lora", lora.revision, LORA_FILE): {"sha256": lora.sha256},
    }
    parameters = json_format.MessageToDict(found.build_definition.external_parameters)
    assert parameters["fuse"]["scale"] == 1.0
    assert parameters["base"]["repo_id"] == "carol/base"
    assert manifest.tool.git
    assert found.run_details.builder.id.endswith(f"@{manifest.tool.git}")


def test_statement_and_bill_of_materials_are_the_same_each_time(build: Build, hub: LoopbackHub) -> None:
    project = build()
    names = (PROVENANCE, BOM, LIST, "README.md", "images/blocks.png")
    publish(project.params())
    first = [hub.read(REPO, name) for name in names]
    shutil.rmtree(at.release)
    hub.registry.repos.clear()
    publish(project.params())
    assert [hub.read(REPO, name) for name in names] == first


@pytest.mark.parametrize("licences", [("apache-2.0", "mit"), ("openrail++", None)], ids=str)
def test_the_bill_of_materials_is_valid_and_has_base_and_lora_as_ancestors(
    build: Build, hub: LoopbackHub, licences: tuple[str, str | None]
) -> None:
    project = build(*licences)
    publish(project.params("publish.private=true"))
    text = hub.read(REPO, BOM).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    content = json.loads(text)
    model = content["metadata"]["component"]
    manifest, manifest_sha256 = read_manifest(at.manifest)
    assert model["type"] == "machine-learning-model"
    assert model["version"] == manifest_sha256[:12]
    assert {one["name"]: one["hashes"][0]["content"] for one in model["components"]} == {
        name: file.sha256 for name, file in manifest.files.items()
    }
    base, lora = sorted(model["pedigree"]["ancestors"], key=lambda one: str(one["bom-ref"]))
    assert (base["name"], lora["name"]) == ("carol/base", f"dave/lora/{LORA_FILE}")
    assert lora["hashes"] == [{"alg": "SHA-256", "content": manifest.loras[0].sha256}]
    assert base["version"] == (manifest.base and manifest.base.revision)
    assert ("licenses" in lora) == (licences[1] is not None)
    card = model["modelCard"]
    assert card["modelParameters"]["task"] == "image-to-image"
    assert {"type": "over_floor", "value": "0.75", "slice": "rabbit"} in card["quantitativeAnalysis"][
        "performanceMetrics"
    ]
    assert "timestamp" not in content["metadata"]


def test_a_broken_bill_of_materials_would_be_seen(build: Build, hub: LoopbackHub) -> None:
    """The validator itself."""
    publish(build().params())
    content = json.loads(hub.read(REPO, BOM))
    content["metadata"]["component"]["modelCard"]["modelParameters"]["colour"] = "blue"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content)) is not None


def test_local_sources_are_dependencies_without_an_address(build: Build) -> None:
    build()
    manifest, _ = read_manifest(at.manifest)
    assert manifest.base is not None
    local = replace(
        manifest,
        base=replace(manifest.base, repo_id=None, path="somewhere", revision=None),
        loras=tuple(replace(lora, repo_id=None, path="else", revision=None) for lora in manifest.loras),
    )
    text = provenance_json(local, {}, parameters={}, repository=None)
    found = json.loads(text)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {one["name"].split("/")[0] for one in found} == {"base", "lora"}
    assert all(one.keys() == {"name", "digest"} for one in found)
    assert "somewhere" not in text


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ("https://me:s3cret@example.org/owner/name.git", "https://example.org/owner/name"),
        ("git@example.org:owner/name.git", "https://example.org/owner/name"),
        ("ssh://git@example.org/owner/name", "ssh://example.org/owner/name"),
        ("/home/me/name", None),
        ("file:///home/me/name", None),
        (None, None),
    ],
)
def test_the_builder_s_repository_has_no_password_in_it(
    monkeypatch: pytest.MonkeyPatch, remote: str | None, said: str | None
) -> None:
    monkeypatch.setattr(provenance, "_git", lambda *_: remote)
    assert provenance.this_repository() == said


def test_the_plot_of_the_blocks_is_small_and_the_same_each_time() -> None:
    blocks = [(str(number), number / 60) for number in range(60)]
    picture = block_plot(blocks)
    assert picture == block_plot(blocks)
    assert len(picture) < 10_000
    assert picture != block_plot([*blocks[:-1], ("59", 0.5)])
    assert block_plot([("0", 0.0)])
