"""JSON as a tree that can be changed into what no JSON writer makes: a key twice, 1e999, brackets 200,000 deep."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Raw:
    """A piece of a document as it is to be written."""

    text: str


class Entries(list[tuple[Any, Any]]):
    """A JSON object as pairs, since a key may be there twice."""


def odd(*values: object) -> tuple[Raw, ...]:
    return tuple(Raw(json.dumps(value)) for value in values)


DEEP = 200_000
# Values that a reader may not expect where another one stood.
ODD = (
    *odd(None, True, False, 0, -1, 1, 4, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400), 0.5, 1e300, -0.0),
    *map(Raw, ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "-0", "1E-400", "9" * 5000, "1." + "0" * 5000)),
    *odd(
        "",
        " ",
        "\0",
        "a\0b",
        "\x1b[2J",
        "\n",
        "line\nline",
        "\u202e",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        ".",
        "x" * 5000,
    ),
    *odd(
        "1",
        "-1",
        "nan",
        "inf",
        "1e999",
        "true",
        "null",
        "None",
        "²",
        "\u0661",
        "é" * 300,
        "\ufffe",
        "\U0001d54f",
        "a" * 300,
    ),
    *odd("hf_" + "A1b2C3d4E" * 4, "*", "[", "(a+)+$", "a{4294967299999}", "(?P<x>", "\\", "%s %n {} {0}", "main"),
    *map(Raw, ('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\ud83d\\ude00"')),
    *odd([], {}, [None], [[]], [{}], {"": None}, {"a": {}}, [1], ["a"], [1, 2, 3], ["a", "b"], {"a": "b"}, {"0": 1}),
    Raw("[" * DEEP),
    Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP),
    Raw("[" * 900 + "]" * 900),
    Raw('{"a":' * 400 + "1" + "}" * 400),
    Raw("[" + "0," * 3000 + "0]"),
    Raw(""),
    Raw("nul"),
    Raw("'a'"),
)
KEYS = (
    *odd(
        "",
        "__metadata__",
        "a\0",
        "\x1b[31m",
        "a\nb",
        "..",
        "__class__",
        "__proto__",
        "x" * 3000,
        "é",
        "a.b",
        "$ref",
        "_",
        "0",
    ),
    *map(Raw, ('"\\ud800"', "1", "null", "[]")),
)


def parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=Entries)


def written(tree: Any) -> str:
    """The text of a tree."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, Entries):
        return "{" + ",".join(f"{written(key)}:{written(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(written, tree)) + "]"
    return json.dumps(tree)


def places(tree: Any, above: Path = ()) -> Iterator[Path]:
    """The places of all values, the whole first."""
    yield above
    if isinstance(tree, list):
        for at, item in enumerate(tree):
            yield from places(item[1] if isinstance(tree, Entries) else item, (*above, at))


def value_at(tree: Any, path: Path) -> Any:
    for at in path:
        tree = tree[at][1] if isinstance(tree, Entries) else tree[at]
    return tree


def mutated(draw: Draw, tree: Any, times: int) -> Any:
    """The tree after some changes."""
    for _ in range(times):
        everywhere = list(places(tree))
        path = draw(st.sampled_from(everywhere))
        change = draw(st.sampled_from(CHANGES))
        tree = _changed(draw, tree, path, change, everywhere, tree)
    return tree


def _changed(draw: Draw, tree: Any, path: Path, change: str, everywhere: list[Path], whole: Any) -> Any:
    if len(path) > 1 or (path and change in IN_PLACE):
        at = path[0]
        new = type(tree)(tree)
        inner = tree[at][1] if isinstance(tree, Entries) else tree[at]
        inner = _changed(draw, inner, path[1:], change, everywhere, whole)
        new[at] = (tree[at][0], inner) if isinstance(tree, Entries) else inner
        return new
    if not path:
        return _in_place(draw, tree, change, everywhere, whole)
    return _in_container(draw, tree, path[0], change)


def _in_container(draw: Draw, tree: Any, at: int, change: str) -> Any:
    """Drop, double or rename one entry of an object or list."""
    new = type(tree)(tree)
    if change == "drop":
        del new[at]
    elif change == "twice":
        other = draw(st.sampled_from(ODD))
        new.append((tree[at][0], other) if isinstance(tree, Entries) else tree[at])
    elif isinstance(tree, Entries):
        key, value = tree[at]
        known = [name for name, _ in tree if isinstance(name, str)]
        respell = change == "respell" and isinstance(key, str)
        new[at] = (respelled(draw, key, known) if respell else draw(st.sampled_from(KEYS)), value)
    else:
        new.insert(draw(st.integers(0, len(tree))), draw(st.sampled_from(ODD)))
    return new


def _in_place(draw: Draw, value: Any, change: str, everywhere: list[Path], whole: Any) -> Any:
    if change == "graft":
        return value_at(whole, draw(st.sampled_from(everywhere)))
    if change == "inner" and isinstance(value, str):
        return _inner(draw, value)
    if change == "near" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return draw(st.sampled_from([-value, value + 1, value * 2, float(value), str(value), bool(value), [value]]))
    if change == "near" and isinstance(value, str) and value:
        return draw(st.sampled_from([value[:-1], value.upper(), value + value, [value], f"{value}\n", value + "\0"]))
    if change == "wrap":
        return draw(st.sampled_from([[value], Entries([("a", value)]), [value, value]]))
    return draw(st.sampled_from(ODD))


def _inner(draw: Draw, value: str) -> Any:
    """Change a document that stands in a string, as it is or in base64."""
    for code, encode in ((base64.b64decode, base64.b64encode), (str.encode, bytes)):
        try:
            tree = parse(code(value).decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, list):
            return encode(written(mutated(draw, tree, 1)).encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return draw(st.sampled_from(ODD))


def respelled(draw: Draw, name: str, others: list[str]) -> str:
    """A dotted name with a part gone, doubled, or from another one."""
    parts = name.split(".")
    at = draw(st.integers(0, len(parts) - 1))
    from_other = draw(st.sampled_from(others)).split(".")
    match draw(st.integers(0, 3)):
        case 0:
            del parts[at]
        case 1:
            parts.insert(at, parts[at])
        case 2:
            parts[at] = draw(st.sampled_from(from_other))
        case _:
            parts = [*parts[:at], *from_other[at:]]
    return ".".join(parts)


IN_PLACE = ("odd", "graft", "inner", "near", "wrap")
CHANGES = (*IN_PLACE, "odd", "odd", "near", "drop", "drop", "twice", "rename", "respell")
