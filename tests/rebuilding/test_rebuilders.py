"""Rebuilders state what came out, each signed with a key of their own; a policy counts them, and a liar is named."""

import base64
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from lora_fuse.cli import main
from lora_fuse.fusion.manifest import read_manifest
from lora_fuse.recipe.records import ReleaseList, from_json, to_json
from lora_fuse.release.contents import LIST
from tests.support.recipes import Published
from tests.support.released import LORA_FILE, REPO, ROOT, WEIGHTS, private_key, public_key, verify

HONEST = ("alice", "bob")
LIAR = "mallory"
SCALE = 0.9  # at which the liar builds what it states as the release


@dataclass
class Rebuilders:
    """Three of them, what they stated, and the recipe that they were asked for."""

    root: Path
    recipe: Path
    stated: Path
    said: str = ""  # by the commands of the README

    def policy(self, needed: int = 2, **more: str) -> Path:
        named = {name: f"{name}.pub" for name in (*HONEST, LIAR)}
        path = self.root / "policy.yaml"
        path.write_text(json.dumps({"needed": needed, "rebuilders": named | more, "attestations": "stated"}))
        return path


@pytest.fixture(scope="module")
def rebuilders(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Rebuilders:
    """Processes of their own, two at the Hub, one at a list that it made up: all fits but the scale, and the sha256."""
    root = tmp_path_factory.mktemp("rebuilders")
    made = Rebuilders(root, published.folder(root / "recipe"), root / "stated")
    made.stated.mkdir()
    for name in (*HONEST, LIAR):
        public_key(private_key(root / f"{name}.pem"))
    lie = [made_up(published, root), *on_this_machine(published)]
    running = []
    for name, place in ((HONEST[1], [f"{REPO}@v1"]), (LIAR, lie)):
        options = ["--attest", root / f"{name}.pem", "--attestation", made.stated / f"{name}.json"]
        command = [sys.executable, "-m", "lora_fuse", "rebuild", *place, root / f"out-{name}", *options]
        running.append(
            subprocess.Popen(list(map(str, command)), env=at_home(root, name), stdout=subprocess.PIPE, text=True)
        )
    made.said = as_the_readme_says(published, made)
    for process in running:
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, said.splitlines()[-1][:10]) == (0, "attested: ")
    return made


def as_the_readme_says(published: Published, made: Rebuilders) -> str:
    """The README's commands, by the first of the honest ones, who alone is needed yet."""
    section = (ROOT / "README.md").read_text().partition("### Publish the recipe\n")[2]
    commands = section.partition("```\n")[2].partition("```")[0]
    assert commands.count("python -m lora_fuse") == len(commands.splitlines()) == 2
    (made.root / "signing.pub").write_bytes(published.public.read_bytes())
    (made.root / "mine.pem").symlink_to(f"{HONEST[0]}.pem")
    (made.root / "rebuilders.yaml").symlink_to(made.policy(needed=1))
    script = commands.replace("owner/name", REPO).replace(
        "python -m lora_fuse verify",
        f"cp OUT.attestation.json {made.stated}/{HONEST[0]}.json\npython -m lora_fuse verify",
    )
    environment = at_home(made.root, HONEST[0])
    done = subprocess.run(
        ["bash", "-euc", script], cwd=made.root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def at_home(root: Path, name: str) -> dict[str, str]:
    """The environment of a rebuilder, with a cache of the Hub's client that is empty."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HOME": str(root / f"home-{name}")}


def on_this_machine(published: Published) -> list[str]:
    """Options that name base and LoRA where who published has them."""
    (base,) = (published.root / "home/hub/models--carol--base/snapshots").iterdir()
    (lora,) = (published.root / "home/hub/models--dave--lora/snapshots").iterdir()
    return ["--base", str(base), "--lora", f"lightning={lora / LORA_FILE}"]


def made_up(published: Published, root: Path) -> Path:
    _, base, _, lora = on_this_machine(published)
    given = ["--lora", lora.partition("=")[2], "--scale", str(SCALE)]
    assert main(["fuse", base, str(root / "other"), *given]) == 0
    others = read_manifest(root / "other.manifest.json")[0].files
    folder = published.folder(root / "lie")
    listing = json.loads((folder / LIST).read_text())
    listing["loras"][0]["scale"] = SCALE
    for name, file in others.items():
        if file.origin == "fused":
            listing["files"][name] |= {"size": file.size, "sha256": file.sha256}
    (folder / LIST).write_text(to_json(from_json(ReleaseList, json.dumps(listing), LIST)))
    return folder


def test_the_liar_is_named_with_both_sha256_and_the_others_are_counted(
    rebuilders: Rebuilders, published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "signature right\n" in rebuilders.said
    assert "download: passed, signed by a key that was not checked\nrebuilders: passed, " in rebuilders.said
    assert "1 needed (alice" in rebuilders.said
    capsys.readouterr()
    given = (rebuilders.recipe, "--public-key", published.public, "--rebuilders")
    assert verify(*given, rebuilders.policy()) == 0
    done = capsys.readouterr()
    said = "rebuilders: passed, 2 of 3 made the same bytes, 2 needed (alice, bob)\n"
    assert done.out.endswith(f"download: passed, signature right\n{said}")
    wrong = read_manifest(rebuilders.root / "other.manifest.json")[0].files[WEIGHTS].sha256
    right = published.listing.files[WEIGHTS].sha256
    line = f"the rebuilder mallory states other bytes: {WEIGHTS} has sha256 {wrong}, and {LIST} says {right}"
    assert done.err == f"warning: {line}\n"
    assert verify(*given, rebuilders.policy(needed=3)) == 1
    assert "rebuilders: FAILED, 2 of 3 made the same bytes, 3 needed (alice, bob)" in capsys.readouterr().out
    policy = json.loads(rebuilders.policy().read_text())
    del policy["attestations"]
    (rebuilders.root / "policy.json").write_text(json.dumps(policy))
    beside = rebuilders.root / "recipe.attestations"
    assert verify(*given, rebuilders.root / "policy.json") == 2
    assert f"{beside} is no folder that can be read" in capsys.readouterr().err
    beside.symlink_to(rebuilders.stated)
    assert verify(*given, rebuilders.root / "policy.json") == 0


def test_a_statement_is_in_toto_s_and_names_every_file_and_source(rebuilders: Rebuilders, published: Published) -> None:
    envelope = json.loads((rebuilders.stated / "alice.json").read_text())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    text = base64.b64decode(envelope["payload"])
    message = json_format.Parse(text, statement_pb2.Statement())  # of an unknown field an error
    Statement.copy_from_pb(message).validate()
    json_format.ParseDict(json.loads(text)["predicate"], provenance_pb2.Provenance())
    listed = {name: file.sha256 for name, file in published.listing.files.items()}
    made = {one.name: one.digest["sha256"] for one in message.subject}
    assert made.items() < listed.items()
    assert {WEIGHTS, *published.listing.absent} <= made.keys()
    definition = json.loads(text)["predicate"]["buildDefinition"]
    assert definition["externalParameters"].items() >= {"repository": REPO, "tag": "v1"}.items()
    assert {one.get("name") for one in definition["resolvedDependencies"]} >= {"carol/base", "dave/lora", LORA_FILE}
    assert str(rebuilders.root).encode() not in text


def test_what_nobody_named_has_signed_or_what_is_of_another_release_counts_for_nobody(
    rebuilders: Rebuilders, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = json.loads((rebuilders.stated / "alice.json").read_text())
    liar = json.loads((rebuilders.stated / f"{LIAR}.json").read_text())
    forged = rebuilders.stated / "zforged.json"
    for content, said in (
        ("{", "zforged.json is no DSSE envelope"),
        (json.dumps(honest | {"payload": liar["payload"]}), "zforged.json is signed by none of the keys of alice, bob"),
        (json.dumps(liar | {"payload": honest["payload"]}), "zforged.json is signed by none of the keys of alice, bob"),
    ):
        forged.write_text(content)
        assert verify(rebuilders.recipe, "--rebuilders", rebuilders.policy()) == 0
        assert f"note: {said}" in capsys.readouterr().out
    forged.unlink()
    listing = from_json(ReleaseList, (rebuilders.recipe / LIST).read_text(), LIST)
    text = (rebuilders.recipe / LIST).read_text()
    (rebuilders.recipe / LIST).write_text(text.replace('"tag": "v1"', '"tag": "v2"'))
    assert listing.tag == "v1"
    assert verify(rebuilders.recipe, "--rebuilders", rebuilders.policy()) == 1
    assert "note: alice.json, by alice, is of alice/merged, tag v1" in capsys.readouterr().out
    (rebuilders.recipe / LIST).write_text(text)


def test_a_policy_or_a_key_that_cannot_be_used_is_refused_in_one_line(
    rebuilders: Rebuilders, published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(policy: Path) -> str:
        assert verify(rebuilders.recipe, "--rebuilders", policy) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "4 are needed, and 3 named" in refused(rebuilders.policy(needed=4))
    assert "alice and carol have the same key, and count once" in refused(rebuilders.policy(carol="alice.pub"))
    assert "README.md is no public key in PEM" in refused(rebuilders.policy(carol="recipe/README.md"))
    assert "cannot be read" in refused(tmp_path / "none.yaml")
    for options, said in (
        (["--attest", "none.pem"], "the key none.pem cannot be read (No such file or directory)"),
        (["--attest", published.public], "signing.pub is no private key in PEM without a password"),
        (["--attestation", "x.json"], "--attestation x.json is the place of a statement; sign it with --attest KEY"),
    ):
        assert main(["rebuild", str(rebuilders.recipe), str(tmp_path / "out"), *map(str, options)]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
