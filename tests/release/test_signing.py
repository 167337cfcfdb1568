"""Signing: by a key that can, kept while it is right, and the key is never shown."""

import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from lora_fuse.errors import BadConfig, BadKey, MissingExtra
from lora_fuse.recipe.sections import Signer
from lora_fuse.release.signing import keep_or_sign, sign
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.released import REPO, Build, Project, private_key, public_key


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
