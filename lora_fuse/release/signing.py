"""`model.sig`: a folder signed and checked by OpenSSF model signing, the one importer of `model_signing`.

The format is a Sigstore bundle around an in-toto statement with the sha256 of every file
(github.com/sigstore/model-transparency). With a key: ECDSA on P-256, P-384 or P-521, nothing leaves the machine.
Keyless: an identity that Sigstore vouches for, which needs the network.

Invariant: nothing of a key but its path is ever in an output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadKey, CheckFailed, naming_extras
from lora_fuse.machine import text
from lora_fuse.recipe import sections

SIGNATURE = "model.sig"
IGNORED = (SIGNATURE, ".cache")  # itself, and what the Hub's client puts into a folder that it fills
CURVES = "P-256, P-384 or P-521"
# Errors of the library and those below it about a key or a signature that they cannot use; it has no class of its own.
UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class Trusted:
    """The signer that counts: a public key, or an identity with the OpenID issuer that vouches for it."""

    key: Path | None = None
    identity: str | None = None
    issuer: str | None = None


def sign(folder: Path, signer: sections.Signer) -> bytes:
    """Sign every file in a folder; links to files are followed.

    An ECDSA signature is another one each time. `keep_or_sign` keeps the one that is there.

    Raises:
        BadKey: the key cannot be used, or Sigstore gave no signature.
        MissingExtra: `model_signing` is not installed.
    """
    signing = _library("signing")
    target = folder / SIGNATURE
    config = signing.Config().set_hashing_config(_hashing(()))
    if signer.key is None:
        _keyless(config, folder, target)
    else:
        _with_key(config, signer.key).sign(folder, target)
    content = target.read_bytes()
    target.unlink()
    return content


def keep_or_sign(folder: Path, signer: sections.Signer, before: bytes | None) -> bytes:
    """The signature of the last time if it is one of these very files by this key, or else a new one.

    So a checkpoint that is published again changes nothing.

    Raises:
        BadKey: see `sign`.
    """
    if before is None or signer.key is None:
        return sign(folder, signer)
    signature = folder / SIGNATURE
    public = folder.with_name(f"{folder.name}.public-key.pem")
    try:
        signature.write_bytes(before)
        public.write_bytes(_public_key(signer.key))
        check(folder, Trusted(public))
    except CheckFailed:
        signature.unlink()
        return sign(folder, signer)
    finally:
        public.unlink(missing_ok=True)
        signature.unlink(missing_ok=True)
    return before


def check(folder: Path, trusted: Trusted, unsigned: Iterable[str] = ()) -> None:
    """Check that `model.sig` in a folder is a signature of every file in it but those `unsigned`.

    Raises:
        BadKey: the public key cannot be used, or Sigstore's own keys cannot be had.
        MissingExtra: `model_signing` is not installed.
        CheckFailed: `model.sig` is no signature, one by somebody else, or of other files.
    """
    _verify(folder, folder / SIGNATURE, trusted, _hashing(unsigned))


def _verify(folder: Path, signature: Path, trusted: Trusted, hashing: Any) -> None:
    config = _library("verifying").Config().set_hashing_config(hashing)
    if trusted.key is not None:
        try:
            config.use_elliptic_key_verifier(public_key=trusted.key)
        except Exception as error:  # what is no key may raise anything in the libraries
            raise BadKey(f"{trusted.key} is no public key on {CURVES} in PEM; name the file of one") from error
    else:
        try:
            config.use_sigstore_verifier(identity=trusted.identity, oidc_issuer=trusted.issuer)
        except Exception as error:  # it asks the network, by several libraries
            raise BadKey(
                f"Sigstore, which vouches for {_whom(trusted)}, cannot be asked: {_reason(error)}; give --public-key "
                "FILE, or try again with a network"
            ) from error
    try:
        config.verify(folder, signature)
    except Exception as error:  # what is no signature may raise anything in those libraries
        raise CheckFailed(
            f"{SIGNATURE} is no signature of these files by {_whom(trusted)}: {_reason(error)}"
        ) from error


def check_listed(signature: Path, digests: Mapping[str, str], trusted: Trusted) -> None:
    """Check that a signature is one of files with these sha256, by POSIX path, wherever they are: none is read.

    Raises:
        BadKey, MissingExtra: see `check`.
        CheckFailed: it is no signature, one by somebody else, or of other files.
    """
    _verify(signature.parent, signature, trusted, _Listed(digests))


class _Listed:
    """A hashing configuration that takes the sha256 of files from a list."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = digests

    def add_ignored_paths(self, **_: object) -> None:
        """Take no note of what a signer left out: the list has not got it."""

    def hash(self, folder: Path, **_: object) -> Any:
        """The list as the library's own manifest."""
        manifest = _library("manifest")
        serialization = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": True}
        )
        sums = {name: manifest.hashing.Digest("sha256", bytes.fromhex(sha)) for name, sha in self._digests.items()}
        items = [serialization.new_item(name, digest) for name, digest in sums.items()]
        return manifest.Manifest(folder.name, items, serialization)


def _reason(error: Exception) -> str:
    return text.one_line(error) or type(error).__name__


def _whom(trusted: Trusted) -> str:
    return f"the key of {trusted.key}" if trusted.key is not None else f"{trusted.identity} ({trusted.issuer})"


def _library(name: str) -> Any:
    with naming_extras("a signature"):
        import model_signing
    return getattr(model_signing, name)


def _hashing(unsigned: Iterable[str]) -> Any:
    """Configuration that hashes every file by its sha256; a folder of the Hub's cache consists of links."""
    config = _library("hashing").Config()
    return config.set_allow_symlinks(True).set_ignored_paths(paths=[*IGNORED, *unsigned])


def _with_key(config: Any, key: Path) -> Any:
    try:
        return config.use_elliptic_key_signer(private_key=key)
    except FileNotFoundError as error:
        raise BadKey(f"the signing key {key} is not there; name a file, or set publish.signing.key to null") from error
    except Exception:  # noqa: BLE001 - what is no key may raise anything in the libraries
        # The libraries' own message is not passed on: it could have parts of the key in it.
        raise BadKey(f"{key} is no private key on {CURVES} in PEM without a password; name the file of one") from None


def _keyless(config: Any, folder: Path, target: Path) -> None:
    """Sign by an identity of this machine (a CI job's), or one that a browser asks for."""
    from sigstore.errors import Error as SigstoreError
    from sigstore.oidc import IssuerError

    try:
        config.use_sigstore_signer(use_ambient_credentials=True).sign(folder, target)
    except (SigstoreError, IssuerError, OSError, ValueError, RuntimeError) as error:
        raise BadKey(f"Sigstore gave no signature: {_reason(error)}; sign with a key, publish.signing.key") from error


def _public_key(key: Path) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    _with_key(_library("signing").Config(), key)  # refuses what cannot be used
    public = load_pem_private_key(key.read_bytes(), None).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
