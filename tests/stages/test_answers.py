"""Laws of the commands that answer with pages: a request that is refused leaves none of an earlier one's."""

import runpy
import sys
from pathlib import Path

import pytest

from lora_fuse.errors import BadConfig, Busy, CheckFailed
from lora_fuse.machine import Console
from lora_fuse.studies.validation import ANSWER
from stages.catalog import PAGES
from stages.run import run
from stages.sweep import SHEET

ROOT = Path(__file__).resolve().parents[2]
LORA = "pocket/lora/pocket-lightning-4steps-v1.safetensors"


def leave(pages: tuple[Path, ...]) -> None:
    """An earlier answer, and beside it what is no page."""
    for page in pages:
        page.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix:
            page.write_text("the same pictures")
        else:
            page.mkdir()
            (page / "rabbit.png").write_bytes(b"")
    (pages[0].parent / "locks.json").write_text("{}")


def exit_code(monkeypatch: pytest.MonkeyPatch, stage: str, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", [f"stages/{stage}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"stages.{stage}", run_name="__main__")
    return end.value.code


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("pocket", "conf", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize(
    ("stage", "pages", "arguments"),
    [
        ("validate", ANSWER, ("nowhere.safetensors",)),
        ("validate", ANSWER, (LORA, "--recipe", "nothing")),
        ("validate", ANSWER, (LORA, "--name", "other")),
        ("validate", ANSWER, (LORA, "--scale", "much")),
        ("validate", ANSWER, (LORA, "--set", "fuse.scal=1")),
        ("sweep", SHEET, ("fuse.scale=0.8",)),
        ("sweep", SHEET, ("fuse.scale=0.8,much",)),
        ("sweep", SHEET, ("recipe=nothing", "fuse.scale=0.8,1.0")),
        ("catalog", PAGES, ()),  # nothing is compiled
        ("catalog", PAGES, ("--variant", "nobody")),
    ],
)
def test_a_refused_request_leaves_no_page_of_an_earlier_answer(
    project: Path, monkeypatch: pytest.MonkeyPatch, stage: str, pages: tuple[Path, ...], arguments: tuple[str, ...]
) -> None:
    leave(pages)
    assert exit_code(monkeypatch, stage, *arguments) == 2
    assert [page for page in pages if page.exists()] == []
    assert (pages[0].parent / "locks.json").exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_who_asks_for_help_asks_for_no_other_answer(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(ANSWER)
    assert exit_code(monkeypatch, "validate", "--help") == 0
    assert all(page.exists() for page in ANSWER)


@pytest.mark.parametrize(
    ("error", "kept"), [(BadConfig("x"), False), (CheckFailed("x"), False), (OSError("x"), False), (Busy("x"), True)]
)
def test_only_a_run_that_another_one_keeps_out_leaves_the_pages_to_it(
    project: Path, error: Exception, kept: bool
) -> None:
    def fail() -> int:
        raise error

    leave(ANSWER)
    try:
        run("validate", Console(quiet=True), fail, pages=ANSWER)
    except OSError:
        assert isinstance(error, OSError)
    assert [page.exists() for page in ANSWER] == [kept] * len(ANSWER)
