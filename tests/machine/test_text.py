"""Laws of text on its way out: foreign text is shown as it is, and obeyed by no terminal, page or file."""

import io
import json
import time
import unicodedata
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from lora_fuse.machine import text
from tests.support.foreign import FOREIGN, TOKEN, read_xml


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_line_has_no_character_that_directs_a_terminal_and_no_secret(foreign: str) -> None:
    shown = text.line(foreign)
    assert {unicodedata.category(sign) for sign in shown}.isdisjoint({"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"})
    assert text.line(shown) == shown
    assert TOKEN not in shown
    assert "5ecret" not in shown


def test_what_is_escaped_reads_as_python_has_it_and_all_else_stays() -> None:
    assert text.line("a\x1b\n\u202e\udcff\x9b") == "a\\x1b\\n\\u202e\\udcff\\x9b"
    kept = "Größe 猫 \U0001f408 C:\\x --only '*.attn.*' ± 5 °"
    assert text.line(kept) == text.xml(kept) == kept
    assert text.xml("two\n\tlines\x0b") == "two\n\tlines\\x0b"


def test_the_token_of_the_environment_is_redacted_and_so_is_what_looks_like_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "of another kind\n")
    assert text.redacted(f"Bearer of another kind, {TOKEN}.") == "Bearer (token), (token)"
    assert text.redacted("http://me:p@ss@hub.example/a@b, https://hub.example") == (
        "http://hub.example/a@b, https://hub.example"
    )
    assert text.redacted("hf_hub_download, hf_config, x_hf_") == "hf_hub_download, hf_config, x_hf_"
    signed = json.dumps('at https://cdn.example/x?a=1&b="2"')
    assert json.loads(text.redacted(signed)) == 'at https://cdn.example/x?…"2"'


@pytest.mark.parametrize("foreign", FOREIGN)
def test_markdown_shows_the_text_and_makes_nothing_of_it(foreign: str) -> None:
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    escaped = text.markdown(foreign)
    assert "\n" not in escaped
    table = text.markdown_table([["head", "second"], [foreign, text.code(foreign, in_table=True)]])
    shown = [reader.render(page) for page in (escaped, f"# {escaped}", f"- {escaped}", table)]
    tags = ["p", "h1", "li", "code"]
    for page, tag in zip(shown, tags, strict=True):
        kinds = read_xml(f"<page>{page.replace('<br>', '')}</page>")
        assert {one.tag for one in kinds.iter()} <= {
            "page",
            "p",
            "h1",
            "ul",
            "li",
            *["table", "thead", "tbody", "tr", "th", "td"],
            tag,
        }
        text_of = " ".join("".join(kinds.itertext()).split())
        assert " ".join(text.line(" ".join(foreign.split())).split()) in text_of
    assert shown[3].count("<td>") == 2


@pytest.mark.parametrize("sign", ["@org", "www.evil.example", "https://evil.example", "a/b#1"])
def test_a_code_host_makes_no_link_by_itself(sign: str) -> None:
    """The hosts look for these in the text of a page, where an escape of Markdown is gone and a comment is not."""
    assert sign not in text.markdown(f"see {sign}!")


@pytest.mark.parametrize(
    ("given", "escaped"),
    [("# x", "\\# x"), ("- x", "\\- x"), ("12. x", "12\\. x"), ("===", "==\\="), ("61.5 dB", "61.5 dB"), ("-", "-")],
)
def test_no_text_begins_a_heading_or_an_item(given: str, escaped: str) -> None:
    assert text.markdown(given) == escaped
    assert text.markdown(text.markdown(given)) == escaped


def test_a_code_span_has_more_backticks_than_what_is_in_it() -> None:
    assert text.code("a") == "`a`"
    assert text.code("`a``b") == "``` `a``b ```"
    assert (text.code("a|b"), text.code("a|b", in_table=True)) == ("`a|b`", "`a\\|b`")
    assert text.code("") == ""


@pytest.mark.parametrize("foreign", FOREIGN)
def test_an_xml_file_with_it_can_be_read(foreign: str) -> None:
    element = ElementTree.Element("case", name=text.xml(foreign))
    element.text = text.xml(foreign)
    read = read_xml(ElementTree.tostring(element, encoding="utf-8"))
    assert read.get("name") == text.xml(foreign)


def test_only_the_program_s_own_words_are_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    text.say("error: \x1b[31m", stream)
    text.say("passed", stream, before="gate: ")
    assert stream.getvalue() == "\x1b[1;31merror:\x1b[0m \\x1b[31m\ngate: \x1b[1;32mpassed\x1b[0m\n"


def test_the_nearest_of_many_long_names_is_looked_for_a_second_at_most() -> None:
    assert text.nearest("blocks.7.to_q", ["x", "blocks.1.to_q", "blocks.77.to_k"]) == ["blocks.1.to_q"]
    assert text.nearest("a", ["b"], least=0.6) == []
    started = time.monotonic()
    assert text.nearest("ab" * 5000, ["ba" * 5000 + str(number) for number in range(20_000)])
    assert time.monotonic() - started < 4
