"""Laws of the catalog's pages: what is in them is shown as text, and nothing is asked of a network."""

import json
import re
from dataclasses import replace
from pathlib import Path

from lora_fuse.pictures.encode import Encoded
from lora_fuse.studies.catalog import CatalogEntry, catalog_html, catalog_json, catalog_markdown
from lora_fuse.studies.catalog.entry import CasePicture, Publication, Size, Step
from lora_fuse.studies.catalog.page import summary

HOSTILE = '<script>alert("1")</script>|`&'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUBLISHED = Publication("team/soft", COMMIT, "v1", "https://hub.example/team/soft", ())
ENTRY = CatalogEntry(
    name="soft",
    recipe="edit",
    state="built",
    notes=(),
    command=None,
    pipeline="QwenImageEditPipeline",
    base=Step("base", "owner/base", "main", COMMIT),
    loras=(Step("lightning", "owner/lora", None, COMMIT, "l.safetensors", "a" * 64, 0.8),),
    repo_id="team/soft",
    tag="v1",
    weights=True,
    targets=840,
    size=Size(57_700_000_000, 16_800_000_000, 16_000_000_000),
    verdict="drift",
    passed=True,
    environment="cuda-sm90",
    judged="2026-11-26T14:00Z",
    manifest_sha256="b" * 64,
    pictures=(
        CasePicture(
            "rabbit", "make it purple", "drift", Path("artifacts/x/rabbit.png"), Encoded(b"RIFF", "image/webp")
        ),
    ),
    publication=PUBLISHED,
)
UNBUILT = CatalogEntry(
    "new", "edit", "not built", (), "dvc repro it", "P", Step("base", "owner/base", "main"), ENTRY.loras, None, None
)


def test_the_page_shows_lineage_verdict_size_and_place_and_needs_nothing_else() -> None:
    page = catalog_html([ENTRY, UNBUILT])
    words = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    for shown in (
        "2 variants: 1 built, 1 not built; 1 passed as built, 1 published.",
        f"owner/base commit {COMMIT}",
        "owner/lora l.safetensors",
        "\u00d7 0.8",
        "57.7GB, 840 weights changed",
        "16.8GB of it are the base's, 16.0GB hard-linked to it on this disk".replace("'", "&#39;"),
        "drift, judged 2026-11-26 14:00 UTC",
        "rabbit · drift make it purple",
        "tag v1",
        "not to be published",
        "next: dvc repro it",
    ):
        assert shown in words
    links = re.findall(r'(?:src|href)="([^"#]+)', page)
    assert links == ["https://hub.example/team/soft", "data:image/webp;base64,UklGRg=="]
    assert "default-src 'none'" in page
    assert "<script" not in page


def test_what_others_wrote_is_text_and_an_address_that_is_a_script_no_link() -> None:
    there = Publication(HOSTILE, HOSTILE, HOSTILE, "javascript:alert(1)", (HOSTILE,))
    base, lora = Step("base", HOSTILE, HOSTILE, HOSTILE), Step(HOSTILE, HOSTILE, None, HOSTILE, HOSTILE, HOSTILE, 1.0)
    picture = CasePicture(HOSTILE, HOSTILE, HOSTILE, Path("x.png"), None)
    entry = replace(ENTRY, recipe=HOSTILE, notes=(HOSTILE,), base=base, loras=(lora,), command=HOSTILE)
    page = catalog_html([replace(entry, pictures=(picture,), environment=HOSTILE, publication=there)])
    assert "<script" not in page
    assert "javascript:" not in page
    assert "no picture" in page


def test_markdown_has_a_row_and_a_section_for_each_and_links_pictures_from_where_it_lies() -> None:
    text = catalog_markdown([ENTRY, UNBUILT], Path("artifacts/catalog"))
    assert "| soft | built | drift | lightning at 0.8 | 57.7GB | team/soft, v1 |" in text
    assert f"- base `owner/base@{COMMIT}`" in text
    assert "![soft, rabbit](../x/rabbit.png)" in text
    assert "- next: `dvc repro it`" in text
    older = replace(ENTRY, publication=replace(PUBLISHED, notes=("older",)))
    assert "team/soft, v1 (older)" in catalog_markdown([older], Path())


def test_json_has_everything_but_the_thumbnails() -> None:
    content = json.loads(catalog_json([ENTRY]))["variants"][0]
    assert content["loras"][0]["sha256"] == "a" * 64
    assert content["pictures"] == [
        {"case": "rabbit", "prompt": "make it purple", "verdict": "drift", "path": "artifacts/x/rabbit.png"}
    ]


def test_a_catalog_of_nothing_is_a_page() -> None:
    assert summary([]) == "0 variants: none; 0 passed as built, 0 published."
    assert "0 variants" in catalog_html([])
