"""Patterns of names mean what PEFT makes of them, and none of them takes for ever or takes all memory."""

import json
import time
from pathlib import Path

import pytest
from peft.utils.other import get_pattern_key

from lora_fuse.errors import BadLora
from lora_fuse.lora import name_patterns, open_lora
from lora_fuse.lora.name_patterns import NamePatterns, is_a_name
from tests.support import tiny

NAMES = ("to_q", "blocks.1.to_q", "blocks.11.to_q", "blocks.1.ff.net.0.proj", "x_to_q", "")
PATTERNS = (
    *("to_q", "1.to_q", "^to_q", "blocks.1.to_q", "q", ".to_q", "b", ""),  # a dot is any character
    *("to_q|to_k", r"blocks\\.\\d+\\.to_[qk]", "(?!x).*", "blocks.(1|2).*", r"(\\w+)\\.\\1", r"\\d{2}\\.to_q", "[^.]*"),
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_it_matches_in_peft(pattern: str) -> None:
    ours = {name: NamePatterns({pattern: 1}).find([name], None) for name in NAMES}
    assert ours == {name: 1 if get_pattern_key([pattern], name) == pattern else None for name in NAMES}


def test_the_first_pattern_that_matches_counts() -> None:
    both = NamePatterns({"to_q|to_k": 3, "to_q": 5})
    assert (both.find(["a.to_q"], 9), both.find(["a.to_v"], 9), both.find(["a", "to_k"], 9)) == (3, 9, 3)
    assert not NamePatterns()
    assert [is_a_name(one) for one in ("blocks.1.to_q", "to_q|to_k", "a" * 1001, 7)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(((((a{1000}){1000}){1000}){1000}){1000})", "repeats a part"),  # 10**15 copies in memory
        ("a{4294967299999}", "repeats a part"),
        ("(" * 400 + "a" + ")" * 400, "recursion"),
        ("a" * 1001, "1001 characters"),
        ("(", "unterminated"),
        ("(?i)a", "global flags"),  # not at the beginning of the whole expression
        ("a{e}", "a brace that is no count"),  # a search that forgives errors, for `regex`
        ("[[a]", "nested set"),
    ],
)
def test_what_is_no_pattern_or_too_large_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NamePatterns({pattern: 1})


@pytest.mark.parametrize("pattern", ["(a|aa|.)+$b", "(.*?,){25}x", "(.|.|.|.)+$b"])
def test_a_match_that_never_ends_is_ended(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "SECONDS", 0.1)
    patterns = NamePatterns({pattern: 1}, "a file")
    name = "b" + "a," * 200 + "a" * 300
    started = time.monotonic()
    with pytest.raises(BadLora, match=r"a file: its 1 patterns take more than 0\.1 s to match, at the name 'ba,a,"):
        patterns.find([name], None)
    assert time.monotonic() - started < 5


def test_the_time_is_that_of_all_matches_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "SECONDS", 0.05)
    patterns = NamePatterns({f"blocks.{number}": 1 for number in range(300)})
    with pytest.raises(BadLora, match="its 300 patterns"):
        [patterns.find(["x" * 900], None) for _ in range(10_000)]


@pytest.mark.parametrize(
    "text",
    [
        '{"r":1e999}',
        '{"r":4,"lora_alpha":1%s}' % ("0" * 400),
        '{"r":4,"lora_alpha":1%s}' % ("0" * 5000),
        '{"rank_pattern":{"x":1e999}}',
        '{"alpha_pattern":{"x":[]}}',
        '{"rank_pattern":[1]}',
        '{"rank_pattern":{"a{4294967299999}":4}}',
        "[" * 200_000,
    ],
)
def test_a_hostile_configuration_is_one_line_that_names_it(text: str, tmp_path: Path) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadLora, match=r"adapter_config\.json"):
        open_lora(tmp_path)


def test_a_hostile_pattern_of_a_folder_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "SECONDS", 0.1)
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    config = {"r": 4, "alpha_pattern": {"(.|.|.|.)+$o": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BadLora, match=r"adapter_config\.json: its 1 patterns take more than 0\.1 s"):
        open_lora(tmp_path)
