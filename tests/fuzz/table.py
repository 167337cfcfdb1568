"""All parsers of what comes from outside: a new one is a row in the module of its kind."""

from collections.abc import Iterator
from itertools import chain

from tests.fuzz import answers, exported, pictures, releases, stage_records, texts, weights
from tests.fuzz.parsers import Parser

KINDS = (weights, exported, texts, stage_records, releases, pictures, answers)


def parsers() -> dict[str, Parser]:
    rows: Iterator[Parser] = chain.from_iterable(kind.rows() for kind in KINDS)
    return {row.name: row for row in rows}
