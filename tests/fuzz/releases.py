"""Parsers of a published repository: its list, its provenance, its signature, and the keys."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_fuse.rebuilding.attestation import StatementSigner, signers_of
from lora_fuse.rebuilding.attestation import public_key as public_key_of
from lora_fuse.rebuilding.published_recipe import read_recipe
from lora_fuse.rebuilding.rebuilders import count_rebuilders
from lora_fuse.recipe import Manifest, records, sections
from lora_fuse.recipe.records import MergedFile
from lora_fuse.release import Trusted, check_published
from lora_fuse.release.download_check import is_inside
from lora_fuse.release.signing import keep_or_sign, sign
from tests.fuzz import formats
from tests.fuzz.parsers import Parser
from tests.support.cards import MANIFEST
from tests.support.released import private_key, public_key

CARD = b"# A card\n"
PROVENANCE = {
    "predicate": {"buildDefinition": {"externalParameters": {"base": {"pipeline": "P"}, "scheduler": {"shift": 1.0}}}},
    "subject": [],
}


def listing() -> Manifest:
    contents = {"README.md": CARD, "provenance.json": json.dumps(PROVENANCE).encode()}
    sums = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    return dataclasses.replace(MANIFEST, files={name: MergedFile(*one, "generated") for name, one in sums.items()})


@cache
def signed() -> dict[str, bytes]:
    """A repository that is signed, its keys, and a certificate's place in PEM."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "release"
        folder.mkdir()
        key = private_key(Path(place) / "key.pem")
        files = {
            "README.md": CARD,
            "lora_fuse.json": records.to_json(listing()).encode(),
            "provenance.json": json.dumps(PROVENANCE).encode(),
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
        files["model.sig"] = sign(folder, sections.Signer(key))
        return {**files, "key.pem": key.read_bytes(), "key.pub": public_key(key).read_bytes()}


def downloaded(folder: Path, **odd: bytes) -> Path:
    """Write the repository, and its keys beside it."""
    (folder / "release").mkdir(exist_ok=True)
    for name, content in (signed() | odd).items():
        (folder / name if name.startswith("key") else folder / "release" / name).write_bytes(content)
    return folder / "release"


def of_file(name: str, *, trusts: bool) -> Callable[[Path, bytes], object]:
    def parse(folder: Path, content: bytes) -> None:
        release = downloaded(folder, **{name: content})
        found = check_published(release, Trusted(folder / "key.pub") if trusts else None)
        assert name == "key.pub" or content == signed()[name] or found.problems or not trusts or found.notes

    return parse


def signing(folder: Path, content: bytes) -> None:
    release = downloaded(folder, **{"key.pem": content})
    (release / "model.sig").unlink()
    sign(release, sections.Signer(folder / "key.pem"))


def kept(folder: Path, content: bytes) -> None:
    """The signature of the last time, which is kept while it is right."""
    release = downloaded(folder)
    (release / "model.sig").unlink()
    keep_or_sign(release, sections.Signer(folder / "key.pem"), content)


def rebuilt(folder: Path, content: bytes) -> None:
    """The list as a rebuild reads it, which is more careful: its names become paths."""
    recipe = read_recipe(str(downloaded(folder, **{"lora_fuse.json": content})))
    assert all(is_inside(name) for name in [*recipe.listing.files, *(recipe.listing.base or recipe.listing).files])


@cache
def attested() -> bytes:
    with TemporaryDirectory() as place:
        recipe = read_recipe(str(downloaded(Path(place))))
        return StatementSigner(Path(place) / "key.pem").attest(recipe)


def attestation(folder: Path, content: bytes) -> None:
    downloaded(folder)
    path = folder / "alice.json"
    path.write_bytes(content)
    names, stated = signers_of(path, {"alice": public_key_of(folder / "key.pub")})
    assert (names, stated.files) == (["alice"], {})


POLICY = {"needed": 1, "rebuilders": {"alice": "key.pub"}, "attestations": "stated"}


def policy(folder: Path, content: bytes) -> None:
    release = downloaded(folder)
    (folder / "stated").mkdir(exist_ok=True)
    (folder / "stated/alice.json").write_bytes(attested())
    (folder / "policy.yaml").write_bytes(content)
    found = count_rebuilders(release, folder / "policy.yaml")
    assert len(found.agree) <= 1  # by whatever name


def rows() -> Iterator[Parser]:
    def valid(name: str) -> Callable[[], list[bytes]]:
        return lambda: [signed()[name]]

    yield Parser("list of a download", of_file("lora_fuse.json", trusts=False), formats.JSON, valid("lora_fuse.json"))
    yield Parser("provenance", of_file("provenance.json", trusts=False), formats.JSON, valid("provenance.json"))
    yield Parser(
        "signature",
        of_file("model.sig", trusts=True),
        formats.JSON,
        valid("model.sig"),
    )
    yield Parser(
        "public key",
        of_file("key.pub", trusts=True),
        formats.raw,
        valid("key.pub"),
    )
    yield Parser(
        "signing key",
        signing,
        formats.raw,
        valid("key.pem"),
    )
    yield Parser("list of a rebuild", rebuilt, formats.JSON, valid("lora_fuse.json"))
    yield Parser("attestation", attestation, formats.JSON, lambda: [attested()])
    yield Parser("policy of rebuilders", policy, formats.JSON, lambda: [json.dumps(POLICY).encode()])
    yield Parser("earlier signature", kept, formats.JSON, valid("model.sig"), examples=5)
