"""A signed statement of somebody who made a checkpoint again: these files came out, from these sources.

Formats: an in-toto statement with an SLSA provenance of the rebuilder, as `lora_fuse.release` writes the publisher's,
in a DSSE envelope (github.com/secure-systems-lab/dsse). Signed and checked by securesystemslib, with a key that is a
file: ECDSA, Ed25519 or RSA, PEM without a password; nothing leaves the machine.

Invariant: no clock time, no host and no path in it, and nothing of a key but its public half's hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import BadKey, BadSource, Refused, naming_extras
from lora_fuse.machine import files, text
from lora_fuse.recipe import checkout
from lora_fuse.release import contents, slsa

if TYPE_CHECKING:
    from lora_fuse.rebuilding.published_recipe import PublishedRecipe

BUILD_TYPE = "urn:lora-fuse:rebuild:1"  # externalParameters: repository, tag, and the sha256 of the list that was read
PAYLOAD = "application/vnd.in-toto+json"  # in-toto's, github.com/in-toto/attestation, spec/v1/envelope.md
LARGEST = 16 << 20  # bytes of an envelope


@dataclass(frozen=True, slots=True)
class Attestation:
    """The words of a statement: of which release it is, and the sha256 of every file by POSIX path."""

    repository: str | None
    tag: str | None
    files: Mapping[str, str]


class StatementSigner:
    """A private key, which is read before the work that it signs."""

    def __init__(self, key: Path) -> None:
        """Read it.

        Raises:
            BadKey: the key cannot be used.
            MissingExtra: the library is not installed.
        """
        with naming_extras("an attestation"):
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
            from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
        try:
            self._signer = CryptoSigner(load_pem_private_key(files.read_bytes(key), None))
        except OSError as error:
            raise BadKey(f"the key {key} cannot be read ({error.strerror}); name the file of one") from error
        except Exception:  # noqa: BLE001 - what is no key may raise anything in the libraries
            # Their own message is not passed on: it could have parts of the key in it.
            raise BadKey(f"{key} is no private key in PEM without a password; name the file of one") from None

    def attest(self, recipe: PublishedRecipe) -> bytes:
        """The envelope of a statement that all files of a recipe were made again."""
        from securesystemslib.dsse import Envelope

        envelope = Envelope(_statement(recipe, self._signer.public_key.keyid).encode(), PAYLOAD, {})
        envelope.sign(self._signer)
        return (json.dumps(envelope.to_dict(), indent=2) + "\n").encode()


def write_attestation(path: Path, content: bytes) -> None:
    """Write an envelope, whole or not at all.

    Raises:
        Refused: it cannot be written, though what it says is true.
    """
    try:
        files.replace_bytes(path, content)
    except OSError as error:
        raise Refused(
            f"the attestation {path} cannot be written ({error.strerror}), and the rebuild is whole; name another "
            "place, --attestation FILE, and rebuild again"
        ) from error


def public_key(path: Path) -> Any:
    """A public key as the library has it.

    Raises:
        BadKey: it cannot be used.
        MissingExtra: the library is not installed.
    """
    with naming_extras("an attestation"):
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
        from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]
    try:
        return SSlibKey.from_crypto(load_pem_public_key(files.read_bytes(path)))
    except Exception as error:  # what is no key may raise anything in the libraries
        raise BadKey(f"{path} is no public key in PEM that can be used; name the file of one") from error


def signers_of(path: Path, keys: Mapping[str, Any]) -> tuple[list[str], Attestation]:
    """The names of the keys that signed an envelope, and what it says.

    Raises:
        BadSource: the file is no such envelope, or none of the keys signed it.
    """
    from securesystemslib.dsse import Envelope

    try:
        content = files.parse_json(files.read_bytes(path, LARGEST))
        envelope = Envelope.from_dict(content)
    except Exception as error:  # what is no envelope may raise anything in the library
        raise BadSource(f"{path.name} is no DSSE envelope: {text.one_line(error)}") from error
    names = [name for name, key in keys.items() if _is_signed(envelope, key)]
    if not names:
        raise BadSource(f"{path.name} is signed by none of the keys of {', '.join(keys)}")
    if envelope.payload_type != PAYLOAD:
        raise BadSource(f"{path.name} holds {envelope.payload_type!r}, and no in-toto statement")
    return names, _read(path.name, envelope.payload)


def _is_signed(envelope: Any, key: Any) -> bool:
    try:
        envelope.verify([key], 1)
    except Exception:  # noqa: BLE001 - what is no signature may raise anything in the libraries
        return False
    return True


def _statement(recipe: PublishedRecipe, keyid: str) -> str:
    listing = recipe.listing
    tool = checkout.this_tool()
    sums = {name: file.sha256 for name, file in recipe.merge.items()}
    listed = hashlib.sha256(recipe.beside[contents.LIST]).hexdigest()
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"repository": listing.repository, "tag": listing.tag, contents.LIST: listed},
        "internalParameters": {"version": tool.version, "modified": bool(tool.dirty)},
        "resolvedDependencies": slsa.dependencies(listing),
    }
    builder = {"id": f"urn:lora-fuse:rebuilder:{keyid}", "version": {"lora-fuse": tool.version}}
    return slsa.statement_json(sums, definition, builder)


def _read(name: str, payload: bytes) -> Attestation:
    """Read a statement.

    Raises:
        BadSource: it is none of a rebuild.
    """
    try:
        said = files.parse_json(payload)
        if not isinstance(said, dict):
            raise TypeError("no object")
        definition = said["predicate"]["buildDefinition"]
        if (kind := definition["buildType"]) != BUILD_TYPE:
            raise BadSource(f"{name} states a {kind!r}, and no rebuild")
        given = definition["externalParameters"]
        sums = {str(one["name"]): str(one["digest"]["sha256"]) for one in said["subject"]}
        return Attestation(given["repository"], given["tag"], sums)
    except (KeyError, TypeError, ValueError) as error:
        raise BadSource(f"{name} is no statement of a rebuild: {text.one_line(error)}") from error
