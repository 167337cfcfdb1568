"""docs/models.md is what merges of tiny models of every family give."""

from pathlib import Path

from tests.support.model_table import PAGE, page


def test_the_page_of_models_is_current(tmp_path: Path) -> None:
    assert PAGE.read_text() == page(tmp_path), "python -m tests.support.model_table"
