"""JSON and YAML from outside: what is out of bounds is refused as quickly as what is none."""

import time
from typing import Any

import pytest
import yaml

from lora_fuse.machine.parsing import check_yaml, parse_json, parse_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "1" * 5000, b"\xff\xfe\xfd", ""])
def test_json_that_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_json_is_what_it_is() -> None:
    assert parse_json(b'{"a": [1e999, null]}') == {"a": [float("inf"), None]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, r"alias \*a0"),
        ("a: &a [*a]", r"alias \*a"),
        ("[" * 200_000, "deeper than 64"),
        ("{a: " * 65 + "1" + "}" * 65, "deeper than 64"),
        ("\n".join("  " * n + "a:" for n in range(70)), "deeper than 64"),
        ("a: 1\na: 2", "the key a is there twice"),
        ("a: 2026-99-99", "month"),
        ("a: " + "1" * 5000, "digits"),
        ("? [a]\n: b", "unhashable"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: [", "flow"),
        ("a: \x00", "special characters|control characters"),
    ],
)
def test_yaml_out_of_bounds_is_a_value_error_at_once(text: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "text", ["", "{}", "a: {b: [1, 2.5, null, 'x']}\n", "a: |\n  *b\n  &c\n", "{a: " * 64 + "1" + "}" * 64]
)
def test_plain_yaml_is_what_it_is(text: str) -> None:
    check_yaml(text)
    expected: Any = yaml.safe_load(text)
    assert parse_yaml(text) == expected
