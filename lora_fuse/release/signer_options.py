"""The options of a command line that say who has to have signed a repository, and which release it has to be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.errors import BadConfig

if TYPE_CHECKING:  # it is a model of pydantic's module, and a plain fuse has none
    from lora_fuse.release.signing import Trusted

RELEASE = ("repository", "tag")


def add_signer(command: argparse.ArgumentParser) -> None:
    """Add them to a command."""
    command.add_argument("--public-key", type=Path, metavar="FILE", help="the repository has to be signed by its owner")
    command.add_argument("--identity", metavar="WHO", help="the repository has to be signed, keyless, by this identity")
    command.add_argument("--issuer", metavar="URL", help="the OpenID issuer that vouches for --identity")
    command.add_argument("--repository", metavar="OWNER/NAME", help="the release has to be one of this repository")
    command.add_argument("--tag", metavar="TAG", help="the release has to be this one")


def trusted_of(options: argparse.Namespace) -> Trusted | None:
    """The signer that the options name; None without one.

    Raises:
        BadConfig: they do not go together.
    """
    if (options.identity is None) != (options.issuer is None) or (options.identity and options.public_key):
        raise BadConfig("who has to have signed: give --public-key alone, or --identity and --issuer")
    if options.public_key is None and options.identity is None:
        return None
    from lora_fuse.release.signing import Trusted

    return Trusted(options.public_key, options.identity, options.issuer)


def release_of(options: argparse.Namespace) -> dict[str, str]:
    """The repository and the tag that the options name, as far as they do."""
    return {name: value for name in RELEASE if (value := getattr(options, name)) is not None}
