"""Laws of the documentation: a file that it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
CODE = re.compile(r"`([\w./-]+)`")
PLACES = (ROOT, ROOT / "lora_fuse")  # paths in code spans are given from one of the two
FOLDERS = {path.name for place in PLACES for path in place.iterdir() if path.is_dir()} - {"artifacts", "build", ".dvc"}
MADE = (".json", ".html")  # by a run, as all that is in those three


def named(text: str) -> set[str]:
    """Paths in code spans that begin with a folder of the project, but for what a run makes, or a user names."""
    found = {span for span in CODE.findall(text) if "/" in span and span.partition("/")[0] in FOLDERS}
    return {span for span in found if not span.endswith(MADE) and "NAME" not in span}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {link for link in LINK.findall(text) if not (page.parent / link).exists()}
    paths = {name for name in named(text) if not any((place / name).exists() for place in PLACES)}
    assert links | paths == set()


def test_a_page_with_paths_that_are_gone_is_seen() -> None:
    assert named("`lora_fuse/gone.py`, `machine/gone.py`, `owner/name`") == {"lora_fuse/gone.py", "machine/gone.py"}
