"""Licences: pinned at their commit, and settled before everybody gets the merge."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from lora_fuse.errors import PublishRefused
from lora_fuse.hub import lock_base, lock_lora
from lora_fuse.recipe.records import License, Manifest
from lora_fuse.recipe.stated_licence import read_license
from lora_fuse.release.licences import SETTING, resolve_licence
from stages.publish import publish
from tests.hub_server import LoopbackHub
from tests.support.cards import APACHE, BASE, LORA, MANIFEST, MIT, card, front_matter
from tests.support.released import LORA_FILE, REPO, Build, on_the_hub, tiny_base
from tests.support.tiny import in_folder, on_hub


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


def merge_of(*stated: License | None) -> Manifest:
    base, *loras = stated
    parts = tuple(replace(LORA, license=one, repo_id=f"other/lora{n}") for n, one in enumerate(loras))
    return replace(MANIFEST, base=replace(BASE, license=base), loras=parts)


OPENRAIL = License("openrail++")
FLUX = License("other", "flux-1-dev", "https://example.org/LICENSE")
QWEN = License("other", "qwen-research", "https://huggingface.co/Qwen/Qwen-Image-2.1/blob/main/LICENSE")


@pytest.mark.parametrize(
    ("parts", "settled"),
    [
        ((APACHE, APACHE), "apache-2.0"),
        ((MIT, APACHE), "apache-2.0"),
        ((License("cc0-1.0"), MIT), "mit"),
        ((MIT, License("bsd-3-clause"), License("cc0-1.0")), "bsd-3-clause"),
        ((OPENRAIL, OPENRAIL), "openrail++"),
        ((License("gpl-3.0"), License("gpl-3.0")), "gpl-3.0"),
        ((FLUX, FLUX), "other"),
    ],
    ids=str,
)
def test_licences_that_go_together(parts: tuple[License, ...], settled: str) -> None:
    found = resolve_licence(merge_of(*parts))
    assert (found.license.id, found.problem) == (settled, None)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((APACHE, OPENRAIL), ["owner/base is under apache-2.0", "other/lora0 under openrail++"]),
        ((OPENRAIL, License("creativeml-openrail-m")), ["openrail++", "creativeml-openrail-m"]),
        ((License("gpl-3.0"), APACHE), ["gpl-3.0", "apache-2.0"]),
        ((APACHE, FLUX), ["apache-2.0", "flux-1-dev"]),
        ((FLUX, replace(FLUX, link="https://example.org/other")), ["flux-1-dev", "other/lora0"]),
        ((License("cc-by-nd-4.0"), License("cc-by-nd-4.0")), ["forbids derivatives"]),
        ((QWEN, QWEN), ["owner/base is under qwen-research", "forbids commercial use", "other/lora0: qwen-research"]),
        ((APACHE, replace(FLUX, name="flux-1-dev-non-commercial-license")), ["other/lora0", "forbids commercial use"]),
        ((License("cc-by-nc-4.0"), License("cc-by-nc-4.0")), ["cc-by-nc-4.0, which forbids commercial use"]),
        ((APACHE, None), ["other/lora0 states no licence", "owner/base: apache-2.0"]),
        ((None, APACHE), ["owner/base states no licence", "other/lora0: apache-2.0"]),
        ((APACHE, License("unknown")), ["unknown", "names no text"]),
        ((License("other"), License("other")), ["names no text"]),
        ((APACHE, License("other", "apache-2.0, mit")), ["apache-2.0, mit", "names no text"]),
    ],
    ids=str,
)
def test_licences_that_do_not_are_named_with_the_setting_that_states_one(
    parts: tuple[License | None, ...], words: list[str]
) -> None:
    found = resolve_licence(merge_of(*parts))
    assert found.license.id == "other"
    for word in (*words, SETTING):
        assert word in str(found.problem)
    assert "\n" not in str(found.problem)
    by_hand = resolve_licence(merge_of(*parts), "mit")
    assert (by_hand.license, by_hand.problem) == (License("mit", origin="by hand"), None)


def test_a_licence_of_the_parts_that_is_stated_by_hand_keeps_its_name_and_link() -> None:
    found = resolve_licence(merge_of(QWEN, QWEN), "other")
    assert (found.license, found.problem) == (replace(QWEN, origin="by hand"), None)


def test_a_card_of_an_unsettled_licence_says_other_and_warns() -> None:
    text = card(merge_of(APACHE, OPENRAIL))
    assert (front_matter(text)["license"], front_matter(text)["license_name"]) == ("other", "unknown")
    assert "**Warning:** the licence of this merge is not settled" in text
    assert "| openrail++ |" in text
    stated = card(merge_of(APACHE, OPENRAIL), licence="openrail")
    assert front_matter(stated)["license"] == "openrail"
    assert "stated by hand" in stated
    assert "Warning" not in stated


def test_the_name_and_link_of_another_licence_are_in_the_front_matter() -> None:
    data = front_matter(card(merge_of(FLUX, FLUX)))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", FLUX.name, FLUX.link)


PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"README.md": "# no front matter\nlicense: mit\n"}, None),
        ({"README.md": "---\nlicense: MIT\n---\n# x\n"}, License("mit", origin="front matter")),
        ({"README.md": "---\nlicense: [apache-2.0]\n---\n"}, License("apache-2.0", origin="front matter")),
        (
            {"README.md": "---\nlicense: [apache-2.0, mit]\n---\n"},
            License("other", "apache-2.0, mit", None, "front matter"),
        ),
        (
            {"README.md": "---\nlicense: [\n---\n", "LICENSE": "CC0 1.0 Universal\n"},
            License("cc0-1.0", origin="licence file"),
        ),
        ({"LICENSE.txt": (PROJECT / "LICENSE").read_text()}, License("apache-2.0", origin="licence file")),
        ({"LICENSE": "Do what you like on Mondays."}, License("other", "LICENSE", None, "licence file")),
    ],
    ids=["nothing", "text", "front matter", "list of one", "list of two", "broken", "apache", "own"],
)
def test_a_local_folder_states_its_licence(tmp_path: Path, files: dict[str, str], expected: License | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_license(tmp_path) == expected


def test_pocket_states_its_licence() -> None:
    assert [read_license(PROJECT / f"pocket/{part}") for part in ("model", "lora")] == [
        License("apache-2.0", origin="front matter")
    ] * 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "---\nlicense: &a [mit]\nx: *a\n---\n"),  # an alias, of which nine lines can be a bomb
        ("README.md", "---\nlicense: " + "[" * 100_000 + "\n---\n"),
        ("README.md", "---\nlicense: 2026-99-99\n---\n"),
        ("LICENSE", "Permission is hereby granted, free of charge " * 2500 + "without restriction " * 6000),
    ],
)
def test_a_hostile_file_states_nothing_known_and_takes_no_time(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    started = time.monotonic()
    stated = read_license(tmp_path)
    assert stated == (None if name == "README.md" else License("other", name, None, "licence file"))
    assert time.monotonic() - started < 2
