"""Ten hostile strings through every writer: each line stays a line, each page keeps its shape, no secret is told."""

import ast
import dataclasses
import json
import logging
import struct
import subprocess
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from lora_fuse import cli
from lora_fuse.errors import Refused
from lora_fuse.hub import client, retry
from lora_fuse.machine import Console, interrupts, progress
from lora_fuse.recipe.records import License, to_json
from lora_fuse.regression.report import report_html
from lora_fuse.studies.catalog import catalog_html, catalog_markdown
from lora_fuse.studies.catalog.entry import CasePicture, CatalogEntry, Publication, Step
from lora_fuse.studies.sweep.recommendation import Recommendation
from lora_fuse.studies.sweep.sheet import CaseRow, Column, Sheet, sheet_html, sheet_markdown
from lora_fuse.studies.validation.file_comparison import BlockDifference, FileComparison, FileFacts
from lora_fuse.studies.validation.outcome import Answer, Cause, Judgement, Outcome
from lora_fuse.studies.validation.validation_report import ValidationReport, junit_xml, validation_html, validation_md
from tests.support.cards import BASE, EVIDENCE, LORA, MANIFEST, RABBIT, card
from tests.support.foreign import FOREIGN, TOKEN, read_xml
from tests.support.reports import MANIFEST as JUDGED
from tests.support.reports import judged, page_of, scene

ROOT = Path(__file__).resolve().parents[2]
HARMLESS = "harmless"


def test_nothing_prints_but_the_one_way_out() -> None:
    found = []
    for path in sorted([*(ROOT / "lora_fuse").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                found.append(path.relative_to(ROOT).as_posix())
    assert found == ["lora_fuse/machine/text.py"]


# ---------------------------------------------------------------- terminals


def inspected(name: str, folder: Path) -> None:
    """A LoRA whose module and header entry have the name, and one whose only key is refused."""
    spot = {"dtype": "F32", "shape": [1, 1]}
    down, up = (spot | {"data_offsets": [start, start + 4]} for start in (0, 4))
    lora = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, "__metadata__": {name: name}}
    for file, header, size in (("lora", lora, 8), ("other", {name: down}, 4)):
        content = json.dumps(header).encode()
        path = folder / f"{file}.safetensors"
        path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))
        cli.main(["inspect", str(path)])


def verified(name: str, folder: Path) -> None:
    files = {f"{name}.safetensors": next(iter(MANIFEST.files.values()))}
    (folder / "lora_fuse.json").write_text(to_json(dataclasses.replace(MANIFEST, files=files)), encoding="utf-8")
    (folder / "provenance.json").write_text(json.dumps({name: name}), encoding="utf-8")
    cli.main(["verify", str(folder)])


def refused(name: str, _: Path) -> None:
    def work() -> int:
        raise Refused(f"{name}: no such thing")

    interrupts.guarded(work)


def told(name: str, _: Path) -> None:
    console = Console()
    console.will(name, name)
    console.warn(name)
    console.wrong("verify", name)
    console.rows([name])
    console.done("verify", name, facts={}, then=name)
    Console(as_json=True).done("verify", facts={"name": name})
    Console(as_json=True).failed("verify", 2, name)


def logged(name: str, _: Path) -> None:
    progress.log(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda _: None)
        retry.DOWNLOAD.wait(1, name)


def misused(name: str, _: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", "l", name])


def warned_by_the_client(name: str, _: Path) -> None:
    client.client()
    logging.getLogger("huggingface_hub").warning(name)


TERMINAL: dict[str, Callable[[str, Path], None]] = {
    "inspect": inspected,
    "verify": verified,
    "a refusal": refused,
    "a stage": told,
    "progress and waits": logged,
    "a wrong command": misused,
    "the Hub's client": warned_by_the_client,
}


@pytest.mark.parametrize("writer", TERMINAL)
def test_a_terminal_gets_no_more_lines_than_of_a_harmless_name_and_nothing_to_obey(
    writer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(name: str, folder: str) -> str:
        (tmp_path / folder).mkdir()
        TERMINAL[writer](name, tmp_path / folder)
        both = capsys.readouterr()
        return both.out + both.err

    lines = written(HARMLESS, "harmless").count("\n")
    for number, foreign in enumerate(FOREIGN):
        output = written(foreign, str(number))
        assert output.count("\n") <= lines, repr(foreign)  # fewer where the name itself is refused
        assert "download: passed" not in output.splitlines()
        kinds = {unicodedata.category(sign) for sign in output.replace("\n", "")}
        assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"}), repr(foreign)
        assert TOKEN not in output
        assert "5ecret" not in output


# ---------------------------------------------------------------- pages and files


def validation(name: str) -> ValidationReport:
    answers = tuple(Answer(name, name, name, holds, Cause.BASE, name) for holds in (True, False))
    facts = FileFacts(name, name, (name, name))
    blocks = (BlockDifference(name, 1.0, 1.0, 1.0),)
    compared = FileComparison(1, (name,), (name,), 1.0, 1.0, 1.0, 1.0, blocks)
    judgement = Judgement(Outcome.CHANGED, None, name, answers)
    return ValidationReport(name, name, name, (1.0, 1.0), judgement, facts, facts, compared, name, name, name)


def a_card(name: str) -> str:
    licence = License("other", name, name)
    base = dataclasses.replace(BASE, repo_id=f"owner/{name}", revision=name, license=licence)
    loras = tuple(
        dataclasses.replace(LORA, name=name, repo_id=repo, filename=name, revision=name, license=licence)
        for repo in (name, None)
    )
    case = dataclasses.replace(RABBIT, name=name, prompt=name, picture=name, inputs=(name, name))
    evidence = dataclasses.replace(EVIDENCE, verdict=name, environment=name, cases=(case,))
    manifest = dataclasses.replace(
        MANIFEST, recipe=name, base=base, loras=loras, files={name: MANIFEST.files["transformer/one.safetensors"]}
    )
    return card(manifest, f"owner/{name}", evidence, negative_prompt=name).split("---\n", 2)[2]


def sweep(name: str) -> Sheet:
    columns = (Column(name, name, 1.0, "k", refused=name), Column("other", name, 2.0, "l", refused=name))
    best = Recommendation(name, 1.0, (name,))
    return Sheet(name, name, name, name, name, best, columns, (CaseRow(name, name, (), None),), {})


def entry(name: str) -> CatalogEntry:
    step = Step(name, name, name, name, name, name, 1.0)
    there = Publication(name, name, name, None, (name,))
    shown = CasePicture(name, name, name, Path("x.png"), None)
    return CatalogEntry(
        name,
        name,
        "built",
        (name,),
        name,
        name,
        step,
        (step,),
        name,
        name,
        pictures=(shown,),
        verdict="drift",
        environment=name,
        judged=name,
        publication=there,
    )


def report(name: str) -> str:
    lora = dataclasses.replace(JUDGED.loras[0], name=name, repo_id=name, filename=name, revision=name)
    page = page_of(judged(name, scene(), None, name))
    return report_html(
        dataclasses.replace(
            page,
            recipe=name,
            next_step=name,
            manifest=dataclasses.replace(JUDGED, loras=(lora,)),
            warnings=(name,),
            environment={name: name},
        )
    )


class Tags(HTMLParser):
    """Collects the tags of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def marked_up(page: str) -> str:
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page))


PAGES: dict[str, Callable[[str], str]] = {
    "card": lambda name: marked_up(a_card(name)),
    "validation.md": lambda name: marked_up(validation_md(validation(name), {name: name})),
    "validation.html": lambda name: validation_html(validation(name)),
    "sweep.md": lambda name: marked_up(sheet_markdown(sweep(name))),
    "sweep.html": lambda name: sheet_html(sweep(name)),
    "catalog.md": lambda name: marked_up(catalog_markdown([entry(name)], Path())),
    "catalog.html": lambda name: catalog_html([entry(name)]),
    "report.html": report,
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_tags_that_it_has_of_a_harmless_name(page: str) -> None:
    expected = [tag for tag, _ in Tags(PAGES[page](HARMLESS)).found]
    for foreign in FOREIGN:
        text = PAGES[page](foreign)
        tags = Tags(text).found
        assert [tag for tag, _ in tags] == expected, repr(foreign)
        targets = [attributes.get(name) or "" for _, attributes in tags for name in ("src", "href")]
        assert not any(target.startswith(("http", "javascript:", "//")) for target in targets), repr(foreign)
        kinds = {unicodedata.category(sign) for sign in text.replace("\n", "").replace("\t", "")}
        assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"}), repr(foreign)
        assert TOKEN not in text
        text.encode("utf-8")


def test_the_junit_file_is_xml_of_the_same_shape() -> None:
    expected = [element.tag for element in read_xml(junit_xml(validation(HARMLESS))).iter()]
    for foreign in FOREIGN:
        text = junit_xml(validation(foreign))
        assert [element.tag for element in read_xml(text).iter()] == expected
        assert TOKEN not in text


def test_the_card_s_code_is_code_whatever_the_names_are(tmp_path: Path) -> None:
    """The shell runs none of a name, and Python reads the very string."""
    name = "$(touch PWNED)`touch PWNED`';touch PWNED;'\""
    text = a_card(name)
    snippet = text.partition("```python\n")[2].partition("```")[0]
    strings = {node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)}
    assert {name, f"owner/{name}"} <= strings
    script = text.partition("## Build it again")[2].partition("```bash\n")[2].partition("```\n\nwith")[0]
    for program in ("hf", "python"):
        (tmp_path / program).write_text('#!/bin/sh\nprintf "<%s>" "$@" >> said\n', encoding="utf-8")
        (tmp_path / program).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=env, check=True)
    assert not (tmp_path / "PWNED").exists()
    assert (tmp_path / "said").read_text(encoding="utf-8").count(f"<{name}>") == 5
