"""Laws of variants: a real DVC run builds them, each by itself, and a real Hub gets what is new of them."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_fuse import cli
from lora_fuse.machine.console import Console
from lora_fuse.machine.parsing import parse_yaml
from lora_fuse.recipe.paths import HERE
from lora_fuse.regression.gate import MEANINGS
from stages.catalog import catalog
from stages.config import load
from stages.config.__main__ import main
from tests.hub_server import LoopbackHub
from tests.support.machine import Once
from tests.support.merges import hashes
from tests.support.workspace import Workspace, hub_environment

NAMES = ["pocket_pastel", "pocket_soft"]  # `pocket` is the default recipe, which other tests build
ENTRIES = "conf/variants.yaml"
PIPELINE = "variants/dvc.yaml"
PUBLISHED = "publish/dvc.yaml:variant"


class Checkout(Workspace):
    """A checkout in which the variants are built."""

    def result(self, variant: str, name: str) -> dict[str, Any]:
        return self.read(f"artifacts/variants/{variant}/{name}")

    def entries(self, **changes: dict[str, Any] | None) -> None:
        """Change entries, add some, or leave some out (None), and compile them; the current folder is the checkout."""
        entries = parse_yaml((self.root / ENTRIES).read_text())
        for name, change in changes.items():
            entries[name] = None if change is None else entries.get(name, {}) | change
        (self.root / ENTRIES).write_text(yaml.safe_dump({n: one for n, one in entries.items() if one is not None}))
        assert main([]) == 0


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']*)'", output)


def build(root: Path) -> None:
    """Build all variants; where nobody has approved pictures for this environment, they are approved here."""
    checkout = Checkout.checkout(root)
    entries = parse_yaml((root / ENTRIES).read_text())
    (root / ENTRIES).write_text(yaml.safe_dump({name: entries[name] for name in NAMES}))
    checkout.config()
    checkout.commit("two variants")
    done = checkout.run("dvc", "repro", "--quiet", "--keep-going", PIPELINE, code=None)
    if done.returncode:
        assert "exited with 3" in done.stderr or "exited with 4" in done.stderr, done.stdout + done.stderr
        for name in NAMES:
            checkout.stage("approve", "--variant", name, "--reason", "what this checkout makes")
        checkout.commit("goldens")
        checkout.repro("--quiet", PIPELINE)


@pytest.fixture
def checkout(once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A copy with the variants built, to be changed; the current folder."""
    copied = Checkout(once("variants", build)).copy(tmp_path / "checkout")
    monkeypatch.chdir(copied.root)
    return copied


def test_every_variant_is_built_verified_and_passed_and_each_base_locked_once(checkout: Checkout) -> None:
    for name in NAMES:
        assert checkout.result(name, "verify.json")["passed"]
        assert checkout.result(name, "regression/metrics.json")["passed"]
        assert checkout.result(name, "merged.manifest.json")["recipe"] == name
    scales = {name: checkout.result(name, "merged.manifest.json")["scale"] for name in NAMES}
    assert scales == {"pocket_pastel": 1.0, "pocket_soft": 0.8}
    loras = [lora["name"] for lora in checkout.result("pocket_pastel", "merged.manifest.json")["loras"]]
    assert loras == ["lightning", "pastel"]
    assert len(list((checkout.root / "artifacts/bases").glob("*.lock.json"))) == 1
    assert not (checkout.root / "artifacts/merged").exists()


def test_a_second_run_has_nothing_to_do_and_the_main_pipeline_has_no_variant_in_it(checkout: Checkout) -> None:
    assert ran(checkout.repro(PIPELINE)) == []
    assert "@" not in checkout.run("dvc", "dag", "--md", "gate").stdout


def test_a_build_leaves_the_checkout_as_it_was(checkout: Checkout) -> None:
    changed = checkout.run("git", "status", "--porcelain").stdout.split()
    assert changed in ([], ["M", "variants/dvc.lock"], ["??", "variants/dvc.lock"])


def test_another_scale_rebuilds_that_variant_alone(checkout: Checkout) -> None:
    checkout.entries(pocket_soft={"scale": 0.7})
    would = ran(checkout.repro("--dry", PIPELINE))
    assert would[0] == f"{PIPELINE}:fuse@pocket_soft"
    assert {one.partition("@")[2] for one in would} == {"pocket_soft"}


def test_where_it_is_published_and_who_else_is_listed_rebuild_nothing(checkout: Checkout) -> None:
    checkout.entries(pocket_pastel={"repo_id": "a/b", "tag": "v2", "private": False}, pocket_soft=None)
    assert ran(checkout.repro("--dry", PIPELINE)) == []


def test_an_approval_for_another_variant_renders_nothing_again(checkout: Checkout) -> None:
    golden = checkout.root / "artifacts/golden/another/key/case.png"
    golden.parent.mkdir(parents=True, exist_ok=True)
    golden.write_bytes(b"approved")
    assert sorted(ran(checkout.repro(PIPELINE))) == [f"{PIPELINE}:goldens@{name}" for name in NAMES]
    shutil.rmtree(checkout.root / "artifacts/golden/another")
    checkout.repro(PIPELINE)


def test_a_stage_of_a_variant_takes_its_parameters_and_names_its_commands(checkout: Checkout) -> None:
    passed = checkout.stage("gate", "--variant", "pocket_soft")
    assert passed.endswith("next: python -m stages.catalog\n")
    assert checkout.stage("publish", "--variant", "pocket_soft") == (
        "publish@pocket_soft: skipped, conf/variants.yaml gives it no repo_id\n"
    )
    assert load(["fuse.device=cpu"], "pocket_soft").fuse.scale == 0.8
    assert load(["fuse.scale=0.5"], "pocket_soft").fuse.scale == 0.5
    path = checkout.root / "artifacts/variants/pocket_soft/regression/metrics.json"
    text = path.read_bytes()
    try:
        path.unlink()
        missing = checkout.stage("gate", "--variant=pocket_soft", code=2)
        path.write_text(json.dumps(json.loads(text) | {"verdict": "no-golden", "passed": False}))
        forged = checkout.stage("gate", "--variant", "pocket_soft", code=2)
        entry = listed(checkout)["pocket_soft"]
    finally:
        path.write_bytes(text)
    assert missing.endswith("next: dvc repro variants/dvc.yaml:regress@pocket_soft\n")
    assert "verdict no-golden, and what lies here gives exact" in forged
    assert (entry["state"], entry["notes"][0] in forged) == ("stale", True)
    assert forged.endswith("next: dvc repro -f variants/dvc.yaml:regress@pocket_soft\n")


def test_pictures_are_approved_under_the_variant_s_name_of_parameters_that_conf_gives(checkout: Checkout) -> None:
    done = checkout.stage("approve", "--variant", "pocket_soft", "--reason", "softer")
    assert done.startswith("approved: artifacts/golden/pocket_soft/")
    compiled = checkout.root / "variants/params.yaml"
    edited = parse_yaml(compiled.read_text())
    edited["variants"]["pocket_soft"]["fuse"]["scale"] = 0.9
    compiled.write_text(yaml.safe_dump(edited))
    refused = checkout.stage("approve", "--variant", "pocket_soft", "--reason", "softer", code=1)
    assert "variants/params.yaml is not what variant pocket_soft composes to" in refused
    assert checkout.run(sys.executable, "-m", "stages.config", "--check", code=1).stdout.count("scale: 0.9") == 1


def test_publishing_sends_what_is_new_and_nothing_twice(checkout: Checkout, hub: LoopbackHub) -> None:
    env = hub_environment()
    listing = ("dvc", "stage", "list", "--name-only", "publish/dvc.yaml")
    assert checkout.run(*listing).stdout.split() == ["publish/dvc.yaml:publish"]
    pastel = {"repo_id": "alice/pastel", "tag": "v1", "weights": "recipe"}
    checkout.entries(pocket_pastel=pastel, pocket_soft={"repo_id": "alice/soft"}, later={"recipe": "pocket"})
    both = [f"{PUBLISHED}@{name}" for name in NAMES]  # and `later`, which goes nowhere, is not built for it
    assert checkout.run(*listing).stdout.split() == ["publish/dvc.yaml:publish", *both]
    assert "@" not in checkout.run("dvc", "dag", "--md", "publish/dvc.yaml:publish").stdout

    assert sorted(ran(checkout.repro(PUBLISHED, env=env))) == both
    repos, first = hub.registry.repos, checkout.result("pocket_pastel", "publish.json")
    assert (first["status"], first["repo_id"], first["private"]) == ("published", "alice/pastel", True)
    assert repos["alice/pastel"].tags == {"v1": first["commit"]}
    assert repos["alice/soft"].tags == {}
    assert not (checkout.root / "artifacts/variants/later").exists()
    sent, soft = hub.uploaded(), checkout.result("pocket_soft", "publish.json")
    assert ran(checkout.repro(PUBLISHED, env=env)) == []

    checkout.entries(pocket_soft={"overrides": ["export.formats=[single_file]"]})
    judged = [f"{PIPELINE}:{stage}@pocket_soft" for stage in ("export", "regress")]
    assert ran(checkout.repro(PUBLISHED, env=env)) == [*judged, f"{PUBLISHED}@pocket_soft"]
    assert hub.uploaded() > sent
    assert checkout.result("pocket_soft", "publish.json")["files"].keys() - soft["files"].keys() == {
        "diffusion_models/pocket_soft.safetensors"
    }
    assert checkout.result("pocket_pastel", "publish.json") == first

    sent = hub.uploaded()
    checkout.entries(pocket_pastel={"tag": "v2"})
    assert ran(checkout.repro(PUBLISHED, env=env)) == [f"{PUBLISHED}@pocket_pastel"]
    assert hub.uploaded() == sent  # the pictures are there; the list and the card name the tag
    second = checkout.result("pocket_pastel", "publish.json")
    assert repos["alice/pastel"].tags == {"v1": first["commit"], "v2": second["commit"]}
    changed = {name for name, file in second["files"].items() if file != first["files"][name]}
    assert changed == {"README.md", "lora_fuse.json"}
    assert sum(file["size"] for file in second["files"].values()) < 1_000_000
    locks = checkout.result("pocket_pastel", "lora.lock.json")["loras"]
    files = [f"--lora={name}={lock['path']}/{next(iter(lock['files']))}" for name, lock in locks.items()]
    assert cli.main(["rebuild", "alice/pastel@v2", "rebuilt", "--base", "pocket/model", *files]) == 0
    made = checkout.result("pocket_pastel", "merged.manifest.json")["files"]
    assert {name: file["sha256"] for name, file in made.items()}.items() < hashes(checkout.root / "rebuilt").items()

    entries = listed(checkout)
    assert entries["pocket_pastel"]["publication"] == {
        "repo_id": "alice/pastel",
        "commit": second["commit"],
        "tag": "v2",
        "url": second["url"],
        "notes": [],
    }
    checkout.entries(pocket_pastel={"tag": "v3"})
    entry = listed(checkout)["pocket_pastel"]
    assert entry["publication"]["notes"] == ["the tag asked for now is v3, it was v2"]
    assert (entry["state"], entry["command"]) == ("built", f"dvc repro {PUBLISHED}@pocket_pastel")
    checkout.entries(pocket_pastel={"repo_id": None, "tag": None})
    entry = listed(checkout)["pocket_pastel"]
    assert (entry["publication"]["notes"], entry["command"]) == (
        ["it is not to be published any more; what is there stays"],
        None,
    )
    for name in NAMES:
        (checkout.root / f"artifacts/variants/{name}/publish.json").unlink()


# The catalog


def listed(checkout: Checkout) -> dict[str, dict[str, Any]]:
    """The catalog, written anew, by variant; the current folder is the checkout."""
    assert catalog(load(), HERE, Console(quiet=True)) == 0
    return {one["name"]: one for one in checkout.read("artifacts/catalog/catalog.json")["variants"]}


def test_the_catalog_shows_what_each_variant_is_made_of_and_what_it_came_to(checkout: Checkout) -> None:
    entries = listed(checkout)
    assert sorted(entries) == NAMES
    for name in NAMES:
        entry, manifest = entries[name], checkout.result(name, "merged.manifest.json")
        metrics = checkout.result(name, "regression/metrics.json")
        assert (entry["state"], entry["notes"], entry["weights"]) == ("built", [], True)
        assert (entry["verdict"], entry["passed"]) == (metrics["verdict"], True)
        assert (entry["base"]["place"], entry["targets"]) == ("pocket/model", manifest["targets"])
        made_of = [(lora["name"], lora["file"], lora["scale"], lora["sha256"]) for lora in entry["loras"]]
        assert made_of == [
            (lora["name"], lora["filename"], lora["scale"], lora["sha256"]) for lora in manifest["loras"]
        ]
        merged = checkout.root / "artifacts/variants" / name / "merged"
        files = [path for path in merged.rglob("*") if path.is_file()]
        linked = sum(path.stat().st_size for path in files if path.stat().st_nlink > 1)
        assert (entry["size"]["total"], entry["size"]["hard_linked"]) == (sum(p.stat().st_size for p in files), linked)
        assert [one["verdict"] for one in entry["pictures"]] == [metrics["hat.verdict"], metrics["rabbit.verdict"]]
    assert entries["pocket_soft"]["recipe"] == "pocket"
    page = (checkout.root / "artifacts/catalog/catalog.html").read_text()
    assert page.count("data:image/webp;base64,") == 4
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    text = (checkout.root / "artifacts/catalog/catalog.md").read_text()
    for name, path in re.findall(r"!\[(\w+), \w+\]\((.*?)\)", text):
        assert (checkout.root / "artifacts/catalog" / path).is_file(), name
    assert set(MEANINGS) & set(re.findall(r"[\w-]+", text))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"scale": 0.7}, "LoRA lightning has scale 0.7 now, was built with 0.8"),
        ({"recipe": "pocket_pastel"}, "LoRA pastel is new"),
        (
            {"overrides": ["loras.lightning.filename=pocket-pastel.safetensors"]},
            "LoRA lightning is pocket/lora/pocket-p",
        ),
        ({"overrides": ["base.path=pocket"]}, "the base is pocket now, and pocket/model was built on"),
        ({"overrides": ["fuse.skip=['*.attn.*']"]}, "other modules are chosen or scaled now"),
        ({"overrides": ["scheduler.max_shift=2.0"]}, "the scheduler's max_shift is 2.0 now, was 1.09"),
        ({"overrides": ["base.pipeline=QwenImagePipeline"]}, "the pipeline is QwenImagePipeline now"),
    ],
)
def test_what_was_built_of_something_else_is_stale(checkout: Checkout, change: dict[str, Any], note: str) -> None:
    checkout.entries(pocket_soft=change)
    entry = listed(checkout)["pocket_soft"]
    assert (entry["state"], entry["command"]) == ("stale", f"dvc repro {PIPELINE}:gate@pocket_soft")
    assert entry["notes"][0].startswith(note)


def test_a_lora_file_that_was_changed_makes_its_variants_stale(checkout: Checkout) -> None:
    file = checkout.root / "pocket/lora/pocket-pastel.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    entries = listed(checkout)
    file.write_bytes(content)
    assert [entries[name]["state"] for name in NAMES] == ["stale", "built"]
    assert "pocket-pastel.safetensors has sha256" in entries["pocket_pastel"]["notes"][0]


def test_what_is_not_there_is_said_with_the_command_and_a_broken_result_stops_no_other_one(checkout: Checkout) -> None:
    checkout.entries(new={"recipe": "qwen_image_edit_lightning_4steps", "scale": 0.5})
    places = [
        checkout.root / "artifacts/variants" / name for name in ("pocket_pastel/verify.json", "pocket_soft/verify.json")
    ]
    texts = [place.read_bytes() for place in places]
    places[0].write_text("{")
    places[1].unlink()
    entries = listed(checkout)
    for place, text in zip(places, texts, strict=True):
        place.write_bytes(text)
    states = {name: entry["state"] for name, entry in entries.items()}
    assert states == {"new": "not built", "pocket_pastel": "unreadable", "pocket_soft": "incomplete"}
    assert entries["new"]["command"] == f"dvc repro {PIPELINE}:gate@new"
    assert (entries["new"]["base"]["asked"], entries["new"]["base"]["commit"]) == ("main", None)
    assert "verify.json is not readable JSON" in entries["pocket_pastel"]["notes"][0]
    assert entries["pocket_soft"]["notes"] == ["these weights are not verified yet"]
    page = (checkout.root / "artifacts/catalog/catalog.html").read_text()
    assert f"next: dvc repro {PIPELINE}:gate@new" in page
