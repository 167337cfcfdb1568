"""The command ``rebuild``: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import BadConfig
from lora_fuse.machine import text
from lora_fuse.release import add_signer, release_of, trusted_of

if TYPE_CHECKING:  # every command's options are added before one of them is run
    from lora_fuse.rebuilding.made_again import Rebuilt


def add_rebuild(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's subcommands."""
    command: argparse.ArgumentParser = commands.add_parser(
        "rebuild", help="make the weights of a published repository again, each file with the sha256 that it lists"
    )
    command.add_argument(
        "repo", metavar="REPO[@REVISION]", help="owner/name on the Hub, hf:// before it or not; or a folder"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    add_signer(command)
    command.add_argument("--base", type=Path, metavar="FOLDER", help="the base, in the place of the one on the Hub")
    command.add_argument(
        "--lora", action="append", default=[], metavar="NAME=FILE", help="a LoRA, in the place of the one on the Hub"
    )
    command.add_argument("--attest", type=Path, metavar="KEY", help="sign a statement on it with this private key")
    command.add_argument(
        "--attestation", type=Path, metavar="FILE", help="the statement's place (default: OUT.attestation.json)"
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--replace", action="store_true", help="replace OUT even if lora-fuse did not make it")
    command.add_argument("--quiet", action="store_true", help="say only what is wrong")
    command.add_argument("--json", action="store_true", help="say it as one JSON object")
    command.set_defaults(run=run_rebuild)
    return command


def run_rebuild(options: argparse.Namespace) -> int:
    """Do what the options say, and print it.

    Raises:
        Refused: see `rebuild`; or the options do not go together.
    """
    from lora_fuse.rebuilding import attestation
    from lora_fuse.rebuilding.made_again import described, rebuild

    if options.attestation is not None and options.attest is None:
        raise BadConfig(f"--attestation {options.attestation} is the place of a statement; sign it with --attest KEY")
    signer = attestation.StatementSigner(options.attest) if options.attest is not None else None
    loras: dict[str, Path] = {}
    for given in options.lora:
        name, equals, path = given.partition("=")
        if not (name and equals and path) or name in loras:
            what = "is given twice" if name in loras else "names no file"
            raise BadConfig(f"--lora {given} {what}; give each LoRA of the list once, NAME=FILE")
        loras[name] = Path(path)
    done = rebuild(
        options.repo,
        options.out,
        trusted=trusted_of(options),
        expected=release_of(options),
        base=options.base,
        loras=loras,
        device=options.device,
        replace=options.replace,
    )
    stated: Path | None = None
    if signer is not None:
        out = options.out.absolute()
        stated = options.attestation or out.with_name(f"{out.name}.attestation.json")
        attestation.write_attestation(stated, signer.attest(done.recipe))
    if options.json:
        text.say(json.dumps(_facts(done, options.out, stated)))
        return 0
    text.say(f"rebuild: {done.recipe.label}, {done.recipe.signature}")
    text.say(f"  release, by its list: {done.recipe.listing}")
    first, *rest = described(done)
    text.say(f"rebuilt: {options.out}, {first}")
    for line in rest:
        text.say(line)
    if done.fused.sharing:
        text.say(done.fused.sharing)
    if stated is not None:
        text.say(f"attested: {stated}")
    return 0


def add_rebuilders(command: argparse.ArgumentParser) -> None:
    """Add the option of `verify` that names a policy."""
    command.add_argument(
        "--rebuilders", type=Path, metavar="POLICY", help="as many as it says have to have made the same bytes"
    )


def run_rebuilders(folder: Path, policy: Path) -> int:
    """Count the rebuilders of a published repository, print it, and return the exit code.

    Raises:
        Refused: see `count_rebuilders`.
    """
    from lora_fuse.rebuilding.rebuilders import count_rebuilders

    found = count_rebuilders(folder, policy)
    for note in found.notes:
        text.say(f"  note: {note}")
    for name, difference in found.differ.items():
        text.say(f"warning: the rebuilder {name} states other bytes: {difference}", sys.stderr)
    said = f"{len(found.agree)} of {found.named} made the same bytes, {found.needed} needed"
    names = f" ({', '.join(found.agree)})" if found.agree else ""
    text.say(f"rebuilders: {'passed' if found.is_enough else 'FAILED'}, {said}{names}")
    return 0 if found.is_enough else 1


def _facts(done: Rebuilt, out: Path, stated: Path | None) -> dict[str, object]:
    return {
        "repository": done.recipe.listing.repository,
        "tag": done.recipe.listing.tag,
        "place": done.recipe.label,
        "signature": done.recipe.signature,
        "out": str(out),
        "base": done.base,
        "bytes_written": done.fused.bytes_written,
        "seconds": done.fused.seconds,
        "files": {name: file.sha256 for name, file in done.recipe.merge.items()},
        "exports": done.recipe.exports,
        "attestation": None if stated is None else str(stated),
    }
